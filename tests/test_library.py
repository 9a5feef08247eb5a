"""Passages find their concepts again, each segment is compressed once, and what is missing is never made up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.rate_policies.choosing import RateChooser
from compllm_rag.compression.rates import FixedRate
from compllm_rag.errors import (
    ConfigurationError,
    FingerprintMismatchError,
    MissingConceptsError,
    RateNotHeldError,
    RateOutOfReachError,
    StoreReadOnlyError,
)
from compllm_rag.fingerprint import record_key
from compllm_rag.library import ConceptLibrary
from compllm_rag.models.llm import TargetLLM
from compllm_rag.store.memory import MemoryStore
from trained import trained, trained_deep

PARAGRAPHS = toy.TEXT.strip().split("\n\n")


class Counting:
    """A compressor that remembers what it was asked for."""

    def __init__(self, compressor: Compressor) -> None:
        self.asked: list[tuple[int, ...]] = []
        self._compressor = compressor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compressor, name)

    def compress(self, segments: Sequence[Sequence[int]], n_concepts: Sequence[int]) -> list[torch.Tensor]:
        self.asked.extend(map(tuple, segments))
        return self._compressor.compress(segments, n_concepts)


class ReadOnlyStore(MemoryStore):
    """A store opened for reading."""

    def __init__(self, source: MemoryStore) -> None:
        super().__init__(source.hidden_size)
        self._records, self.read_only = source._records, True

    def put(self, records: Any) -> int:
        raise StoreReadOnlyError("store was opened for reading")


@pytest.fixture
def counting(llm: TargetLLM) -> Counting:
    return Counting(trained(llm))


@pytest.fixture
def library(counting: Counting) -> ConceptLibrary:
    return ConceptLibrary(counting, MemoryStore(32))  # type: ignore[arg-type]


def test_each_unique_segment_is_compressed_once(library: ConceptLibrary, counting: Counting) -> None:
    texts = [*PARAGRAPHS, PARAGRAPHS[0], PARAGRAPHS[1] + "\n\n" + PARAGRAPHS[0]]
    report = library.ensure(texts)
    passages = [library.passage(text) for text in texts]
    unique = {key for passage in passages for key in passage.keys}
    assert len(counting.asked) == len(set(counting.asked)) == len(unique) == report.compressed
    assert report.segments == sum(len(passage.segments) for passage in passages)
    assert report.reused == report.segments - report.compressed > 0
    assert report.source_tokens == sum(len(passage.ids) for passage in passages)
    assert report.concepts == sum(sum(passage.n_concepts) for passage in passages)
    assert report.seconds > 0
    assert library.store.stats().records == len(unique)


def test_a_second_time_compresses_nothing(library: ConceptLibrary, counting: Counting) -> None:
    first = library.ensure(PARAGRAPHS)
    counting.asked.clear()
    second = library.ensure(PARAGRAPHS)
    assert counting.asked == []
    assert (second.compressed, second.reused) == (0, first.segments)
    assert (second.source_tokens, second.concepts) == (first.source_tokens, first.concepts)


def test_an_edit_compresses_the_edits_segments_only(library: ConceptLibrary, counting: Counting) -> None:
    library.ensure(PARAGRAPHS)
    counting.asked.clear()
    library.ensure([PARAGRAPHS[0] + "\n\nA new end.", *PARAGRAPHS[1:]])
    assert 1 <= len(counting.asked) <= 3


def test_texts_are_taken_as_a_stream(library: ConceptLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compllm_rag.library._WRITE_EVERY", 8)
    stored_while_reading = []

    def texts() -> Iterator[str]:
        for i in range(12):
            stored_while_reading.append(library.store.stats().records)
            yield f"Sentence number {i} stands alone here. And so does number {i * i + 100}.\n\n" * 2

    report = library.ensure(texts())
    assert stored_while_reading[-1] > 0
    assert stored_while_reading == sorted(stored_while_reading)
    assert library.store.stats().records == report.compressed


def test_nothing_to_ensure(library: ConceptLibrary) -> None:
    report = library.ensure([])
    assert (report.segments, report.compressed, report.reused, report.source_tokens, report.concepts) == (0,) * 5
    assert library.ensure(["", ""]).segments == 0


def test_a_passage_comes_back_as_its_segments_concepts_in_order(library: ConceptLibrary, llm: TargetLLM) -> None:
    library.ensure(PARAGRAPHS)
    compressor = trained(llm)
    for text in PARAGRAPHS:
        fetched = library.fetch(text, missing="error")
        passage = library.passage(text)
        assert (fetched.hits, fetched.misses, fetched.compress_s) == (len(passage.keys), 0, 0.0)
        assert fetched.concepts is not None
        assert fetched.concepts.shape == (sum(passage.n_concepts), 32)
        expected = torch.cat(compressor.compress(passage.segments, passage.n_concepts)).half()
        torch.testing.assert_close(fetched.concepts, expected, atol=2e-3, rtol=2e-3)


def test_a_passage_is_its_tokens_cut_up_and_keyed(library: ConceptLibrary, llm: TargetLLM) -> None:
    passage = library.passage(toy.TEXT)
    assert list(passage.ids) == llm.tokenizer(toy.TEXT, add_special_tokens=False)["input_ids"]
    assert tuple(i for segment in passage.segments for i in segment) == passage.ids
    assert passage.n_concepts == tuple(-(-len(segment) // 2) for segment in passage.segments)
    for key, k, segment in zip(passage.keys, passage.n_concepts, passage.segments, strict=True):
        assert key == record_key("default", library.compressor.fingerprint, k, segment)
    assert library.passage(toy.TEXT) is passage


def test_remembered_passages_are_bounded(library: ConceptLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compllm_rag.passage_cuts._REMEMBERED", 3)
    for i in range(10):
        library.passage(f"passage {i}")
    assert list(library.cuts._known) == ["passage 7", "passage 8", "passage 9"]


# What is missing


def test_further_rates_are_bounded(library: ConceptLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of a server may ask for any rate."""
    monkeypatch.setattr("compllm_rag.library._RATES", 3)
    first = library.at_rate(2.5)
    for step in range(3):
        assert library.at_rate(2.5) is first  # what is asked for again stays
        library.at_rate(3.0 + step / 10)
    assert library.at_rate(2.5) is first and len(library._at) == 3


