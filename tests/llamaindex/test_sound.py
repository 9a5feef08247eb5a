"""Documents and nodes at every way in: half characters, NUL, and metadata that JSON cannot say."""

from __future__ import annotations

import datetime
import enum
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_index.core import Document
from llama_index.core.schema import (
    ImageDocument,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeRelationship,
    RelatedNodeInfo,
    TextNode,
)

from compllm_rag import Compressor, ConceptIndex, FaissTextVectorStore
from compllm_rag.errors import CompLLMError, ConfigurationError
from compllm_rag.llamaindex.metadata import plain_metadata
from compllm_rag.unicode_text import is_whole, whole
from toy_embedder import HashEmbedder

HALF = "Let \ud835 be a set."
MENDED = "Let \ufffd be a set."


def made(compressor: Compressor, path: Path | None = None) -> ConceptIndex:
    index = ConceptIndex.create(path, compressor=compressor, embedder=HashEmbedder(), chunk_size=60)
    index.ingest([Document(id_="a", text="The ferry to Orsa leaves at nine.")])
    return index


def add_node(index: ConceptIndex, node: Any) -> None:
    node.embedding = index.embedder.get_text_embedding("x")
    index.faiss.add([node])
    index.commit()


WAYS = {
    "ingest": lambda index, document: index.ingest([document]),
    "insert": lambda index, document: index.insert(document),
    "refresh": lambda index, document: index.refresh_ref_docs([document]),
    "update": lambda index, document: index.update_ref_doc(document),
    "upload": lambda index, document: (index.upload([document]), index.uploads.wait(60)),
    "nodes": lambda index, document: index.insert_nodes([document]),
    "vector store": add_node,
}


@pytest.mark.parametrize("text", ["plain", "caf\u00e9 \U0001f600", "nul \0 inside", ""])
def test_whole_text_stays_the_very_one(text: str) -> None:
    assert whole(text) is text


def test_halves_are_joined_or_replaced() -> None:
    assert whole("\ud835\udc65 and \ud835 and \udc65") == "\U0001d465 and \ufffd and \ufffd"
    assert not is_whole("\udc80")


@pytest.mark.parametrize("way", WAYS)
def test_half_characters_are_replaced_whichever_the_way(compressor: Compressor, way: str) -> None:
    index = made(compressor)
    WAYS[way](index, Document(id_="b", text=HALF, metadata={"title\udfff": HALF, "deep": {"k": [HALF]}}))
    (node,) = [node for node in index.faiss.iter_nodes() if node.node_id == "b" or node.ref_doc_id == "b"]
    assert node.get_content(MetadataMode.NONE) == MENDED
    assert node.metadata == {"title\ufffd": MENDED, "deep": {"k": [MENDED]}}
    # What the LLM reads is what the catalog holds.
    assert index.library.passage(HALF) == index.library.passage(MENDED)
    answer = index.as_query_engine(similarity_top_k=9).query("Is it a set?")
    if way != "vector store":  # the one way that makes no concepts
        assert answer.metadata["compllm"]["store"]["misses"] == 0
    index.close()


@pytest.mark.parametrize("way", WAYS)
def test_half_a_character_in_an_id_is_refused(compressor: Compressor, way: str) -> None:
    index = made(compressor)
    with pytest.raises(ConfigurationError, match=r"half a character.*\\ud835"):
        WAYS[way](index, Document(id_="b\ud835", text="fine"))
    assert [node.ref_doc_id for node in index.faiss.iter_nodes()] == ["a"]
    index.close()


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_id_is_refused(compressor: Compressor, way: str) -> None:
    index = made(compressor)
    with pytest.raises(ConfigurationError, match="id of a document is empty"):
        WAYS[way](index, Document(id_="", text="fine"))
    assert [node.ref_doc_id for node in index.faiss.iter_nodes()] == ["a"]
    index.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), b"bytes", {"deep": [float("nan")]}])
def test_what_cannot_be_kept_is_refused_by_document_and_key(compressor: Compressor, way: str, value: object) -> None:
    index = made(compressor)
    with pytest.raises(ConfigurationError, match=r"'b'.*price"):
        WAYS[way](index, Document(id_="b", text="fine", metadata={"price": value}))
    assert [node.ref_doc_id for node in index.faiss.iter_nodes()] == ["a"]
    index.close()


@pytest.mark.parametrize("way", WAYS)
def test_nul_is_a_character_like_any_other(compressor: Compressor, way: str, tmp_path: Path) -> None:
    index = made(compressor, tmp_path / "s")
    WAYS[way](index, Document(id_="b\0b", text="nul \0 inside", metadata={"k\0": "v\0"}))
    index.close()
    with ConceptIndex.load(tmp_path / "s", compressor=compressor, embedder=HashEmbedder()) as index:
        node = list(index.faiss.iter_nodes())[-1]
        assert (node.get_content(MetadataMode.NONE), node.metadata) == ("nul \0 inside", {"k\0": "v\0"})
        assert index.as_query_engine(similarity_top_k=9).query("What is \0 inside?").source_nodes


