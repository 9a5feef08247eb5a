"""Options that vanish: whatever nothing heeds is refused by name, and so are values of another kind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document
from llama_index.core.schema import TextNode

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.errors import CompLLMError, ConfigurationError
from toy_embedder import HashEmbedder

TEXT = "The ferry to Orsa leaves at nine."


def made(compressor: Compressor, path: Path | None = None, **options: Any) -> ConceptIndex:
    given: dict[str, Any] = {"compressor": compressor, "embedder": HashEmbedder(), "chunk_size": 60, **options}
    index = ConceptIndex.create(path, **given)
    index.ingest([Document(id_="a", text=TEXT)])
    return index


WRITING: dict[str, Callable[[ConceptIndex, dict[str, Any]], object]] = {
    "insert": lambda index, options: index.insert(Document(id_="b", text=TEXT), **options),
    "insert_nodes": lambda index, options: index.insert_nodes([TextNode(text=TEXT)], **options),
    "update_ref_doc": lambda index, options: index.update_ref_doc(Document(id_="a", text="New."), **options),
    "update_ref_doc, insert_kwargs": lambda index, options: index.update_ref_doc(
        Document(id_="a", text="New."), insert_kwargs=options
    ),
    "update_ref_doc, delete_kwargs": lambda index, options: index.update_ref_doc(
        Document(id_="a", text="New."), delete_kwargs=options
    ),
    "refresh_ref_docs": lambda index, options: index.refresh_ref_docs([Document(id_="b", text=TEXT)], **options),
    "delete_ref_doc": lambda index, options: index.delete_ref_doc("a", **options),
    "delete_nodes": lambda index, options: index.delete_nodes(index.faiss.node_ids("a"), **options),
    "ainsert": lambda index, options: asyncio.run(index.ainsert(Document(id_="b", text=TEXT), **options)),
    "adelete_ref_doc": lambda index, options: asyncio.run(index.adelete_ref_doc("a", **options)),
    "vector store, add": lambda index, options: index.faiss.add([], **options),
    "vector store, delete": lambda index, options: index.faiss.delete("a", **options),
}


@pytest.mark.parametrize("way", WRITING)
def test_writing_refuses_unknown_options_and_changes_nothing(compressor: Compressor, way: str) -> None:
    index = made(compressor)
    with pytest.raises(ConfigurationError, match="batchsize"):
        WRITING[way](index, {"batchsize": 3})
    assert [node.get_content() for node in index.faiss.get_nodes()] == [TEXT]


def test_options_of_llamaindex_documentation_are_heeded(compressor: Compressor) -> None:
    index = made(compressor)
    given = {"delete_kwargs": {"delete_from_docstore": True}}
    index.update_ref_doc(Document(id_="a", text="New."), update_kwargs=given)
    index.update_ref_doc(Document(id_="a", text="Newer."), **given)
    assert index.refresh_ref_docs([Document(id_="a", text="Newest.")], update_kwargs=given) == [True]
    index.insert(Document(id_="b", text="b"), show_progress=False)
    index.delete_ref_doc("b", delete_from_docstore=True)
    assert [node.get_content() for node in index.faiss.get_nodes()] == ["Newest."]


def test_deleting_what_is_not_there_is_said(compressor: Compressor, caplog: pytest.LogCaptureFixture) -> None:
    index = made(compressor)
    with caplog.at_level(logging.WARNING):
        index.delete_ref_doc("a")
        assert not caplog.records
        index.delete_ref_doc("a")
    assert "no document 'a'" in caplog.text
    unknown: Any = None
    with pytest.raises(ConfigurationError, match="no id of a document"):
        index.delete_ref_doc(unknown)


@pytest.mark.parametrize(
    "options",
    [
        {"similarity_top_k": "two"},
        {"similarity_top_k": None},
        {"similarity_top_k": 1.5},
        {"similarity_top_k": True},
        {"similarity_top_k": 0},
        {"filters": "x"},
        {"filters": {"key": "value"}},
        {"vector_store_query_mode": "nonsense"},
        {"similarity_topk": 1},
    ],
)
def test_retrievers_refuse_values_that_make_no_sense(compressor: Compressor, options: dict[str, Any]) -> None:
    index = made(compressor)
    ways: list[Callable[..., object]] = [index.as_retriever, index.as_query_engine]
    if None not in options.values():  # which is the default there
        ways.append(index.as_chat_engine)
    for way in ways:
        with pytest.raises(ConfigurationError):
            way(**options)
    if not {"vector_store_query_mode", "similarity_topk"} & {*options}:
        others: list[Callable[..., object]] = [index.as_bm25_retriever, index.as_hybrid_retriever]
        for way in others:
            with pytest.raises(ConfigurationError):
                way(**options)


def test_one_id_need_not_stand_in_a_list(compressor: Compressor) -> None:
    index = made(compressor)
    index.ingest([Document(id_="long-id", text=TEXT), Document(id_="l", text=TEXT)])
    (node_id,) = index.faiss.node_ids("long-id")
    ways: list[Callable[..., Any]] = [index.as_retriever, index.as_bm25_retriever, index.as_hybrid_retriever]
    for way in ways:
        for options in ({"doc_ids": "long-id"}, {"node_ids": node_id}):
            assert [hit.node.node_id for hit in way(**options).retrieve("ferry")] == [node_id], (way, options)


@pytest.mark.parametrize(
    "options",
    [
        {"node_postprocessors": "x"},
        {"node_postprocessors": [print]},
        {"system_prompt": 3},
        {"chat_history": "x"},
        {"chat_history": [{"role": "user", "content": "x"}]},
        {"prefix_messages": "x"},
    ],
)
def test_engines_refuse_values_of_another_kind(compressor: Compressor, options: dict[str, Any]) -> None:
    index = made(compressor)
    ways: list[Callable[..., object]] = [index.as_chat_engine] if "node_postprocessors" not in options else [
        index.as_chat_engine, index.as_query_engine,
    ]  # fmt: skip
    for way in ways:
        with pytest.raises(ConfigurationError):
            way(**options)


@pytest.mark.parametrize("question", [None, 5, b"bytes", ["a", "list"]])
def test_a_question_is_text(compressor: Compressor, question: Any) -> None:
    index = made(compressor)
    for retriever in (index.as_retriever(), index.as_bm25_retriever(), index.as_hybrid_retriever()):
        with pytest.raises(ConfigurationError, match="question"):
            retriever.retrieve(question)
        with pytest.raises(ConfigurationError, match="question"):
            asyncio.run(retriever.aretrieve(question))
    with pytest.raises(ConfigurationError, match="question"):
        index.as_query_engine().query(question)
    with pytest.raises(ConfigurationError, match="question"):
        asyncio.run(index.as_query_engine().aquery(question))
    with pytest.raises(ConfigurationError, match="question"):
        index.as_chat_engine().chat(question)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"device_map": "auto"},
        {"device": "cpu"},
        {"generation": 3},
        {"compressor": 3},
        {"namespace": 3},
        {"insert_batch_size": "x"},
        {"callback_manager": 3},
        {"storge": 1},
    ],
)
def test_opening_heeds_an_option_or_refuses_it(compressor: Compressor, tmp_path: Path, options: dict[str, Any]) -> None:
    made(compressor, tmp_path / "s").close()
    given: dict[str, Any] = {"compressor": compressor, "embedder": HashEmbedder(), **options}
    with pytest.raises(ConfigurationError):
        ConceptIndex.load(tmp_path / "s", **given)
    with pytest.raises(ConfigurationError):
        ConceptIndex.create(tmp_path / "t", **given)


def test_a_storage_has_its_own_compressor(compressor: Compressor, tmp_path: Path) -> None:
    made(compressor, tmp_path / "s").close()
    name: Any = "somewhere/else"
    with pytest.raises(ConfigurationError, match="its own compressor"):
        ConceptIndex.load(tmp_path / "s", compressor=name, embedder=HashEmbedder())


@pytest.mark.parametrize("folder", ["nul\0", "half\ud835", "", 3, "x" * 300, "file/below"])
def test_paths_that_can_be_no_storage(compressor: Compressor, tmp_path: Path, folder: Any) -> None:
    (tmp_path / "file").write_text("x")
    where = f"{tmp_path}/{folder}" if isinstance(folder, str) and folder else folder
    options: dict[str, Any] = {"compressor": compressor, "embedder": HashEmbedder()}
    for way in (ConceptIndex.create, ConceptIndex.load):
        with pytest.raises(CompLLMError) as caught:
            way(where, **options)
        str(caught.value).encode()  # can be printed


def test_a_storage_may_be_named_in_bytes(compressor: Compressor, tmp_path: Path) -> None:
    where: Any = bytes(tmp_path / "caf") + b"\xe9"
    made(compressor, where).close()
    with ConceptIndex.load(where, compressor=compressor, embedder=HashEmbedder()) as index:
        assert index.faiss.n_nodes == 1


@pytest.mark.parametrize("documents", [None, 3, "text", ["text"], [None]])
def test_what_is_no_document_is_refused_whichever_the_way(compressor: Compressor, documents: Any) -> None:
    index = made(compressor)
    for way in (index.ingest, index.upload, index.refresh_ref_docs):
        with pytest.raises(ConfigurationError, match="no document"):
            way(documents)
