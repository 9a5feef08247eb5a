"""Chunks that compression would lose too much of: they stay text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compllm_rag.compression.rate_policies.losses import Losses
from compllm_rag.compression.rate_policies.measures import TextMeasures, Units
from compllm_rag.config import GuardName, IngestConfig

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

    name: GuardName = "exact"

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

    name: GuardName = "loss"

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


def limit_of(config: IngestConfig) -> float | None:
    """From which value on the guard of a storage leaves chunks as text; None without a guard."""
    own = {"off": None, "exact": EXACT_LIMIT, "loss": LOSS_LIMIT}[config.guard]
    return own if own is None or config.guard_limit is None else config.guard_limit


def guard_facts(guard: Guard | None, expected: float | None) -> dict[str, Any] | None:
    """What a guard found of a text that it left as text, as plain values; None where it is not known which guard.

    Args:
        guard: Of the storage.
        expected: What it measured; None where that was not kept.
    """
    return None if guard is None else {"by": guard.name, "expected": expected, "limit": guard.limit}


def guard_words(facts: Mapping[str, Any]) -> str:
    """The same in plain words."""
    what = "share of its signs to give back exactly" if facts["by"] == "exact" else "predicted loss in nats per token"
    found = "not kept" if facts["expected"] is None else f"{facts['expected']:.2f}"
    return f"{what} {found}, limit {facts['limit']:g}"
