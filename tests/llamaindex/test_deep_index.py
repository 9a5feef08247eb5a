"""ConceptIndex with deep concepts: ingestion, answers, updates, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llama_index.core import Document
from llama_index.core.schema import MetadataMode, QueryBundle

import toy
from compllm_rag import Compressor, ConceptIndex, GenerationConfig, LocalGenerator, MemoryStore
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import untrained_deep
from compllm_rag.errors import (
    ConfigurationError,
    FingerprintMismatchError,
    MissingConceptsError,
    PromptTooLongError,
    RateOutOfReachError,
    StorageMismatchError,
)
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex import storage_parts
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import ConceptSpan, TextSpan
from compllm_rag.storage.manifest import read_manifest
from tests.faults.fault_samples import check_whole, documents
from toy_embedder import HashEmbedder
from trained import rising_losses, trained_deep

QUESTION = "Who built the lighthouse on Gull Rock?"
SHORT = GenerationConfig(max_new_tokens=8)


@pytest.fixture(scope="module")
def deep() -> DeepCompressor:
    return trained_deep(toy.llm(layers=4))


def open_index(path: Path | None, compressor: Any, **options: Any) -> ConceptIndex:
    return ConceptIndex.create(
        path, compressor=compressor, embedder=HashEmbedder(), **{"chunk_size": 60, "generation": SHORT, **options}
    )


def ask(index: ConceptIndex, **options: Any) -> tuple[str, dict[str, Any]]:
    response = index.as_query_engine(similarity_top_k=3, **options).query(QUESTION)
    return str(response), response.metadata["compllm"]


def test_a_storage_answers_the_same_after_it_is_opened_again(tmp_path: Path, deep: DeepCompressor) -> None:
    with open_index(tmp_path / "s", deep) as index:
        report = index.ingest(documents())
        before, account = ask(index)
        stats = index.stats()
        check_whole(index)
        assert index.config.rate == 1.0
        assert report.segments == stats["chunks"]  # a chunk is a unit
        assert (stats["achieved_rate"], stats["entry_layer"], stats["prefill_cost"]) == (1.0, 2, 0.5)
        assert stats["concepts"] == stats["source_tokens"]
    assert {facts["used"] for facts in account["nodes"].values()} == {"concepts"}
    assert account["store"]["misses"] == 0
    assert 0.5 < account["prefill_cost"] < 1.0
    manifest = read_manifest(tmp_path / "s")
    assert (manifest.entry_layer, manifest.hidden_size, manifest.width) == (2, 32, 33)
    with ConceptIndex.load(
        tmp_path / "s", compressor=deep, embedder=HashEmbedder(), read_only=True, generation=SHORT
    ) as index:
        after, again = ask(index)
        assert (after, again["nodes"]) == (before, account["nodes"])
        assert index.stats() == stats


async def test_asked_streamed_and_asynchronous_it_says_the_same(deep: DeepCompressor) -> None:
    index = open_index(None, deep)
    index.ingest(documents())
    plain, _ = ask(index)
    engine = index.as_query_engine(similarity_top_k=3)
    assert str(await engine.aquery(QUESTION)) == plain
    streaming = index.as_query_engine(similarity_top_k=3, streaming=True)
    assert "".join(streaming.query(QUESTION).response_gen) == plain
    response = await streaming.aquery(QUESTION)
    assert "".join([piece async for piece in response.async_response_gen()]) == plain
    response = streaming.query(QUESTION)
    next(response.response_gen)
    response.response_gen.close()
    assert response.metadata["compllm"]["finish_reason"] == "cancelled"
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_every_architecture_answers_and_reads_text_as_the_bare_llm_does(architecture: str) -> None:
    index = open_index(None, trained_deep(toy.llm(architecture, layers=4)), rate=2.0)
    index.ingest(documents())
    answer, account = ask(index)
    assert account["finish_reason"] in ("stop", "length")
    assert account["new_tokens"] > 0 or account["finish_reason"] == "stop"
    assert {facts["used"] for facts in account["nodes"].values()} == {"concepts"}
    text, account = ask(index, mode="text")
    assert account["prefill_cost"] == 1.0
    engine = index.as_query_engine(similarity_top_k=3, mode="text")
    planned = engine._response_synthesizer._planner.plan(QUESTION, engine.retrieve(QueryBundle(QUESTION)), 2000)
    assert all(isinstance(span, TextSpan) for span in planned.plan.spans)
    [bare] = LocalGenerator(toy.llm(architecture, layers=4), SHORT).generate([planned.plan])
    assert text == bare.text
    assert isinstance(answer, str)


def test_what_was_stored_is_what_the_compressor_makes(deep: DeepCompressor) -> None:
    index = open_index(None, deep, rate=2.0)
    index.ingest(documents())
    for node in index.faiss.iter_nodes():
        passage = index.library.passage(node.text)
        fetched = index.library.fetch(node.text, missing="error")
        rows = torch.cat(deep.compress(passage.segments, passage.n_concepts))
        torch.testing.assert_close(fetched.concepts.float(), rows[:, :-1], atol=4e-3, rtol=2e-3)
        assert fetched.places.tolist() == rows[:, -1].long().tolist()  # one unit a chunk
        assert fetched.n_tokens == len(passage.ids)
        assert fetched.places.tolist() == sorted(set(fetched.places.tolist()))
        assert 0 <= int(fetched.places[0]) <= int(fetched.places[-1]) < len(passage.ids)


def test_a_chunk_longer_than_a_unit_is_made_of_several(tmp_path: Path) -> None:
    compressor = trained_deep(toy.llm(layers=4), unit_length=40)
    with open_index(tmp_path / "s", compressor, rate=2.0, chunk_size=150) as index:
        index.ingest([Document(id_="d", text=toy.TEXT)])
        longest = max((index.library.passage(node.text) for node in index.faiss.iter_nodes()), key=lambda p: len(p.ids))
        assert len(longest.segments) > 2
        assert max(map(len, longest.segments)) <= 40
        fetched = next(
            index.library.fetch(node.text, missing="error")
            for node in index.faiss.iter_nodes()
            if index.library.passage(node.text) is longest
        )
        starts = [sum(map(len, longest.segments[:i])) for i in range(len(longest.segments))]
        kept = compressor.kept_places(longest.segments, longest.n_concepts)
        assert fetched.places.tolist() == [s + p for s, own in zip(starts, kept, strict=True) for p in own]
        assert ask(index)[1]["store"]["misses"] == 0
        check_whole(index)


def test_only_what_changed_is_compressed_again(tmp_path: Path, deep: DeepCompressor) -> None:
    docs = documents()
    with open_index(tmp_path / "s", deep) as index:
        first = index.ingest(docs)
        again = index.ingest(docs)
        assert (again.documents_changed, again.segments_compressed) == (0, 0)
        docs[4] = Document(id_="d4", text=docs[4].text + " It was painted white in 1902.")
        changed = index.ingest(docs)
        assert 1 <= changed.segments_compressed <= 2 < first.segments_compressed
        index.delete_ref_doc("d1", delete_from_docstore=True)
        assert index.faiss.node_ids("d1") == []
        assert index.refresh_ref_docs(docs) == [False, True, False, False, False, False]
        index.insert(Document(id_="new", text="A tower of brick stands in the marsh."))
        check_whole(index)
        assert index.stats()["documents"] == 7


@pytest.mark.parametrize("missing", ["recompress", "text", "error"])
def test_missing_concepts_by_policy(deep: DeepCompressor, missing: str) -> None:
    index = open_index(None, deep, rate=2.0)
    index.ingest(documents())
    kept, _ = ask(index)
    index.library.store = MemoryStore(deep.spec.width)
    engine = index.as_query_engine(similarity_top_k=3, missing=missing)
    if missing == "error":
        with pytest.raises(MissingConceptsError, match="not in the store"):
            engine.query(QUESTION)
        return
    response = engine.query(QUESTION)
    account = response.metadata["compllm"]
    assert account["store"]["misses"] > 0
    assert {facts["used"] for facts in account["nodes"].values()} == {"text" if missing == "text" else "concepts"}
    if missing == "recompress":
        assert str(response) == kept
        assert ask(index)[1]["store"]["misses"] == 0
    else:
        assert str(response) == ask(index, mode="text")[0]


def test_text_and_deep_concepts_mix_in_one_prompt(deep: DeepCompressor) -> None:
    index = open_index(None, deep, rate=2.0)
    index.ingest(documents())
    names = list(ask(index)[1]["nodes"])
    chosen = lambda node: "text" if node.node.node_id == names[1] else "concepts"  # noqa: E731
    engine = index.as_query_engine(similarity_top_k=3, choose=chosen)
    account = engine.query(QUESTION).metadata["compllm"]
    assert [account["nodes"][name]["used"] for name in names] == ["concepts", "text", "concepts"]
    plan = engine._response_synthesizer._planner.plan(QUESTION, engine.retrieve(QueryBundle(QUESTION)), 2000).plan
    kinds = {span.passage: type(span) for span in plan.spans if span.passage is not None}
    assert kinds == {0: ConceptSpan, 1: TextSpan, 2: ConceptSpan}
    assert plan.deep
    assert plan.positions == account["prompt_positions"] < plan.extent


def test_another_rate_is_a_miss_and_both_lie_in_one_storage(tmp_path: Path, deep: DeepCompressor) -> None:
    with open_index(tmp_path / "s", deep) as index:
        index.ingest(documents())
        texts = [node.get_content(MetadataMode.NONE) for node in index.faiss.iter_nodes()]
        sparse = ConceptLibrary(deep, index.store, rate=3.0)
        with pytest.raises(MissingConceptsError):
            sparse.fetch(texts[0], missing="error")
        before, records = ask(index)[0], index.store.stats().records
        assert sparse.ensure(texts).compressed > 0
        assert index.store.stats().records > records
        index.store.flush()
        for text in texts:
            full, few = index.library.fetch(text, missing="error"), sparse.fetch(text, missing="error")
            assert set(few.places.tolist()) < set(full.places.tolist())
            assert torch.allclose(few.concepts.float(), full.concepts[few.places].float(), atol=1e-2, rtol=1e-2)
        assert ask(index)[0] == before


def test_what_does_not_fit_by_its_extent_is_dropped_and_said() -> None:
    def index_of(window: int, **options: Any) -> ConceptIndex:
        made = open_index(None, untrained_deep(toy.llm(layers=4, window=window)), rate=4.0, **options)
        made.ingest(documents())
        return made

    roomy = index_of(2048)
    engine = roomy.as_query_engine(similarity_top_k=3)
    plan = engine._response_synthesizer._planner.plan(QUESTION, engine.retrieve(QueryBundle(QUESTION)), 2000).plan
    window = plan.extent + SHORT.max_new_tokens
    assert plan.positions + 20 < plan.extent
    assert ask(index_of(window))[1]["dropped"] == []
    small = index_of(window - 1)
    _, account = ask(small)
    assert len(account["dropped"]) == 1
    assert len(account["nodes"]) == 2
    with pytest.raises(PromptTooLongError, match="passages"):
        ask(small, overflow="error")


def test_namespaces_share_nothing(tmp_path: Path, deep: DeepCompressor) -> None:
    for name in ("a", "b"):
        with open_index(tmp_path / "s", deep, namespace=name) as index:
            assert index.ingest(documents(2)).segments_compressed > 0
            check_whole(index)
    with ConceptIndex.load(tmp_path / "s", namespace="b", compressor=deep, embedder=HashEmbedder()) as index:
        assert ask(index)[1]["store"]["misses"] == 0


def test_the_codec_and_the_entry_layer_of_a_storage_are_its_own(tmp_path: Path, toy_folder: Path) -> None:
    options = {"llm": str(toy_folder), "embedder": HashEmbedder(), "reader": None, "compressor": None}
    with ConceptIndex.create(tmp_path / "deep", **options) as index:
        index.ingest(documents(1))
        assert (index.manifest.entry_layer, index.config.rate) == (1, 1.0)
        answer = ask(index)[0]
    with ConceptIndex.create(tmp_path / "input", codec="input", **options) as index:
        index.ingest(documents(1))
        assert (index.manifest.entry_layer, index.config.rate) == (0, 2.0)
    for name, wrong in (("deep", {"codec": "input"}), ("deep", {"entry_layer": 5}), ("input", {"codec": "deep"})):
        for opening in (ConceptIndex.create, ConceptIndex.load):
            with pytest.raises(StorageMismatchError, match="another (codec|entry layer).*Next step"):
                opening(tmp_path / name, embedder=HashEmbedder(), **wrong)
    for opening in (ConceptIndex.create, ConceptIndex.load):
        with opening(tmp_path / "deep", embedder=HashEmbedder(), codec="deep", entry_layer=1) as index:
            assert ask(index)[0] == answer
    for wrong in ({"entry_layer": 2}, {"entry_layer": -1}, {"codec": "input", "entry_layer": 1}, {"codec": "shallow"}):
        with pytest.raises(ConfigurationError):
            ConceptIndex.create(tmp_path / "new", **options, **wrong)
        assert not (tmp_path / "new" / "catalog.db").exists()


def test_a_compressor_of_another_kind_does_not_open_it(tmp_path: Path, deep: DeepCompressor) -> None:
    with open_index(tmp_path / "s", deep) as index:
        index.ingest(documents(2))
        before = ask(index)[0]
    llm = toy.llm(layers=4)
    for other in (Compressor(llm), untrained_deep(llm), trained_deep(llm, entry_layer=1), trained_deep(llm, seed=2)):
        with pytest.raises(FingerprintMismatchError, match="another compressor"):
            open_index(tmp_path / "s", other)
    with pytest.raises(FingerprintMismatchError, match="width 32"):
        ConceptLibrary(deep, MemoryStore(32))
    with pytest.raises(FingerprintMismatchError, match="width 33"):
        ConceptLibrary(Compressor(llm), MemoryStore(33))
    with pytest.raises(RateOutOfReachError):
        open_index(tmp_path / "far", deep, rate=100.0)
    with open_index(tmp_path / "s", deep) as index:
        assert ask(index)[0] == before


def test_whoever_only_reads_loads_no_compressor(
    tmp_path: Path, toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained_deep(TargetLLM.from_pretrained(toy_folder), entry_layer=1)
    made.losses = rising_losses(made, gain=2.0)
    with open_index(tmp_path / "s", made) as index:
        index.ingest(documents())
        before = ask(index)[0]
    loaded: list[Any] = []
    load = storage_parts.load_compressor
    monkeypatch.setattr(storage_parts, "load_compressor", lambda *args: loaded.append(args) or load(*args))
    with ConceptIndex.load(tmp_path / "s", embedder=HashEmbedder(), generation=SHORT) as index:
        # The LoRA that reads is there from the start.
        assert ask(index)[0] == before
        told = ask(index, prefill_budget=60)[1]["read_policy"]
        assert told["kept"]["by"] == "predicted losses" and not loaded
        index.insert(Document(id_="new", text="A tower of brick stands in the marsh."))
        assert len(loaded) == 1
        assert index.compressor.fingerprint == made.fingerprint
        assert ask(index, mode="text")[0]