def test_missing_concepts_are_made_now_and_not_written(library: ConceptLibrary, counting: Counting) -> None:
    library.ensure(PARAGRAPHS[:1])
    text = PARAGRAPHS[0] + "\n\n" + PARAGRAPHS[1]
    new = set(library.passage(text).keys) - set(library.passage(PARAGRAPHS[0]).keys)
    counting.asked.clear()
    fetched = library.fetch(text)
    assert fetched.misses == len(new) == len(counting.asked) > 0
    assert fetched.hits == len(library.passage(text).keys) - len(new) > 0
    assert fetched.compress_s > 0
    again = library.fetch(text, missing="error")
    assert fetched.concepts is not None
    assert again.concepts is not None
    # In memory, and not among what is stored: nothing refers to it.
    assert library.store.stats().records == len(set(library.passage(PARAGRAPHS[0]).keys))
    # The same answer now as from memory.
    assert fetched.concepts.dtype == again.concepts.dtype == torch.float16
    assert torch.equal(fetched.concepts, again.concepts)


def test_a_segment_that_is_missing_twice_is_compressed_once(library: ConceptLibrary, counting: Counting) -> None:
    text = "\n\n".join([PARAGRAPHS[0], "Between.", PARAGRAPHS[0], "Between.", PARAGRAPHS[0]])
    passage = library.passage(text)
    assert len(set(passage.keys)) < len(passage.keys)
    fetched = library.fetch(text)
    assert len(counting.asked) == len(set(passage.keys))
    assert fetched.concepts is not None
    assert fetched.concepts.shape[0] == sum(passage.n_concepts)
    assert torch.equal(fetched.concepts, library.fetch(text, missing="error").concepts)


