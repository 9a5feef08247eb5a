"""Which units give up how much so that all of them fit a budget and the sum of predicted losses is least.

Every concept has one price for all units, and each unit takes the rate at which its own loss and what it pays are
least; the lowest price at which all fit is looked for. No other allocation of as many concepts loses less (Everett,
"Generalized Lagrange multiplier method", 1963), and since the price is all that units have in common, one that comes
or goes changes nothing for the others as long as the price stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from compllm_rag.compression.rate_policies.measures import Floats
from compllm_rag.compression.rates import concepts_at
from compllm_rag.errors import BudgetError


def kept_at(sizes: Sequence[int], rates: Sequence[float]) -> Floats:
    """K of units of `sizes` tokens at each rate, (n_units, n_rates)."""
    return np.array([[concepts_at(rate, size) for rate in rates] for size in sizes], dtype=np.float64).reshape(
        len(sizes), len(rates)
    )


def chosen_at(price: float, lost: Floats, kept: Floats) -> list[int]:
    """The rate that each unit takes at a price, as an index for each unit; of equals the one that keeps more.

    Args:
        price: Of one concept.
        lost: Predicted loss of each unit at each rate, (n_units, n_rates), all of it and not that of a token.
        kept: Concepts likewise, falling with the rate.
    """
    return [int(i) for i in np.argmin(lost + price * kept, axis=1)]


def least_price(lost: Floats, kept: Floats, budget: float, *, unit: str = "positions", size: int = 1) -> float:
    """The lowest price of a concept at which all units fit.

    Args:
        lost: See `chosen_at`.
        kept: See `chosen_at`.
        budget: Concepts that may be kept.
        unit: What the budget was given in, for the error.
        size: How much of that one concept takes.

    Raises:
        BudgetError: Even the highest rate keeps more; it says the least budget that would do.
    """
    if not len(kept):
        return 0.0
    least = int(kept.min(axis=1).sum())
    if least > budget:
        raise BudgetError(
            "nothing fits this budget",
            got=f"{int(budget * size)} {unit}",
            expected=f"at least {least * size} {unit}, with every chunk at its highest rate",
            next_step="raise the budget, leave documents out, or ingest without a budget",
        )

    def total(price: float) -> float:
        return float(kept[np.arange(len(kept)), chosen_at(price, lost, kept)].sum())

    if total(0.0) <= budget:
        return 0.0
    prices = _breaks(lost, kept)
    low, high = 0, len(prices) - 1  # at the highest price every unit is at its highest rate
    while low < high:
        middle = (low + high) // 2
        if total(prices[middle]) <= budget:
            high = middle
        else:
            low = middle + 1
    return float(prices[low])


def _breaks(lost: Floats, kept: Floats) -> Floats:
    """Prices just above those at which a unit may change its rate, rising."""
    found = []
    for i, j in itertools.combinations(range(kept.shape[1]), 2):
        saved = kept[:, i] - kept[:, j]
        may = saved > 0
        found.append((lost[may, j] - lost[may, i]) / saved[may])
    prices = np.unique(np.concatenate(found))
    # At the very price two rates are equal, and the one that keeps more is taken.
    above: Floats = np.nextafter(prices[prices >= 0], np.inf) * (1 + 1e-9) + 1e-12
    return above
