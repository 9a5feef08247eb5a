"""From readings to spans: what is read is what was decided, bit for bit what the store holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from compllm_rag.errors import ConfigurationError, MissingConceptsError, ReadBudgetError
from compllm_rag.prompt import ConceptSpan, TextSpan
from compllm_rag.reading.budget import ReadBudget
from compllm_rag.reading.choice import Candidate, FixedReadPolicy, Part, Reading, ReadSpec
from compllm_rag.reading.passages import PassageReading
from tests.reading.read_samples import PARTS, QUESTION, library, read, retrieved


@dataclass
class Given:
    """A policy that decides the same for every passage: sentences in turn as these."""

    uses: Sequence[tuple[str, float | None]]
    name: str = "given"

    def choose(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Reading]:
        out = []
        for node in nodes:
            turns = [self.uses[i % len(self.uses)] for i in range(len(node.sentences))]
            parts = [Part(s.start, s.end, used, rate) for s, (used, rate) in zip(node.sentences, turns, strict=True)]  # type: ignore[arg-type]
            out.append(Reading(tuple(parts)))
        return out


@pytest.mark.parametrize("codec", ["deep", "input"])
@pytest.mark.parametrize("rate", [1.0, 2.0])
def test_a_whole_passage_is_what_the_library_fetches(codec: str, rate: float) -> None:
    of = library(codec, rate=rate)
    for policy in (FixedReadPolicy(), Given([("concepts", None)]), Given([("concepts", rate)])):
        for passage, text in zip(read(of, policy)[0], PARTS, strict=True):
            [span], fetched = passage.spans, of.fetch(text)
            assert isinstance(span, ConceptSpan) and torch.equal(span.concepts, fetched.concepts)
            assert span.extent == fetched.span(0).extent
            if codec == "deep":
                assert torch.equal(span.places, fetched.places)
                assert list(span.ids) == [of.passage(text).ids[place] for place in span.places.tolist()]
                assert fetched.span(0).ids == span.ids
            assert passage.hits == len(of.passage(text).keys) and not passage.misses
    for passage, text in zip(read(of, FixedReadPolicy("text"))[0], PARTS, strict=True):
        assert passage.spans == [TextSpan(of.passage(text).ids, passage.spans[0].passage)]


@pytest.mark.parametrize("rate", [1.0, 2.0])
def test_deep_concepts_of_sentences_keep_their_places(rate: float) -> None:
    of = library("deep", rate=rate)
    for passage, text in zip(read(of, Given([("left out", None), ("concepts", None)]))[0], PARTS, strict=True):
        [span], fetched = passage.spans, of.fetch(text)
        kept = [p for p in passage.reading.parts if p.used == "concepts"]
        within = torch.zeros(len(fetched.places), dtype=torch.bool)
        for part in kept:
            within |= (fetched.places >= part.start) & (fetched.places < part.end)
        assert isinstance(span, ConceptSpan) and 0 < len(span) < len(fetched.concepts)
        assert torch.equal(span.concepts, fetched.concepts[within])
        assert torch.equal(span.places, fetched.places[within])
        assert span.extent == len(of.passage(text).ids)
        assert list(span.ids) == [of.passage(text).ids[place] for place in span.places.tolist()]


def test_concepts_at_the_input_embeddings_are_read_by_whole_segments() -> None:
    of = library("input", rate=2.0)
    for passage, text in zip(read(of, Given([("left out", None), ("concepts", None)]))[0], PARTS, strict=True):
        [span], cut = passage.spans, of.passage(text)
        ends = [sum(map(len, cut.segments[: i + 1])) for i in range(len(cut.segments))]
        rows = torch.split(of.fetch(text).concepts, list(cut.n_concepts))
        read_parts = [p for p in passage.reading.parts if p.used == "concepts"]
        kept = [row for row, end in zip(rows, ends, strict=True) if any(p.start < end <= p.end for p in read_parts)]
        assert torch.equal(span.concepts, torch.cat(kept)) and span.places is None


def test_text_concepts_and_several_rates_mix_within_a_passage() -> None:
    of = library("deep", also=(2.0,))
    made, taken = read(of, Given([("text", None), ("concepts", 1.0), ("concepts", 2.0)]), {"prefill": 10_000})
    passage, parts = made[0], made[0].reading.parts
    assert [type(span) for span in passage.spans] == [TextSpan, ConceptSpan]
    text, concepts = passage.spans
    assert text.ids == of.passage(PARTS[0]).ids[: parts[0].end]
    full, half = of.fetch(PARTS[0], rate=1), of.fetch(PARTS[0], rate=2)
    second, third = parts[1], parts[2]
    rows = [
        full.concepts[(full.places >= second.start) & (full.places < second.end)],
        half.concepts[(half.places >= third.start) & (half.places < third.end)],
    ]
    assert torch.equal(concepts.concepts, torch.cat(rows))
    assert list(concepts.ids) == [of.passage(PARTS[0]).ids[second.start + at] for at in concepts.places.tolist()]
    assert int(concepts.places[0]) == 0 and concepts.extent == third.end - second.start
    tokens = sum(len(s) for p in made for s in p.spans if isinstance(s, TextSpan)) + 5 * len(made)
    n = sum(len(s) for p in made for s in p.spans if isinstance(s, ConceptSpan))
    assert taken == {"prefill_budget": tokens + n / 2}


@pytest.mark.parametrize(
    ("uses", "said"),
    [
        ([("concepts", 7.0)], "concepts are not in the store"),
        ([("shouted", None)], "'shouted' for n0"),
    ],
)
def test_what_cannot_be_read_is_refused(uses: Any, said: str) -> None:
    with pytest.raises((ConfigurationError, MissingConceptsError), match=said):
        read(library(), Given(uses))


def test_readings_must_cover_their_passages() -> None:
    class Short(Given):
        def choose(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Reading]:
            return [Reading(r.parts[1:]) for r in super().choose(query, nodes, spec)]

    class Few(Given):
        def choose(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Reading]:
            return super().choose(query, nodes, spec)[1:]

    class Cut(Given):
        def choose(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Reading]:
            [first, *rest] = super().choose(query, nodes, spec)
            end = first.parts[-1].end
            return [Reading((Part(0, 3, "concepts"), Part(3, end, "concepts"))), *rest]

    for policy, said in ((Short, "parts .* of the"), (Few, "2 readings of 3 passages")):
        with pytest.raises(ConfigurationError, match=said):
            read(library(), policy([("text", None)]))
    with pytest.raises(ConfigurationError, match="cut through a segment"):
        read(library("input"), Cut([("concepts", None)]))
    assert len(read(library(), Cut([("concepts", None)]))[0]) == 3  # deep concepts stand for single tokens


def test_a_policy_that_spends_more_than_there_is_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="given chose more than the budget.*at most 20"):
        read(library(), Given([("text", None)]), {"positions": 20})


def test_the_fixed_choice_leaves_out_what_does_not_fit() -> None:
    of = library()
    sizes = [len(of.passage(text).ids) + 5 for text in PARTS]
    order = [retrieved()[i] for i in (0, 2, 1)]
    assert sizes[2] > sizes[1]
    budget = ReadBudget(positions=sizes[0] + sizes[1])
    found = PassageReading(of, FixedReadPolicy(), budget).read(QUESTION, order, 30)
    made, taken = found.passages, found.taken
    assert [p.reading.left_out for p in made] == [False, True, False]
    assert "does not fit the budget" in made[1].reading.why and made[1].spans == []
    assert taken == {"position_budget": sizes[0] + sizes[1]}
    with pytest.raises(ReadBudgetError, match=f"position_budget of at least {sizes[0]}:") as caught:
        read(of, FixedReadPolicy(), {"positions": 10})
    assert "position_budget=10" in str(caught.value)
    least = int(str(caught.value).split("at least ")[1].split(":")[0])
    assert not read(of, FixedReadPolicy(), {"positions": least})[0][0].reading.left_out


@pytest.mark.parametrize("missing", ["text", "error", "recompress", "auto"])
def test_missing_concepts(missing: Any) -> None:
    of = library(fill=False)
    of.ensure(PARTS[:1])
    if missing == "error":
        with pytest.raises(MissingConceptsError):
            read(of, FixedReadPolicy(), missing=missing)
        return
    first, second, _ = read(of, FixedReadPolicy(), missing=missing)[0]
    assert isinstance(first.spans[0], ConceptSpan) and not first.bypassed
    as_text = missing in ("text", "auto")  # at rate 1 nothing is sooner than reading the text
    assert isinstance(second.spans[0], TextSpan) == as_text
    assert (second.hits, second.misses) == (0, 1)
    assert second.bypassed == (missing == "auto")
    assert ("not stored" in second.reading.why) == as_text


def test_concepts_in_the_making_are_not_waited_for() -> None:
    reading = PassageReading(library(), FixedReadPolicy(), ReadBudget())
    made = reading.read(QUESTION, retrieved(), 30, queued={"n1"}).passages
    assert [type(p.spans[0]) for p in made] == [ConceptSpan, TextSpan, ConceptSpan]
    assert made[1].reading.why == "its concepts are in the making"


def test_empty_passages_are_left_out() -> None:
    nodes = [replace(retrieved()[0], text=""), retrieved()[1]]
    made = PassageReading(library(), FixedReadPolicy(), ReadBudget(positions=500)).read("?", nodes, 3).passages
    assert [(p.reading.left_out, p.reading.why) for p in made] == [(True, "it has no text"), (False, "")]
