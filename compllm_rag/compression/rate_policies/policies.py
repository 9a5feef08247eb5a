"""Rate policies that look at the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from compllm_rag.compression.rate_policies.budget import chosen_at, kept_at
from compllm_rag.compression.rate_policies.losses import RATES, Losses
from compllm_rag.compression.rate_policies.measures import Floats, TextMeasures, Units, densest
from compllm_rag.compression.rates import FixedRate, concepts_at
from compllm_rag.config import RateOptions

# Mean information of the densest window, in shares of ordinary text, at the ends of the bands, dense to thin. By the
# table of the embedded model source code and tables lie at 1.25 to 1.4, encyclopaedic prose about 1.2, stories about 1.
DENSITIES = (1.35, 1.2, 1.0, 0.9)


class TextRate(Protocol):
    """A policy that wants a rate for each unit, by what the unit says alone."""

    def rates(self, units: Units) -> list[float]:
        """The rate wanted for each unit."""
        ...

    def n_concepts(self, segments: Sequence[Sequence[int]]) -> list[int]:
        """K of each unit."""
        ...


class InformationRate:
    """Rates by information: what is dense keeps more concepts a token (docs/rates.md).

    A unit is as dense as the densest run of `window` tokens in it. The bands of `options` give the rates at four
    densities; between them rates follow the density in straight lines, beyond them they stay.

    Args:
        measures: Of the compressor.
        options: Bands, window, and what information is measured by.
        longest_unit: Most tokens of a unit.

    Raises:
        RateOutOfReachError: Units are too short for the highest rate.
    """

    def __init__(self, measures: TextMeasures, options: RateOptions, longest_unit: int) -> None:
        FixedRate(options.bands[-1], longest_unit)
        self._measures, self.options = measures, options

    def rates(self, units: Units) -> list[float]:
        """The rate wanted for each unit."""
        if not units:
            return []
        by_llm = self.options.measure == "surprisal"
        rows = self._measures.surprisal(units) if by_llm else self._measures.information(units)
        found = [densest(row, self.options.window) for row in rows]
        return [float(np.interp(-d, [-border for border in DENSITIES], self.options.bands)) for d in found]

    def n_concepts(self, segments: Sequence[Sequence[int]]) -> list[int]:
        """K of each unit."""
        return _counts(self.rates(segments), segments)


class LeastLossRate:
    """The highest rate whose predicted loss stays below a limit; where none does, the lowest.

    Args:
        losses: Predict what a rate loses.
        most_loss: The limit, in their unit.
        choices: The rates, rising.
    """

    def __init__(self, losses: Losses, most_loss: float, choices: Sequence[float] = RATES) -> None:
        self.losses, self.most_loss, self.choices = losses, most_loss, tuple(choices)

    def rates(self, units: Units) -> list[float]:
        """The rate wanted for each unit."""
        fits = self.losses.of(units, self.choices) <= self.most_loss  # (n_units, n_rates)
        return [
            max([r for r, fit in zip(self.choices, row, strict=True) if fit], default=self.choices[0]) for row in fits
        ]

    def n_concepts(self, segments: Sequence[Sequence[int]]) -> list[int]:
        """K of each unit."""
        return _counts(self.rates(segments), segments)


class PricedRate:
    """The rate at which predicted loss and the price of the concepts kept are least together.

    All units pay the same price for a concept, so that none could save the loss that another one takes: the choice
    that a budget leads to, once its price is known (see `budget`).

    Args:
        losses: Predict what a rate loses.
        price: Of one concept, in their unit; 0 keeps all.
        choices: The rates, rising.
    """

    def __init__(self, losses: Losses, price: float = 0.0, choices: Sequence[float] = RATES) -> None:
        self.losses, self.price, self.choices = losses, price, tuple(choices)

    def table(self, units: Units) -> Floats:
        """What each unit loses at each rate, all of its tokens together, (n_units, n_rates)."""
        lost = self.losses.of(units, self.choices) * np.array([len(unit) for unit in units])[:, None]
        # As it is kept, so that what was kept leads to the same choice.
        rounded: Floats = np.round(lost, 6)
        return rounded

    def rates_at(self, lost: Floats, sizes: Sequence[int]) -> list[float]:
        """The rate for each unit of a `table`, given their tokens."""
        return [self.choices[i] for i in chosen_at(self.price, lost, kept_at(sizes, self.choices))]

    def rates(self, units: Units) -> list[float]:
        """The rate wanted for each unit."""
        return self.rates_at(self.table(units), [len(unit) for unit in units]) if units else []

    def n_concepts(self, segments: Sequence[Sequence[int]]) -> list[int]:
        """K of each unit."""
        return _counts(self.rates(segments), segments)


def _counts(rates: Sequence[float], units: Units) -> list[int]:
    return [concepts_at(rate, len(unit)) for rate, unit in zip(rates, units, strict=True)]