class Colour(enum.Enum):
    RED = "red"


KEPT = [
    ({"n": np.int64(3), "x": np.float32(0.5), "b": np.bool_(True), "s": np.str_("t")},
     {"n": 3, "x": 0.5, "b": True, "s": "t"}),
    ({"d": datetime.date(2026, 1, 2), "t": datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.UTC)},
     {"d": "2026-01-02", "t": "2026-01-02T03:00:00+00:00"}),
    ({"m": np.datetime64("2026-01-02T03:04:05.123456789")}, {"m": "2026-01-02T03:04:05.123456789"}),
    ({"p": Path("/a/b"), "u": uuid.UUID(int=1), "c": Colour.RED},
     {"p": "/a/b", "u": "00000000-0000-0000-0000-000000000001", "c": "red"}),
    ({"s": {"b", "a"}, "t": (1, 2.5), "e": frozenset()}, {"s": ["a", "b"], "t": [1, 2.5], "e": []}),
    ({"deep": {1: {"k": [None, True, 2**70]}}}, {"deep": {"1": {"k": [None, True, 2**70]}}}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "kept"), KEPT)
def test_plain_values_come_of_others(given: dict[str, Any], kept: dict[str, Any]) -> None:
    found = plain_metadata(given, "document 'd'")
    assert found == kept
    assert repr(found) == repr(kept)  # types, too
    assert plain_metadata(kept, "document 'd'") is kept


def circle() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


@pytest.mark.parametrize(
    "value",
    [Decimal("1.5"), object(), torch.zeros(2), np.zeros(2), np.datetime64("NaT"), np.complex64(1), {1, "a"}, circle(),
     {None: 1}, {1: "a", "1": "b"}],
)  # fmt: skip
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(ConfigurationError, match="document 'd'.*key"):
        plain_metadata({"key": value}, "document 'd'")


def test_an_update_that_cannot_be_kept_leaves_the_former(compressor: Compressor) -> None:
    index = made(compressor)
    with pytest.raises(ConfigurationError):
        index.update_ref_doc(Document(id_="a", text="Newer.", metadata={"x": float("nan")}))
    assert [node.text for node in index.faiss.iter_nodes()] == ["The ferry to Orsa leaves at nine."]


def test_an_ingest_with_dates_and_numbers_is_incremental(compressor: Compressor, tmp_path: Path) -> None:
    document = lambda: Document(id_="b", text="fine", metadata={"n": np.int64(3), "t": (1, 2), "p": Path("x")})  # noqa: E731
    with made(compressor, tmp_path / "s") as index:
        assert index.ingest([document()]).documents_changed == 1
    with ConceptIndex.load(tmp_path / "s", compressor=compressor, embedder=HashEmbedder()) as index:
        assert index.ingest([document()]).documents_changed == 0
        assert index.faiss.get_nodes(index.faiss.node_ids("b"))[0].metadata == {"n": 3, "t": [1, 2], "p": "x"}


def test_the_callers_document_is_left_alone(compressor: Compressor) -> None:
    document = Document(id_="b", text=HALF, metadata={"k": (1, HALF)})
    made(compressor).ingest([document])
    assert (document.text, document.metadata) == (HALF, {"k": (1, HALF)})


@pytest.mark.parametrize("given", ["a text", ["a text"], [None], [TextNode(text="node")], [{"text": "x"}]])
def test_what_is_no_document_is_refused(compressor: Compressor, given: Any) -> None:
    index = made(compressor)
    for way in (index.ingest, index.upload, index.refresh_ref_docs):
        with pytest.raises(ConfigurationError, match="no document"):
            way(given)
    with pytest.raises(ConfigurationError, match="no document"):
        index.insert(given)
    index.close()


def test_a_single_document_or_node_is_taken(compressor: Compressor) -> None:
    index = made(compressor)
    index.ingest(Document(id_="b", text="One alone."))
    index.upload(Document(id_="c", text="Another."))
    assert index.refresh_ref_docs(Document(id_="d", text="A third.")) == [True]
    index.insert_nodes(TextNode(id_="n", text="A node."))
    assert {node.node_id for node in index.faiss.iter_nodes()} >= {"n"}
    assert set(index.faiss.chunks_by_document()) == {"a", "b", "c", "d", "n"}
    index.delete_nodes("n")
    index.faiss.delete_nodes(index.faiss.node_ids("d")[0])
    index.commit()
    assert set(index.faiss.chunks_by_document()) == {"a", "b", "c"}
    index.close()


def test_half_characters_in_questions(compressor: Compressor) -> None:
    index = made(compressor)
    engine = index.as_query_engine()
    assert str(engine.query(HALF)) == str(engine.query(MENDED))
    assert index.as_retriever().retrieve(HALF)[0].node.ref_doc_id == "a"