def test_missing_concepts_can_be_left_to_the_text(library: ConceptLibrary, counting: Counting) -> None:
    fetched = library.fetch(PARAGRAPHS[0], missing="text")
    assert fetched.concepts is None
    assert (fetched.hits, fetched.misses) == (0, len(library.passage(PARAGRAPHS[0]).keys))
    assert counting.asked == []
    assert library.store.stats().records == 0


def test_missing_concepts_can_be_an_error(library: ConceptLibrary, counting: Counting) -> None:
    with pytest.raises(MissingConceptsError, match="segments missing in 'The lighthouse"):
        library.fetch(PARAGRAPHS[0], missing="error")
    assert counting.asked == []


def test_an_unknown_policy_is_refused(library: ConceptLibrary) -> None:
    with pytest.raises(ConfigurationError, match="ignore"):
        library.fetch(PARAGRAPHS[0], missing="ignore")  # type: ignore[arg-type]


def test_a_store_that_is_only_read_is_not_written(library: ConceptLibrary, counting: Counting) -> None:
    library.ensure(PARAGRAPHS[:1])
    assert isinstance(library.store, MemoryStore)
    reader = ConceptLibrary(counting, ReadOnlyStore(library.store))  # type: ignore[arg-type]
    before = library.store.stats().records
    fetched = reader.fetch(PARAGRAPHS[1])
    assert fetched.concepts is not None
    assert fetched.misses > 0
    assert library.store.stats().records == before
    assert torch.equal(fetched.concepts, library.fetch(PARAGRAPHS[1]).concepts)
    assert reader.fetch(PARAGRAPHS[0], missing="error").misses == 0


def test_an_empty_passage_has_no_concepts_and_misses_none(library: ConceptLibrary) -> None:
    fetched = library.fetch("", missing="error")
    assert fetched.concepts is not None
    assert fetched.concepts.shape == (0, 32)
    assert (fetched.hits, fetched.misses) == (0, 0)


# Keys


def test_another_rate_is_a_miss(library: ConceptLibrary) -> None:
    library.ensure(PARAGRAPHS)
    coarser = ConceptLibrary(library.compressor, library.store, rate=4.0)
    with pytest.raises(MissingConceptsError):
        coarser.fetch(PARAGRAPHS[0], missing="error")
    fine, coarse = library.fetch(PARAGRAPHS[0]).concepts, coarser.fetch(PARAGRAPHS[0]).concepts
    assert fine is not None
    assert coarse is not None
    assert coarse.shape[0] < fine.shape[0]


def test_namespaces_do_not_see_each_other(library: ConceptLibrary, counting: Counting) -> None:
    library.ensure(PARAGRAPHS)
    other = ConceptLibrary(counting, library.store, namespace="other")  # type: ignore[arg-type]
    with pytest.raises(MissingConceptsError):
        other.fetch(PARAGRAPHS[0], missing="error")
    counting.asked.clear()
    report = other.ensure(PARAGRAPHS)
    assert report.reused == report.segments - len(set(counting.asked))
    assert library.store.stats().records == 2 * report.compressed


def test_another_compressor_is_a_miss(library: ConceptLibrary, llm: TargetLLM) -> None:
    library.ensure(PARAGRAPHS)
    other = ConceptLibrary(trained(llm, seed=1), library.store)
    assert other.fetch(PARAGRAPHS[0], missing="text").concepts is None


def test_a_policy_of_ones_own_decides_k(library: ConceptLibrary) -> None:
    class One:
        def n_concepts(self, segments: Sequence[Sequence[int]]) -> list[int]:
            return [1] * len(segments)

    made = ConceptLibrary(library.compressor, library.store, rate=One())
    fetched = made.fetch(PARAGRAPHS[0])
    assert fetched.concepts is not None
    assert fetched.concepts.shape[0] == len(made.passage(PARAGRAPHS[0]).segments)


