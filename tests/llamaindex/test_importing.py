"""A persisted stock index becomes a storage: text, vectors and hashes as they were, concepts beside them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, StorageContext, SummaryIndex, VectorStoreIndex, load_index_from_storage
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import NodeRelationship
from typer.testing import CliRunner

import toy
from compllm_rag import Compressor, ConceptIndex, import_index
from compllm_rag.cli.main import app
from compllm_rag.errors import (
    ConfigurationError,
    DataFileError,
    EmbedderMismatchError,
    EmptyCorpusError,
    StorageNotFoundError,
)
from compllm_rag.llamaindex import importing
from compllm_rag.storage.verification import verify_storage
from tests.llamaindex.test_index import documents
from toy_embedder import HashEmbedder, save_sentence_transformer

QUESTION = "Who built the lighthouse on Gull Rock?"


class Counting(HashEmbedder):
    """Counts the texts it embeds."""

    texts: list[str] = []

    def _get_text_embedding(self, text: str) -> list[float]:
        self.texts.append(text)
        return super()._get_text_embedding(text)


def stock(folder: Path, docs: list[Document] | None = None, embedder: Any = None) -> VectorStoreIndex:
    index = VectorStoreIndex.from_documents(
        documents(4) if docs is None else docs,
        embed_model=embedder or HashEmbedder(),
        transformations=[SentenceSplitter(chunk_size=55, chunk_overlap=5)],
    )
    index.storage_context.persist(str(folder))
    return index


def bring(folder: Path, storage: Path, compressor: Compressor, **options: Any) -> importing.ImportReport:
    options.setdefault("embedder", HashEmbedder())
    return import_index(folder, storage, compressor=compressor, **options)


def opened(storage: Path, compressor: Compressor, **options: Any) -> ConceptIndex:
    options.setdefault("embedder", HashEmbedder())
    return ConceptIndex.load(storage, compressor=compressor, **options)


def test_everything_is_taken_over_and_nothing_is_embedded(compressor: Compressor, tmp_path: Path) -> None:
    index, embedder = stock(tmp_path / "p"), Counting()
    told: list[str] = []
    report = bring(
        tmp_path / "p",
        tmp_path / "s",
        compressor,
        embedder=embedder,
        progress=lambda message, share: told.append(message),
    )
    stored = index.storage_context.docstore.docs
    assert report.nodes == report.nodes_added == len(stored) and report.documents == 4
    assert report.chunks_queued == report.chunks_failed == 0 and report.cosine == pytest.approx(1)
    assert {"reading the index", "taking text and vectors over"} <= set(told)
    own = [text for text in embedder.texts if text != "dimension"]
    assert len(own) == 3  # those that were compared
    with opened(tmp_path / "s", compressor, embedder=Counting(), read_only=True) as ours:
        want = index.as_retriever(similarity_top_k=5).retrieve(QUESTION)
        assert {n.node.node_id for n in ours.as_retriever(similarity_top_k=99).retrieve(QUESTION)} == set(stored)
        for node in ours.faiss.get_nodes():
            was = stored[node.node_id]
            assert (node.get_content(), node.metadata) == (was.get_content(), was.metadata)
            assert node.relationships == was.relationships and node.hash == was.hash
            assert (node.start_char_idx, node.end_char_idx) == (was.start_char_idx, was.end_char_idx)
        assert any(NodeRelationship.NEXT in node.relationships for node in ours.faiss.get_nodes())
        scores = [n.score for n in ours.as_retriever(similarity_top_k=5).retrieve(QUESTION)]
        assert scores == pytest.approx([n.score for n in want], abs=1e-5)
        answer = ours.as_query_engine(similarity_top_k=3).query(QUESTION)
        assert answer.metadata["compllm"]["store"]["misses"] == 0
        assert {facts["used"] for facts in answer.metadata["compllm"]["nodes"].values()} == {"concepts"}
    assert verify_storage(tmp_path / "s", deep=True).findings == []


def test_documents_of_the_same_text_keep_a_hash_each(compressor: Compressor, tmp_path: Path) -> None:
    twins = [Document(id_=id_, text=toy.TEXT) for id_ in ("a", "b")]
    stock(tmp_path / "p", twins)
    bring(tmp_path / "p", tmp_path / "s", compressor)
    with opened(tmp_path / "s", compressor) as index:
        assert index.refresh_ref_docs(twins) == [False, False]


def test_documents_go_on_as_they_were(compressor: Compressor, tmp_path: Path) -> None:
    stock(tmp_path / "p")
    bring(tmp_path / "p", tmp_path / "s", compressor)
    with opened(tmp_path / "s", compressor) as index:
        changed = documents(4)
        changed[2].set_content("The lamp was sold.")
        assert index.refresh_ref_docs(changed) == [False, False, True, False]
        index.delete_ref_doc("d0")
        assert {n.ref_doc_id for n in index.faiss.get_nodes()} == {"d1", "d2", "d3"}
        # `ingest` leaves documents of the same hash alone as well.
        assert index.ingest(changed[1:]).documents_changed == 0
    assert verify_storage(tmp_path / "s", deep=True).sound


def test_an_index_that_was_loaded_again_imports_alike(compressor: Compressor, tmp_path: Path) -> None:
    stock(tmp_path / "p")
    again = load_index_from_storage(
        StorageContext.from_defaults(persist_dir=str(tmp_path / "p")), embed_model=HashEmbedder()
    )
    again.delete_ref_doc("d3", delete_from_docstore=True)
    again.storage_context.persist(str(tmp_path / "q"))
    assert bring(tmp_path / "q", tmp_path / "s", compressor).documents == 3


def test_concepts_may_come_later(compressor: Compressor, tmp_path: Path) -> None:
    stock(tmp_path / "p")
    report = bring(tmp_path / "p", tmp_path / "s", compressor, later=True)
    assert report.chunks_queued == report.nodes
    with opened(tmp_path / "s", compressor, read_only=True) as index:
        used = index.as_query_engine().query(QUESTION).metadata["compllm"]["nodes"].values()
        assert {facts["used"] for facts in used} == {"text"}
    with opened(tmp_path / "s", compressor) as index:  # goes on in the background
        assert index.uploads.wait()
        assert index.as_query_engine().query(QUESTION).metadata["compllm"]["store"]["misses"] == 0


def test_an_interrupted_import_goes_on(compressor: Compressor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock(tmp_path / "p")

    def interrupted(*arguments: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(importing, "_compress", interrupted)
        bring(tmp_path / "p", tmp_path / "s", compressor)
    report = bring(tmp_path / "p", tmp_path / "s", compressor)
    assert report.nodes_added == report.chunks_queued == 0 < report.nodes
    third = bring(tmp_path / "p", tmp_path / "s", compressor)
    assert third.nodes_added == 0
    assert verify_storage(tmp_path / "s", deep=True).sound


def test_a_second_import_brings_what_changed(compressor: Compressor, tmp_path: Path) -> None:
    stock(tmp_path / "p", documents(2))
    bring(tmp_path / "p", tmp_path / "s", compressor)
    stock(tmp_path / "q", documents(3)[2:])
    report = bring(tmp_path / "q", tmp_path / "s", compressor)
    assert report.nodes_added == report.nodes
    with opened(tmp_path / "s", compressor, read_only=True) as index:
        assert index.stats()["documents"] == 3


class Other(HashEmbedder):
    """As many dimensions, other directions."""

    model_name: str = "other-64"

    def _embed(self, text: str) -> list[float]:
        return super()._embed(text)[::-1]


class Near(HashEmbedder):
    """Nearly the same."""

    def _embed(self, text: str) -> list[float]:
        vector = super()._embed(text)
        return [vector[0] + 0.6, *vector[1:]]


def test_another_embedder_is_refused_before_anything_is_made(compressor: Compressor, tmp_path: Path) -> None:
    stock(tmp_path / "p")
    for wrong, message in ((Other(), "cosine.*--embedder"), (HashEmbedder(dim=32), "got vectors of 64 .*expected 32")):
        with pytest.raises(EmbedderMismatchError, match=message):
            bring(tmp_path / "p", tmp_path / "s", compressor, embedder=wrong)
    assert not (tmp_path / "s").exists()


def test_an_embedder_that_is_nearly_the_same_is_warned_of(
    compressor: Compressor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stock(tmp_path / "p")
    with caplog.at_level(logging.WARNING):
        report = bring(tmp_path / "p", tmp_path / "s", compressor, embedder=Near())
    assert 0.9 < (report.cosine or 0) < 0.999 and "differ a little" in caplog.text


def test_what_is_no_index_is_refused(compressor: Compressor, tmp_path: Path) -> None:
    with pytest.raises(StorageNotFoundError, match="docstore.json.*from_vector_store"):
        bring(tmp_path / "nothing", tmp_path / "s", compressor)
    SummaryIndex.from_documents(documents(1)).storage_context.persist(str(tmp_path / "summary"))
    with pytest.raises(ConfigurationError, match="got IndexList, expected a VectorStoreIndex"):
        bring(tmp_path / "summary", tmp_path / "s", compressor)
    stock(tmp_path / "empty", [])
    with pytest.raises(EmptyCorpusError, match="no nodes"):
        bring(tmp_path / "empty", tmp_path / "s", compressor)
    for name, content in (
        ("docstore.json", b"{"),
        ("docstore.json", b'{"docstore/data": 3}'),
        ("index_store.json", b"\xff\xfe"),
        ("default__vector_store.json", b"IxF2\x00binary"),
        ("default__vector_store.json", b"[]"),
    ):
        stock(tmp_path / "p")
        (tmp_path / "p" / name).write_bytes(content)
        with pytest.raises(DataFileError, match=name):
            bring(tmp_path / "p", tmp_path / "s", compressor)
    assert not (tmp_path / "s").exists()


def test_text_without_vector_is_not_left_out_silently(compressor: Compressor, tmp_path: Path) -> None:
    stock(tmp_path / "p")
    file = tmp_path / "p" / "default__vector_store.json"
    held = json.loads(file.read_text())
    held["embedding_dict"].pop(next(iter(held["embedding_dict"])))
    file.write_text(json.dumps(held))
    with pytest.raises(DataFileError, match="without vector"):
        bring(tmp_path / "p", tmp_path / "s", compressor)


def test_one_of_several_indexes(compressor: Compressor, tmp_path: Path) -> None:
    context = StorageContext.from_defaults()
    for name, docs in (("one", documents(1)), ("two", documents(3)[1:])):
        index = VectorStoreIndex.from_documents(docs, embed_model=HashEmbedder(), storage_context=context)
        index.set_index_id(name)
    context.persist(str(tmp_path / "p"))
    with pytest.raises(ConfigurationError, match="several.*one.*two.*index_id="):
        bring(tmp_path / "p", tmp_path / "s", compressor)
    with pytest.raises(ConfigurationError, match="got three"):
        bring(tmp_path / "p", tmp_path / "s", compressor, index_id="three")
    assert bring(tmp_path / "p", tmp_path / "s", compressor, index_id="two").documents == 2


def test_the_command(toy_folder: Path, tmp_path: Path) -> None:
    from compllm_rag import load_embedder

    folder = save_sentence_transformer(tmp_path / "e", toy.TEXT)
    embedder, _, _ = load_embedder(str(folder))
    stock(tmp_path / "p", embedder=embedder)
    words = ["import-index", tmp_path / "p", "--storage", tmp_path / "s", "--llm", toy_folder, "--embedder", folder]
    result = CliRunner().invoke(app, [str(word) for word in [*words, "--json"]])
    assert result.exit_code == 0, (result.stderr, result.exception)
    fields = json.loads(result.stdout)
    assert fields["nodes"] == fields["nodes_added"] and fields["cosine"] == pytest.approx(1, abs=1e-5)
    again = CliRunner().invoke(app, [str(word) for word in words])
    assert again.exit_code == 0 and "(0 new)" in again.stdout
    asked = ["query", QUESTION, "--storage", tmp_path / "s", "--json", "--max-new-tokens", "1"]
    answer = CliRunner().invoke(app, [str(word) for word in asked])
    assert answer.exit_code == 0 and json.loads(answer.stdout)["store"]["misses"] == 0
    wrong = CliRunner().invoke(app, ["import-index", str(tmp_path), "--storage", str(tmp_path / "x")])
    assert wrong.exit_code == 2 and "\nerror: no index that LlamaIndex persisted lies here" in wrong.stderr
