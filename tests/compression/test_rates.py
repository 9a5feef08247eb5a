"""K of a segment, and the rates that segments of a length can keep."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compllm_rag.compression.rates import FixedRate, concepts_at, max_rate
from compllm_rag.errors import ConfigurationError, RateOutOfReachError

QUIET = settings(deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(
    ("rate", "n_tokens", "expected"),
    [(2, 20, 10), (2, 19, 10), (2, 1, 1), (4, 20, 5), (4, 3, 1), (4, 5, 2), (1, 7, 7), (1.5, 3, 2), (1.1, 11, 10)],
)
def test_a_segment_of_n_tokens_gets_n_over_c_concepts_rounded_up(rate: float, n_tokens: int, expected: int) -> None:
    assert concepts_at(rate, n_tokens) == expected


@QUIET
@given(st.floats(1, 6), st.integers(1, 512))
def test_k_is_between_one_and_n_and_never_promises_more_than_the_rate(rate: float, n_tokens: int) -> None:
    k = concepts_at(rate, n_tokens)
    assert 1 <= k <= n_tokens
    assert k * rate >= n_tokens - 1e-6
    assert (k - 1) * rate < n_tokens


def test_fixed_rate_decides_each_segment_by_its_length_alone() -> None:
    policy = FixedRate(4, 20)
    assert policy.n_concepts([[1] * 20, [2] * 7, [3]]) == [5, 2, 1]
    assert policy.n_concepts([]) == []


@pytest.mark.parametrize(("segment_length", "rate"), [(20, 6.1), (20, 8), (10, 4), (2, 2), (20, sys.float_info.max)])
def test_a_rate_that_the_segments_cannot_reach_is_refused(segment_length: int, rate: float) -> None:
    with pytest.raises(RateOutOfReachError) as caught:
        FixedRate(rate, segment_length)
    assert f"at most {max_rate(segment_length):g}" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_the_refusal_names_a_segment_length_that_would_do() -> None:
    with pytest.raises(RateOutOfReachError, match="segments of 27 tokens"):
        FixedRate(8, 20)
    assert FixedRate(8, 27).rate == 8


@pytest.mark.parametrize("segment_length", [2, 4, 20, 40, 512])
def test_the_highest_rate_itself_is_allowed(segment_length: int) -> None:
    assert FixedRate(max_rate(segment_length), segment_length).rate >= 1


@pytest.mark.parametrize("rate", [0, 0.99, -2, math.inf, math.nan])
def test_a_rate_that_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(ConfigurationError, match="compression rate makes no sense"):
        FixedRate(rate, 20)
