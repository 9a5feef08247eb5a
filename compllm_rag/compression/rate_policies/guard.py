"""Chunks that compression would lose too much of: they stay text."""

from __future__ import annotations

from compllm_rag.compression.rate_policies.losses import Losses
from compllm_rag.compression.rate_policies.measures import TextMeasures, Units

# Prose of an encyclopaedia stays below 0.23, source code lies about 0.3 and tables of numbers above 0.6.
EXACT_LIMIT = 0.25
# Nats per token of a gold answer.
LOSS_LIMIT = 0.5


class ExactGuard:
    """Leaves texts alone that are largely digits, identifiers and symbols: those must be given back sign by sign.

    Args:
        measures: Of the compressor.
        limit: Largest share of such characters that is compressed.
    """

    def __init__(self, measures: TextMeasures, limit: float = EXACT_LIMIT) -> None:
        self._measures, self.limit = measures, limit

    def expected(self, units: Units, n_concepts: list[int]) -> float:
        """The share of a text's characters that must be exact."""
        return self._measures.exact(units)


class LossGuard:
    """Leaves texts alone whose predicted loss at the rate chosen is too high.

    Args:
        losses: Predict what a rate loses.
        limit: Largest loss that is accepted, in their unit.
    """

    def __init__(self, losses: Losses, limit: float = LOSS_LIMIT) -> None:
        self._losses, self.limit = losses, limit

    def expected(self, units: Units, n_concepts: list[int]) -> float:
        """The predicted loss of a text, mean over its tokens."""
        rates = [max(1.0, len(unit) / k) for unit, k in zip(units, n_concepts, strict=True)]
        total = sum(
            float(self._losses.of([unit], [rate])[0, 0]) * len(unit) for unit, rate in zip(units, rates, strict=True)
        )
        return total / max(sum(map(len, units)), 1)


Guard = ExactGuard | LossGuard
