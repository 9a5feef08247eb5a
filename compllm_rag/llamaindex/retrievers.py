"""Retrievers beside LlamaIndex's own: by words (BM25) over the catalog's text, and by words and vectors together."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, QueryType
from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQuery

from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.keywords import KeywordIndex
from compllm_rag.catalog.rows import StoredNode
from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.heeded import asked, ids, metadata_filters, top_k
from compllm_rag.llamaindex.node_search import allowed_ids
from compllm_rag.llamaindex.nodes import decode_node
from compllm_rag.llamaindex.retriever import readable

_RRF_K = 60.0  # of the paper that proposed it, and of LlamaIndex's fusion
_CANDIDATES_FACTOR, _CANDIDATES_LEAST = 4, 20


def keyword_index(catalog: Catalog) -> KeywordIndex:
    """An index of words over what the embedder would read of each node.

    Raises:
        ConfigurationError: bm25s is not installed.
    """
    return KeywordIndex(catalog, _text_of)


def _text_of(row: StoredNode) -> str:
    return decode_node(row).get_content(metadata_mode=MetadataMode.EMBED)


class _Asked(BaseRetriever):
    """Refuses questions that are no text before LlamaIndex's events do, in pydantic's words."""

    def retrieve(self, str_or_query_bundle: QueryType) -> list[NodeWithScore]:
        """Nodes for a question.

        Raises:
            ConfigurationError: It is empty, or no text.
        """
        return super().retrieve(asked(str_or_query_bundle))

    async def aretrieve(self, str_or_query_bundle: QueryType) -> list[NodeWithScore]:
        """`retrieve`, async."""
        return await super().aretrieve(asked(str_or_query_bundle))


class ConceptBM25Retriever(_Asked):
    """Finds the nodes that say the words of a question. Its scores are BM25's: higher is better, no upper end.

    Args:
        keywords: What to search; see `ConceptIndex.as_bm25_retriever`.
        similarity_top_k: How many nodes, at most; those with none of the words are never among them.
        filters: On metadata.
        doc_ids: Only nodes of these documents; an empty list allows nothing.
        node_ids: Only these nodes; an empty list allows all, as LlamaIndex has it.
        callback_manager: LlamaIndex's.
    """

    def __init__(
        self,
        keywords: KeywordIndex,
        *,
        similarity_top_k: int = 4,
        filters: MetadataFilters | None = None,
        doc_ids: Sequence[str] | None = None,
        node_ids: Sequence[str] | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        similarity_top_k = top_k(similarity_top_k)
        self.keywords, self.similarity_top_k = keywords, similarity_top_k
        self._limits = VectorStoreQuery(filters=metadata_filters(filters), doc_ids=ids(doc_ids), node_ids=ids(node_ids))
        super().__init__(callback_manager=callback_manager)

    def _allowed(self, connection: sqlite3.Connection) -> npt.NDArray[np.int64] | None:
        return allowed_ids(connection, self._limits)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self.keywords.search(readable(query_bundle).query_str, self.similarity_top_k, self._allowed)
        return [NodeWithScore(node=decode_node(row), score=score) for row, score in found]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


class HybridRetriever(_Asked):
    """Joins the results of several retrievers by reciprocal rank fusion; no LLM is asked.

    A node's score is the sum of weight / (60 + rank) over the retrievers that found it. LlamaIndex's
    QueryFusionRetriever takes nodes of the same text for one, and wants an LLM; this does neither.

    Args:
        retrievers: What to join.
        similarity_top_k: How many nodes, at most.
        weights: How much each retriever counts; None for all alike.
        callback_manager: LlamaIndex's.

    Raises:
        ConfigurationError: No retriever, or weights that make no sense.
    """

    def __init__(
        self,
        retrievers: Sequence[BaseRetriever],
        *,
        similarity_top_k: int = 4,
        weights: Sequence[float] | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        similarity_top_k = top_k(similarity_top_k)
        self.retrievers, self.similarity_top_k = list(retrievers), similarity_top_k
        self.weights = [1.0] * len(self.retrievers) if weights is None else [float(weight) for weight in weights]
        if not self.retrievers or len(self.weights) != len(self.retrievers):
            raise ConfigurationError(
                "these retrievers and weights do not go together",
                got=f"{len(self.retrievers)} retrievers, {len(self.weights)} weights",
                expected="a weight for each, and one retriever at least",
            )
        if not all(weight >= 0 for weight in self.weights) or not any(self.weights):
            raise ConfigurationError(
                "weights of retrievers make no sense", got=self.weights, expected="numbers of at least 0, not all 0"
            )
        super().__init__(callback_manager=callback_manager)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._fused([retriever.retrieve(query_bundle) for retriever in self.retrievers])

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._fused(await asyncio.gather(*(retriever.aretrieve(query_bundle) for retriever in self.retrievers)))

    def _fused(self, results: Sequence[Sequence[NodeWithScore]]) -> list[NodeWithScore]:
        scores: dict[str, float] = {}
        nodes: dict[str, NodeWithScore] = {}
        for weight, found in zip(self.weights, results, strict=True):
            if not weight:
                continue
            for rank, hit in enumerate(found):
                nodes.setdefault(hit.node.node_id, hit)
                scores[hit.node.node_id] = scores.get(hit.node.node_id, 0.0) + weight / (_RRF_K + rank)
        best = sorted(scores, key=lambda node_id: -scores[node_id])  # stable: ties as they were found
        return [NodeWithScore(node=nodes[id_].node, score=scores[id_]) for id_ in best[: self.similarity_top_k]]


def candidates_for(similarity_top_k: int) -> int:
    """How many nodes each retriever is asked for, so that what one ranks lower and the other high is met."""
    return max(similarity_top_k * _CANDIDATES_FACTOR, _CANDIDATES_LEAST)
