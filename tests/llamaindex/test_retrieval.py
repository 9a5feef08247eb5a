"""Search by words and by both: retrievers, query engines, and what they refuse."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.answer import answer
from compllm_rag.llamaindex.retrievers import HybridRetriever
from tests.llamaindex.test_index import documents, open_index

QUESTION = "Who was the brother of Ada Marsh?"
FIRST = MetadataFilters(filters=[MetadataFilter(key="title", value="T1")])


@pytest.fixture
def index(compressor: Compressor) -> Iterator[ConceptIndex]:
    with open_index(None, compressor) as made:
        made.ingest(documents(6))
        yield made


class Fixed(BaseRetriever):
    """Gives the nodes it was made with."""

    def __init__(self, ids: str) -> None:
        self.ids = ids
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=TextNode(id_=id_, text="same"), score=9.0) for id_ in self.ids]


def test_words_find_what_the_embedder_does_not_know(index: ConceptIndex) -> None:
    index.insert(Document(id_="part", text="The spare part is XK-4711-B.", metadata={"title": "Parts"}))
    found = index.as_bm25_retriever(similarity_top_k=2).retrieve("xk 4711")
    assert [hit.node.ref_doc_id for hit in found] == ["part"] and found[0].score > 0
    # What the embedder reads is searched: the title as well, as in LlamaIndex's own BM25.
    assert index.as_bm25_retriever().retrieve("parts")[0].node.ref_doc_id == "part"
    index.delete_ref_doc("part")
    assert index.as_bm25_retriever().retrieve("xk 4711") == []


@pytest.mark.parametrize("kind", ["bm25", "hybrid"])
def test_who_searches_beside_an_upload_sees_the_last_commit(tmp_path: Path, compressor: Compressor, kind: str) -> None:
    """Neither a document that is half replaced, nor one that nobody has committed yet, nor a wait for the upload."""
    with open_index(tmp_path / "s", compressor) as index, ThreadPoolExecutor(1) as other:
        index.ingest([Document(id_="part", text="The spare part is XK-4711-B."), *documents(3)])
        make = index.as_bm25_retriever if kind == "bm25" else index.as_hybrid_retriever
        retriever = make(similarity_top_k=100)

        def found(words: str) -> list[str]:
            return [
                hit.node.get_content() for hit in retriever.retrieve(words) if "spare part" in hit.node.get_content()
            ]

        with index.bulk():
            index.delete_ref_doc("part")
            assert found("xk 4711") == []
            assert other.submit(found, "xk 4711").result(30) == ["The spare part is XK-4711-B."]
            index.insert(Document(id_="part", text="The spare part is YQ-1234-C."))
            assert found("yq 1234") == ["The spare part is YQ-1234-C."]
            assert other.submit(found, "yq 1234").result(30) == ["The spare part is XK-4711-B."] * (kind == "hybrid")
        assert other.submit(found, "yq 1234").result(30) == found("yq 1234") == ["The spare part is YQ-1234-C."]


def test_a_document_is_never_seen_half_replaced(tmp_path: Path, compressor: Compressor) -> None:
    with open_index(tmp_path / "s", compressor) as index, ThreadPoolExecutor(1) as other:
        index.ingest([Document(id_="part", text="The spare part is XK-4711-B.")])

        def read() -> list[str]:
            return [node.get_content() for node in index.faiss.document_nodes("part")]

        with index.bulk():
            index.delete_ref_doc("part")
            assert read() == [] and other.submit(read).result(30) == ["The spare part is XK-4711-B."]
            index.insert(Document(id_="part", text="The spare part is YQ-1234-C."))
            assert other.submit(read).result(30) == ["The spare part is XK-4711-B."]
        assert other.submit(read).result(30) == read() == ["The spare part is YQ-1234-C."]
        assert index.faiss.document_nodes("none") == []


@pytest.mark.parametrize("kind", ["bm25", "hybrid"])
def test_limits_are_heeded(index: ConceptIndex, kind: str) -> None:
    make = index.as_bm25_retriever if kind == "bm25" else index.as_hybrid_retriever
    titles = {hit.node.metadata["title"] for hit in make(similarity_top_k=9, filters=FIRST).retrieve("the lighthouse")}
    assert titles == {"T1"}
    only = make(similarity_top_k=9, doc_ids=["d2", "d4"]).retrieve("the lighthouse")
    assert {hit.node.ref_doc_id for hit in only} == {"d2", "d4"}
    assert make(doc_ids=[]).retrieve("the lighthouse") == []
    with pytest.raises(ConfigurationError, match="empty"):
        make().retrieve(" ")


def test_words_are_searched_in_some_nodes_only(index: ConceptIndex) -> None:
    named = index.as_bm25_retriever().retrieve("the")[2].node.node_id
    assert [hit.node.node_id for hit in index.as_bm25_retriever(node_ids=[named]).retrieve("the")] == [named]


def test_ranks_are_fused() -> None:
    joined = HybridRetriever([Fixed("abc"), Fixed("cd")], similarity_top_k=3).retrieve("?")
    # Equal texts are different nodes; LlamaIndex's own fusion would take them for one.
    assert [hit.node.node_id for hit in joined] == ["c", "a", "b"]
    assert joined[0].score == pytest.approx(1 / 62 + 1 / 60)
    weighed = HybridRetriever([Fixed("abc"), Fixed("cd")], weights=[0, 2]).retrieve("?")
    assert [hit.node.node_id for hit in weighed] == ["c", "d"]
    assert weighed[0].score == pytest.approx(2 / 60)


def test_hybrid_finds_what_either_finds(index: ConceptIndex) -> None:
    hybrid = index.as_hybrid_retriever(similarity_top_k=4)
    found = hybrid.retrieve(QUESTION)
    assert [hit.node.node_id for hit in asyncio.run(hybrid.aretrieve(QUESTION))] == [hit.node.node_id for hit in found]
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
    words = index.as_bm25_retriever(similarity_top_k=1).retrieve(QUESTION)[0].node.node_id
    vectors = index.as_retriever(similarity_top_k=1).retrieve(QUESTION)[0].node.node_id
    assert {words, vectors} <= {hit.node.node_id for hit in found}
    assert hybrid.retrievers[0]._similarity_top_k == 20
    assert index.as_hybrid_retriever(candidates=7).retrievers[1].similarity_top_k == 7


@pytest.mark.parametrize("retrieval", ["vector", "bm25", "hybrid"])
def test_query_engines_read_concepts_however_they_were_found(index: ConceptIndex, retrieval: str) -> None:
    engine = index.as_query_engine(retrieval=retrieval, similarity_top_k=2, filters=FIRST)
    response = engine.query(QUESTION)
    account = response.metadata["compllm"]
    assert {hit.node.metadata["title"] for hit in response.source_nodes} == {"T1"}
    assert all(account["nodes"][hit.node.node_id]["used"] == "concepts" for hit in response.source_nodes)
    assert account["store"]["misses"] == 0
    late = asyncio.run(engine.aquery(QUESTION))
    assert str(late) == str(response)


def test_a_retriever_of_ones_own(index: ConceptIndex) -> None:
    mine = index.as_bm25_retriever(similarity_top_k=1)
    response = index.as_query_engine(retriever=mine).query(QUESTION)
    assert [hit.node.node_id for hit in response.source_nodes] == [hit.node.node_id for hit in mine.retrieve(QUESTION)]


def test_answers_name_the_way_of_retrieval(index: ConceptIndex) -> None:
    words = answer(index, QUESTION, top_k=1, retrieval="bm25", filters=FIRST)
    assert [source["title"] for source in words["sources"]] == ["T1"]
    assert answer(index, "xyzzy", retrieval="bm25")["sources"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrieval": "sparse"}, "unknown way of retrieval.*'sparse'.*vector, bm25, hybrid"),
        ({"retrieval": "bm25", "retriever": Fixed("a")}, "exclude each other"),
        ({"retriever": "bm25"}, "this is no retriever"),
        ({"retriever": Fixed("a"), "similarity_top_k": 3}, "would not heed.*similarity_top_k"),
        ({"retrieval": "bm25", "vector_store_query_mode": "mmr"}, "would not heed.*vector_store_query_mode"),
        ({"retrieval": "bm25", "weights": [1, 2]}, "would not heed.*weights"),
        ({"retrieval": "hybrid", "alpha": 0.5}, "would not heed.*alpha"),
        ({"retrieval": "hybrid", "weights": [1]}, "do not go together"),
        ({"retrieval": "hybrid", "weights": [0, 0]}, "weights of retrievers"),
        ({"retrieval": "hybrid", "candidates": 1}, "candidates makes no sense"),
        ({"retrieval": "bm25", "similarity_top_k": 0}, "similarity_top_k makes no sense"),
        ({"retrieval": "bm25", "similarity_topk": 3}, "no such option.*similarity_topk"),
        ({"weights": [1, 2]}, "no such option.*weights"),
    ],
)
def test_what_a_retriever_does_not_have_is_refused(index: ConceptIndex, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        index.as_query_engine(**options)


def test_without_bm25s_the_extra_is_named(index: ConceptIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ConfigurationError, match=r"bm25s.*pip install 'compllm-rag\[bm25\]'"):
        index.as_bm25_retriever()
    assert index.as_query_engine(retrieval="vector").query(QUESTION).source_nodes
