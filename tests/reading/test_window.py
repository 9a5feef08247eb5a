"""A policy heeds the window in the positions that its spans will take there, gaps between deep concepts included."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from compllm_rag.prompt import TextSpan
from compllm_rag.reading.budget import ReadBudget, extent_of
from compllm_rag.reading.budgeted import BudgetedReadPolicy
from compllm_rag.reading.choice import Candidate, Part, Reading, ReadSpec, Used
from compllm_rag.reading.passages import PassageReading
from tests.reading.read_samples import QUESTION, library, retrieved


@pytest.mark.parametrize("codec", ["deep", "input"])
@pytest.mark.parametrize("text", [True, False])
def test_what_is_chosen_takes_no_more_of_the_window_than_there_is(codec: str, text: bool) -> None:
    of = library(codec, also=(2.0, 4.0) if codec == "deep" else (2.0,))
    reading = PassageReading(of, BudgetedReadPolicy(text=text), ReadBudget(positions=90))

    def read(window: int | None) -> tuple[int, int]:
        made = [one for one in reading.read(QUESTION, retrieved(), 30, window=window).passages if one.spans]
        spans = [span for one in made for span in one.spans]
        return 5 * len(made) + sum(s.extent for s in spans), 5 * len(made) + sum(map(len, spans))

    extent, positions = read(None)
    assert extent > positions or codec == "input" or text
    sizes = []
    for window in (extent, extent - 1, extent - 30, extent - 60):
        took, positions = read(window)
        assert took <= window and 0 < positions <= 90
        sizes.append(positions)
    assert read(extent) == read(None) and read(10_000) == read(None)


@dataclass(frozen=True)
class _Given:
    """Reads the first passage as it is told, sentence by sentence, and nothing of the others."""

    used: tuple[Used, ...]
    name: str = "given"

    def choose(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Reading]:
        first, *others = nodes
        uses = (*self.used, *("left out",) * (len(first.sentences) - len(self.used)))
        parts = tuple(Part(s.start, s.end, u, 4.0) for s, u in zip(first.sentences, uses, strict=True))
        counts = [spec.n_concepts(first, p.start, p.end, 4.0) if p.used == "concepts" else 0 for p in parts]
        triples = [(p.used, p.end - p.start, k) for p, k in zip(parts, counts, strict=True)]
        spec.told["extent"] = extent_of(triples, deep=spec.meter.deep)
        return [Reading(parts), *(Reading.whole(node, "left out") for node in others)]


@pytest.mark.parametrize("codec", ["deep", "input"])
def test_the_extent_of_parts_is_that_of_their_spans(codec: str) -> None:
    of = library(codec, also=(4.0,))
    for used in itertools.product(("text", "concepts", "left out"), repeat=3):
        made = PassageReading(of, _Given(used), ReadBudget()).read(QUESTION, retrieved(), 30)
        assert made.told["extent"] == sum(span.extent for span in made.passages[0].spans), used


def test_text_alone_takes_its_tokens() -> None:
    assert extent_of([("text", 7, 0), ("left out", 90, 0), ("text", 5, 0)], deep=True) == len(TextSpan((0,) * 12))