def test_a_store_of_another_width_is_refused(compressor: Compressor) -> None:
    with pytest.raises(FingerprintMismatchError, match=r"width 48.*width 32"):
        ConceptLibrary(compressor, MemoryStore(48))


def test_a_rate_out_of_reach_is_refused(compressor: Compressor) -> None:
    with pytest.raises(RateOutOfReachError):
        ConceptLibrary(compressor, MemoryStore(32), rate=9)


@pytest.mark.parametrize("codec", ["input", "deep", "marked"])
def test_several_rates_are_kept_side_by_side_and_fetched_by_name(codec: str, llm: TargetLLM) -> None:
    compressor = trained(llm) if codec == "input" else trained_deep(toy.llm(layers=4), marked=codec == "marked")
    store = MemoryStore(compressor.spec.width)
    library = ConceptLibrary(compressor, store, rate=1, also_rates=(2, 4))
    report = library.ensure(PARAGRAPHS)
    assert report.compressed == report.segments  # a unit counts once, at however many rates
    assert store.stats().records == 3 * report.segments
    assert library.ensure(PARAGRAPHS).compressed == 0
    for text in PARAGRAPHS:
        assert library.rates_held(text) == (1.0, 2.0, 4.0)
        default, whole = library.fetch(text, missing="error"), library.fetch(text, missing="error", rate=1)
        assert torch.equal(default.concepts, whole.concepts)
        for rate in (1, 2, 4.0):
            alone = ConceptLibrary(compressor, MemoryStore(compressor.spec.width), rate=rate)
            alone.ensure([text])
            mine, its = library.fetch(text, missing="error", rate=rate), alone.fetch(text, missing="error")
            assert library.passage(text, rate=rate).keys == alone.passage(text).keys
            torch.testing.assert_close(mine.concepts, its.concepts, atol=2e-3, rtol=2e-3)
            assert (mine.places is None) if codec == "input" else torch.equal(mine.places, its.places)
        keys = [library.passage(text, rate=rate).keys for rate in (1, 2, 4)]
        assert library.passage(text).all_keys == keys[0] + keys[1] + keys[2]


def test_a_deep_unit_passes_the_llm_once_for_all_its_rates() -> None:
    counting = Counting(trained_deep(toy.llm(layers=4)))
    library = ConceptLibrary(counting, MemoryStore(33), rate=1, also_rates=(2, 3))  # type: ignore[arg-type]
    library.ensure(PARAGRAPHS)
    assert len(counting.asked) == len(set(counting.asked)) == len(PARAGRAPHS)


def test_a_marked_unit_is_another_at_each_rate() -> None:
    counting = Counting(trained_deep(toy.llm(layers=4), marked=True))
    library = ConceptLibrary(counting, MemoryStore(33), rate=1, also_rates=(2, 3))  # type: ignore[arg-type]
    library.ensure(PARAGRAPHS)
    assert len(counting.asked) == 3 * len(set(counting.asked)) == 3 * len(PARAGRAPHS)


def test_a_rate_that_is_not_held_is_refused_by_name(library: ConceptLibrary, llm: TargetLLM) -> None:
    with pytest.raises(RateNotHeldError, match="got 4, expected 2"):
        library.passage(PARAGRAPHS[0], rate=4)
    with pytest.raises(RateNotHeldError, match="rates_held"):
        library.fetch(PARAGRAPHS[0], rate=4)
    with pytest.raises(ConfigurationError, match="named twice"):
        ConceptLibrary(trained(llm), MemoryStore(32), rate=2, also_rates=(2.0,))
    with pytest.raises(ConfigurationError, match="further rates itself"):
        ConceptLibrary(trained(llm), MemoryStore(32), rate=RateChooser(FixedRate(2, 20)), also_rates=(4,))
    with pytest.raises(RateOutOfReachError):
        ConceptLibrary(trained(llm), MemoryStore(32), rate=2, also_rates=(8,))
