"""Finding the setting at which a package keeps as many tokens as concepts take.

LLMLingua does not keep to the rate it is asked for, so it is asked again until the tokens it leaves match.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

TOLERANCE, TRIES = 0.02, 8


@dataclass(frozen=True)
class Match:
    """Token ids of what a passage became, the rate that was asked for, and how often it was asked."""

    ids: tuple[int, ...]
    asked: float
    tries: int

    def off(self, budget: int) -> float:
        """Relative distance from the budget."""
        return abs(len(self.ids) - budget) / budget


def match(
    compress: Callable[[float], tuple[int, ...]],
    source: int,
    budget: int,
    *,
    tolerance: float = TOLERANCE,
    tries: int = TRIES,
) -> Match:
    """Ask for rates until about `budget` tokens are left; the closest of all tries otherwise.

    Args:
        compress: Token ids (of the target's tokenizer) at a rate from 0 to 1, the share of tokens to keep.
        source: Tokens of the passage.
        budget: Tokens that should be left, at least 1.
        tolerance: Relative distance that is good enough; a distance of half a token always is.
        tries: Most calls.
    """
    low, high = 0.0, 1.0
    rate = min(1.0, budget / max(1, source))
    best: Match | None = None
    for count in range(1, tries + 1):
        ids = compress(rate)
        tried = Match(ids, rate, count)
        if ids and (best is None or tried.off(budget) < best.off(budget)):
            best = tried
        if abs(len(ids) - budget) <= max(0.5, tolerance * budget):
            break
        low, high = (rate, high) if len(ids) < budget else (low, rate)
        # By proportion where that stays between what was tried, else halfway: counts move in steps.
        guess = rate * budget / max(1, len(ids))
        margin = 0.1 * (high - low)
        rate = guess if low + margin < guess < high - margin else (low + high) / 2
    if best is None:
        return Match((), rate, tries)
    return Match(best.ids, best.asked, count)
