"""How many concepts a segment gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Protocol

from compllm_rag.errors import ConfigurationError, RateOutOfReachError

# A segment of n tokens gets ceil(n / C) concepts, so rounding up costs more the fewer concepts a segment has. Beyond
# 0.3 S (6 at S = 20) the achieved rate hardly follows the requested one, and a promise would be broken.
_REACH = 0.3


def is_number(given: object) -> bool:
    """Whether what somebody gave for a number is one; true and false are none."""
    return isinstance(given, Real) and not isinstance(given, bool)


class RatePolicy(Protocol):
    """Decides K, the number of concepts of each segment."""

    def n_concepts(self, segments: Sequence[Sequence[int]]) -> list[int]:
        """K of each segment, given the token ids of the segments of one chunk."""
        ...


class FixedRate:
    """K = max(1, ceil(n / C)) for a segment of n tokens (docs/design.md section 4).

    Args:
        rate: C, source tokens per concept.
        segment_length: S, the most tokens of a segment.

    Raises:
        ConfigurationError: The rate is not a finite number of at least 1.
        RateOutOfReachError: Segments of S tokens are too short for this rate.
    """

    def __init__(self, rate: float, segment_length: int) -> None:
        if not math.isfinite(rate) or rate < 1:
            raise ConfigurationError(
                "compression rate makes no sense", got=rate, expected="a number of at least 1", next_step="use 2 or 4"
            )
        most = max_rate(segment_length)
        if rate > most:
            # No segment is long enough for the largest of numbers, nor can that length be reckoned.
            longer = f", or use a compressor with segments of {math.ceil(rate / _REACH)} tokens" if rate < 1e6 else ""
            raise RateOutOfReachError(
                "compression rate is out of reach",
                got=f"rate {rate:g} with segments of at most {segment_length} tokens",
                expected=f"at most {most:g}",
                next_step=f"lower the rate{longer}",
            )
        self.rate, self.segment_length = float(rate), segment_length

    def n_concepts(self, segments: Sequence[Sequence[int]]) -> list[int]:
        """K of each segment."""
        return [concepts_at(self.rate, len(segment)) for segment in segments]


def max_rate(segment_length: int) -> float:
    """The highest rate that segments of S tokens can keep."""
    return max(1.0, round(_REACH * segment_length, 6))


def concepts_at(rate: float, n_tokens: int) -> int:
    """Concepts of one segment of `n_tokens` tokens at a rate; at least 1.

    The small tolerance keeps 3 tokens at a rate of 1.5 at 2 concepts whatever the rounding of the division.
    """
    return max(1, math.ceil(n_tokens / rate - 1e-9))
