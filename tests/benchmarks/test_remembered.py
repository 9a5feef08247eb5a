"""Kept states give the concepts that a compressor makes anew, and spare it the passes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import toy
from benchmarks.remembered import remember_states
from compllm_rag.compression.deep import DeepCompressor
from trained import trained, trained_deep

UNITS = [tuple(range(40, 380, 13)), tuple(range(30, 200, 7)), tuple(range(50, 90, 3))]


def alike(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Units of each pass through the lower half."""
    seen: list[int] = []
    own = DeepCompressor.states

    def counted(self: DeepCompressor, units: Sequence[Sequence[int]], kept: object = None) -> torch.Tensor:
        seen.append(len(units))
        return own(self, units, kept)

    monkeypatch.setattr(DeepCompressor, "states", counted)
    return seen


def test_concepts_are_the_same_at_every_rate_and_the_lower_half_reads_each_unit_once(passes: list[int]) -> None:
    plain, kept = (trained_deep(toy.llm(layers=4), entry_layer=2) for _ in range(2))
    remember_states(kept)
    for rate in (1, 2, 4):
        ks = [-(-len(unit) // rate) for unit in UNITS]
        assert alike(kept.compress(UNITS, ks), plain.compress(UNITS, ks))
        assert kept.kept_places(UNITS, ks) == plain.kept_places(UNITS, ks)
    chance = [[0, 2, 5], [1, 3], [4]]
    assert alike(kept.compress(UNITS, [3, 2, 1], places=chance), plain.compress(UNITS, [3, 2, 1], places=chance))
    assert sum(passes) == 4 * len(UNITS) + len(UNITS)


def test_where_what_is_kept_is_marked_each_choice_is_read_once(passes: list[int]) -> None:
    plain, kept = (trained_deep(toy.llm(layers=4), entry_layer=2, marked=True) for _ in range(2))
    remember_states(kept)
    for _ in range(2):
        for rate in (1, 2, 4):
            ks = [-(-len(unit) // rate) for unit in UNITS]
            assert alike(kept.compress(UNITS, ks), plain.compress(UNITS, ks))
    assert sum(passes) == 6 * len(UNITS) + 3 * len(UNITS)


def test_a_unit_that_comes_twice_or_among_known_ones_is_read_once(passes: list[int]) -> None:
    kept = remember_states(trained_deep(toy.llm(layers=4), entry_layer=2))
    first = kept.compress([UNITS[0], UNITS[0]], [2, 4])
    again = kept.compress([UNITS[1], UNITS[0]], [3, 4])
    assert passes == [1, 1]
    assert alike([first[1]], [again[1]])


def test_no_more_than_so_many_are_kept(passes: list[int]) -> None:
    kept = remember_states(trained_deep(toy.llm(layers=4), entry_layer=2), most=1)
    made = kept.compress(UNITS, [2, 2, 2])
    assert alike(kept.compress(UNITS, [2, 2, 2]), made)
    assert sum(passes) == 2 * len(UNITS) - 1


def test_concepts_at_the_input_stay_as_they_are() -> None:
    compressor = trained(toy.llm())
    assert remember_states(compressor) is compressor
    assert "compress" not in vars(compressor)
