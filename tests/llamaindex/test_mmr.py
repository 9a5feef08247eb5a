"""Maximal marginal relevance: the choice of LlamaIndex's own store, from vectors that lie here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.vector_store import FaissTextVectorStore
from tests.catalog.catalog_samples import DIM, axis, node
from tests.llamaindex.test_index import documents, open_index

MMR = VectorStoreQueryMode.MMR


def store_of(nodes: list[TextNode]) -> FaissTextVectorStore:
    store = FaissTextVectorStore(dim=DIM)
    store.add(nodes)
    return store


def unit_nodes(n: int) -> list[TextNode]:
    vectors = np.random.default_rng(0).normal(size=(n, DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [node(f"n{i}", vector.tolist(), kind=i % 3) for i, vector in enumerate(vectors)]


@pytest.mark.parametrize("threshold", [None, 0.05, 0.3, 0.9, 1.0])
def test_mmr_chooses_as_the_stock_store(threshold: float | None) -> None:
    nodes, stock = unit_nodes(60), SimpleVectorStore()
    stock.add(nodes)
    query = VectorStoreQuery(query_embedding=axis(1, 0.4), similarity_top_k=8, mode=MMR)
    unit = np.array(axis(1, 0.4)) / np.linalg.norm(axis(1, 0.4))
    asked = VectorStoreQuery(query_embedding=unit.tolist(), similarity_top_k=8, mode=MMR)
    found = store_of(nodes).query(query, mmr_threshold=threshold)
    expected = stock.query(asked, mmr_threshold=threshold)
    assert found.ids == expected.ids
    assert found.similarities == pytest.approx(expected.similarities, abs=1e-5)


def test_mmr_takes_what_differs() -> None:
    store = store_of([node("a", axis(0)), node("twin", axis(0, 0.01)), node("other", axis(0, 0.9))])
    query = VectorStoreQuery(query_embedding=axis(0), similarity_top_k=2, mode=MMR)
    assert store.query(query, mmr_threshold=0.1).ids == ["a", "other"]
    assert store.query(query, mmr_threshold=1.0).ids == ["a", "twin"]
    # Of too few that it may choose from, there is no choice.
    assert store.query(query, mmr_threshold=0.1, mmr_prefetch_k=2).ids == ["a", "twin"]
    assert store.query(query, mmr_threshold=0.1, mmr_prefetch_factor=1.5).ids == ["a", "other"]


def test_mmr_heeds_filters() -> None:
    only = MetadataFilters(filters=[MetadataFilter(key="kind", value=1)])
    query = VectorStoreQuery(query_embedding=axis(0), similarity_top_k=9, mode=MMR, filters=only)
    found = store_of(unit_nodes(30)).query(query)
    assert len(found.ids or []) == 9 and all(n.metadata["kind"] == 1 for n in found.nodes or [])
    assert store_of([]).query(query).ids == []


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        (MMR, {"mmr_treshold": 0.5}, "no such option.*mmr_treshold.*expected mmr_threshold"),
        (MMR, {"mmr_threshold": 2}, "mmr_threshold makes no sense"),
        (MMR, {"mmr_prefetch_k": 1, "mmr_prefetch_factor": 2}, "exclude each other"),
        (MMR, {"mmr_prefetch_k": 1}, "at least 2"),
        (VectorStoreQueryMode.DEFAULT, {"mmr_threshold": 0.5}, "no such option.*mmr_threshold"),
        (VectorStoreQueryMode.HYBRID, {}, "got hybrid, expected default or mmr.*as_hybrid_retriever"),
        (VectorStoreQueryMode.TEXT_SEARCH, {}, "got text_search.*as_bm25_retriever"),
    ],
)
def test_what_a_search_does_not_have_is_refused(
    mode: VectorStoreQueryMode, options: dict[str, Any], message: str
) -> None:
    query = VectorStoreQuery(query_embedding=axis(0), similarity_top_k=2, mode=mode)
    with pytest.raises(ConfigurationError, match=message):
        store_of(unit_nodes(3)).query(query, **options)


def test_alpha_is_not_lost_in_a_search_by_similarity(compressor: Compressor) -> None:
    with open_index(None, compressor) as index:
        index.ingest(documents())
        with pytest.raises(ConfigurationError, match="alpha"):
            index.as_retriever(alpha=0.5).retrieve("the lamp")


def test_an_index_answers_from_diverse_passages(compressor: Compressor) -> None:
    index: ConceptIndex
    with open_index(None, compressor) as index:
        index.ingest(documents(6))
        engine = index.as_query_engine(
            similarity_top_k=3, vector_store_query_mode="mmr", vector_store_kwargs={"mmr_threshold": 0.1}
        )
        response = engine.query("Who built the lighthouse on Gull Rock?")
        plain = index.as_retriever(similarity_top_k=3).retrieve("Who built the lighthouse on Gull Rock?")
        chosen = [n.node.node_id for n in response.source_nodes]
        assert len(chosen) == 3 and chosen[0] == plain[0].node.node_id
        assert chosen != [n.node.node_id for n in plain]
