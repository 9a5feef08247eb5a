"""What rate policies know of a text before any LLM has read it: its tokens' information, and its characters."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compllm_rag.compression.information import information_for
from compllm_rag.compression.selection import fitted

if TYPE_CHECKING:
    from compllm_rag.compression.spec import ConceptCompressor
    from compllm_rag.models.llm import TargetLLM

Units = Sequence[Sequence[int]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

FEATURES = (
    "information",  # mean over tokens, in shares of the mean of ordinary text
    "information_spread",  # standard deviation, likewise
    "densest_window",  # mean of the densest 40 tokens, likewise
    "dropped_at_2",  # share of the information that the less informative half of the tokens has
    "dropped_at_4",  # and the least informative three quarters
    "repeated",  # share of tokens that stand in the unit more than once
    "tokens",  # of 240
    "characters_per_token",
    "digits",  # shares of the characters
    "upper_case",
    "punctuation",
    "symbols",
    "line_breaks",
)
_WINDOW = 40
_EXACT = 1.5
# What a reader has to give back sign by sign: in prose these are rare.
_SYMBOLS = re.compile(r"[_{}\[\]()<>=+*/\\|#@$%^&~;:`]")
_WORD, _IDENTIFIER = re.compile(r"\w+"), re.compile(r"[\d_]|[a-z][A-Z]")
_PUNCTUATION = re.compile(r"[.,!?'\"“”‘’…–—-]")


class TextMeasures:
    """Numbers of texts, from the information table of a tokenizer.

    It is the table that every compressor starts from (`information_for`). The one in a compressor may have learned what
    is asked for, and says less about how much there is to say.

    Args:
        get: Gives the compressor, on the first call of anything: it may still have to be loaded.
        llm: The compressor's, where it is loaded already. Then whatever takes no pass of it needs no compressor.
    """

    def __init__(self, get: Callable[[], ConceptCompressor], llm: TargetLLM | None = None) -> None:
        self._get, self._llm = get, llm

    @property
    def compressor(self) -> ConceptCompressor:
        """The compressor itself."""
        return self._get()

    @property
    def llm(self) -> TargetLLM:
        """The compressor's LLM."""
        return self._get().llm if self._llm is None else self._llm

    @functools.cached_property
    def table(self) -> Floats:
        """Information of each token, (rows,) in nats."""
        llm = self.llm
        table: Floats = fitted(information_for(llm.tokenizer), llm.embedding.weight.shape[0]).double().numpy()
        return table

    @functools.cached_property
    def ordinary(self) -> float:
        """Mean information of a token of ordinary text, in nats: the entropy of the table's own distribution."""
        likely = np.exp(-self.table)
        return float((likely * self.table).sum() / likely.sum())

    @functools.cached_property
    def weight(self) -> Floats:
        """Information of each token, (rows,) in shares of that of ordinary text, that of digits and symbols raised.

        Digits are frequent, and so carry little by a count of tokens; which one stands where, nothing foretells.
        """
        tokenizer, rows = self.llm.tokenizer, len(self.table)
        names = tokenizer.convert_ids_to_tokens(list(range(min(rows, len(tokenizer)))))
        exact = [bool(name) and (any(map(str.isdigit, name)) or bool(_SYMBOLS.search(name))) for name in names]
        weight = self.table / self.ordinary
        weight[: len(exact)] = np.where(exact, np.maximum(weight[: len(exact)], _EXACT), weight[: len(exact)])
        return weight

    def information(self, units: Units) -> list[Floats]:
        """Of each token of each unit, (n_tokens,); see `weight`."""
        return [self.weight[np.asarray(unit, dtype=np.int64)] for unit in units]

    def surprisal(self, units: Units) -> list[Floats]:
        """Of each token of each unit under the LLM, (n_tokens,), likewise; one pass of all its layers."""
        rows = surprisals(self._get(), units)
        return [row.double().numpy() / self.ordinary for row in rows]

    def text(self, units: Units) -> str:
        """The characters of units, joined."""
        return str(self.llm.tokenizer.decode([token for unit in units for token in unit]))

    def features(self, unit: Sequence[int]) -> Floats:
        """What a loss is predicted from, (len(FEATURES),); no pass of the LLM.

        Args:
            unit: Token ids, at least one.
        """
        [rows] = self.information([unit])
        text = self.text([unit])
        n, size = len(unit), max(len(text), 1)
        return np.array(
            [
                rows.mean(),
                rows.std(),
                densest(rows, _WINDOW),
                dropped(rows, (n + 1) // 2),
                dropped(rows, (n + 3) // 4),
                1 - len(set(unit)) / n,
                n / 240,
                size / n,
                sum(map(str.isdigit, text)) / size,
                sum(map(str.isupper, text)) / size,
                len(_PUNCTUATION.findall(text)) / size,
                len(_SYMBOLS.findall(text)) / size,
                text.count("\n") / size,
            ]
        )

    def exact(self, units: Units) -> float:
        """Share of the characters, blanks aside, that have to be given back sign by sign.

        They are symbols, and words that hold a digit, an underscore, or a capital behind a small letter.
        """
        text = self.text(units)
        words = sum(len(word) for word in _WORD.findall(text) if _IDENTIFIER.search(word))
        return (words + len(_SYMBOLS.findall(text.replace("_", "")))) / max(len("".join(text.split())), 1)


def densest(values: Floats, window: int) -> float:
    """The highest mean of `window` values in a row; the mean of all where there are fewer.

    Args:
        values: (n_tokens,), at least one.
        window: In tokens.
    """
    size = min(window, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return float((sums[size:] - sums[:-size]).max() / size)


def dropped(values: Floats, k: int) -> float:
    """The share of a sum of values (n_tokens,), none negative, that is lost when only the `k` largest stay."""
    total = float(values.sum())
    return 1 - float(np.sort(values)[::-1][:k].sum()) / total if total > 0 else 0.0


def surprisals(compressor: ConceptCompressor, units: Units) -> list[torch.Tensor]:
    """Of each token under the compressor's LLM, (n_tokens,) in nats, float32 on the CPU."""
    opening = list(compressor.config.opening) or [int(compressor.llm.tokenizer.eos_token_id)]
    out = []
    with torch.inference_mode():
        for unit in units:
            ids = torch.tensor([[*opening, *unit]], device=compressor.llm.device)  # (1, n)
            logits = compressor.llm.model(input_ids=ids, use_cache=False).logits[0, len(opening) - 1 : -1]
            said = logits.float().log_softmax(-1)  # (n_tokens, vocab_size)
            wanted = torch.tensor(list(unit), device=said.device)
            out.append(-said.gather(1, wanted[:, None])[:, 0].cpu())
    return out