@pytest.mark.parametrize("question", ["", "  \n"])
async def test_an_empty_question_is_one_clear_line(compressor: Compressor, question: str) -> None:
    index = made(compressor)
    engine = index.as_query_engine()
    for ask in (engine.query, index.as_retriever().retrieve):
        with pytest.raises(ConfigurationError, match="question is empty"):
            ask(question)
    for aask in (engine.aquery, index.as_retriever().aretrieve):
        with pytest.raises(ConfigurationError, match="question is empty"):
            await aask(question)


def kinds() -> list[Node | TextNode]:
    relations = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="doc"),
                 NodeRelationship.NEXT: RelatedNodeInfo(node_id="other", metadata={"k": 1}),
                 NodeRelationship.CHILD: [RelatedNodeInfo(node_id="c1"), RelatedNodeInfo(node_id="c2")]}  # fmt: skip
    return [
        TextNode(id_="text", text="A text node.", relationships=relations),
        TextNode(id_="alone", text="A node of no document."),
        IndexNode(id_="index", text="A table of prices.", index_id="prices"),
        IndexNode(id_="held", text="A node that holds one.", index_id="h", obj=TextNode(text="inner")),
        ImageNode(id_="image", text="A photo of a boat.", image="aGVsbG8=", relationships=relations),
        Document(id_="document", text="A document as node.", metadata={"k": 1}),
        ImageDocument(id_="picture", text="A picture.", image="aGVsbG8="),
        Node(id_="node", text_resource=MediaResource(text="A bare node."),
             image_resource=MediaResource(data=b"hello", mimetype="image/png")),
    ]  # fmt: skip


@pytest.mark.parametrize("reopened", [False, True])
def test_every_kind_of_node_is_found_whole_beside_the_others(
    compressor: Compressor, tmp_path: Path, reopened: bool
) -> None:
    index = made(compressor, tmp_path / "s")
    for node in kinds():
        index.insert_nodes([node])
    if reopened:
        index.close()
        index = ConceptIndex.load(tmp_path / "s", compressor=compressor, embedder=HashEmbedder())
    ids = [node.node_id for node in kinds()]

    def found() -> dict[str, Any]:
        hits = index.as_retriever(similarity_top_k=20).retrieve("Where is the ferry to the node?")
        return {hit.node.ref_doc_id if hit.node.ref_doc_id == "a" else hit.node.node_id: hit.node for hit in hits}

    assert len(found()) == len(ids) + 1  # "held" is found as what it holds
    nodes = {node.node_id: node for node in index.faiss.iter_nodes()}
    assert set(nodes) >= set(ids)
    for given in kinds():
        kept = nodes[given.node_id]
        assert type(kept) is type(given)
        assert kept.get_content(MetadataMode.NONE) == given.get_content(MetadataMode.NONE)
        assert kept.relationships == given.relationships
        assert getattr(kept, "image", None) == getattr(given, "image", None)
    assert nodes["node"].image_resource.data == kinds()[-1].image_resource.data
    assert nodes["held"].obj.text == "inner"
    for n, node_id in enumerate(ids):
        index.delete_nodes([node_id])
        assert len(found()) == len(ids) - n
    assert index.docstore.docs == {}
    index.close()


def test_a_node_that_is_replaced_is_found_as_it_is_now(compressor: Compressor) -> None:
    index = made(compressor)
    index.insert_nodes([ImageNode(id_="photo", text="A boat.", image="aGVsbG8=")])
    newer = ImageNode(id_="photo", text="A tower.", image="aGVsbG8=")
    add_node(index, newer)
    hits = index.as_retriever(similarity_top_k=5).retrieve("tower")
    assert [hit.node.text for hit in hits if hit.node.node_id == "photo"] == ["A tower."]


def test_node_ids_of_ones_own_limit_a_search(compressor: Compressor) -> None:
    index = made(compressor)
    index.insert_nodes([TextNode(id_="n1", text="one"), TextNode(id_="n2", text="two")])
    hits = index.as_retriever(node_ids=["n1"], similarity_top_k=5).retrieve("two")
    assert [hit.node.node_id for hit in hits] == ["n1"]
    with pytest.raises(ConfigurationError, match="similarty_top_k"):
        index.as_retriever(similarty_top_k=5)


def test_an_object_that_cannot_be_written_stays_with_the_process(compressor: Compressor) -> None:
    index = made(compressor)
    inner = index.as_retriever(similarity_top_k=1)
    index.insert_nodes([IndexNode(id_="sub", text="the sub index", index_id="sub", obj=inner)])
    hits = index.as_retriever(similarity_top_k=5).retrieve("ferry")
    assert hits
    with pytest.raises(CompLLMError):
        store = FaissTextVectorStore(dim=64)
        store.add([IndexNode(id_="s", text="t", index_id="s", obj=object(), embedding=[1.0] * 64)])
