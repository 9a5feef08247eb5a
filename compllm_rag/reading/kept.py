"""How much of what text gives is kept by concepts, by rate: what policies reckon with where no losses are predicted.

The share of text's gain over no passages in the likelihood of the gold answer (*recovered*, docs/design.md section 7),
as `compllm-rag bench quality` measured it (docs/quality.md). Deep concepts, with the weights that ship: the mean of
SQuAD and HotpotQA, at rate 4 HotpotQA alone; the share that HotpotQA has above 1 at rate 1 counts as 1. Concepts at the
input embeddings: SQuAD, with the first weights. Between two rates it is taken to fall in a straight line, below the
last one by proportion.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from compllm_rag.errors import ConfigurationError

DEEP: Mapping[float, float] = {1.0: 0.996, 2.0: 0.919, 4.0: 0.808}
INPUT: Mapping[float, float] = {1.94: 0.588, 3.67: 0.290, 5.17: 0.216}


def checked_table(table: Mapping[float, float]) -> dict[float, float]:
    """A table of one's own: shares from 0 to 1 by rate.

    Raises:
        ConfigurationError: It is empty, or a value makes no sense.
    """
    if not table or not all(rate >= 1 and 0 <= share <= 1 for rate, share in table.items()):
        raise ConfigurationError(
            "table of what is kept makes no sense",
            got=dict(table),
            expected="shares from 0 to 1 of what text gives, by rates of at least 1",
            next_step="take them from `compllm-rag bench quality`",
        )
    return dict(sorted(table.items()))


def kept_at(rate: float, table: Mapping[float, float]) -> float:
    """The share that concepts keep at a rate.

    Args:
        rate: Source tokens per concept.
        table: As `checked_table` gives it.
    """
    known = list(table.items())
    if rate <= known[0][0]:
        return known[0][1]
    for (low, more), (high, less) in pairwise(known):
        if rate <= high:
            return more + (less - more) * (rate - low) / (high - low)
    last, share = known[-1]
    return share * last / rate
