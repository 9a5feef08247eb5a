"""The retriever of a `ConceptIndex`: LlamaIndex's own, over a vector store that keeps every kind of node whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llama_index.core.indices.vector_store.retrievers import VectorIndexRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, QueryType
from llama_index.core.vector_stores.types import VectorStoreQueryResult

from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.heeded import asked, ids, metadata_filters, query_mode, top_k
from compllm_rag.unicode_text import is_whole, whole

if TYPE_CHECKING:
    from compllm_rag.llamaindex.index_asking import IndexAsking

# LlamaIndex's retriever takes any name without a word.
OPTIONS = frozenset(inspect.signature(VectorIndexRetriever.__init__).parameters) - {
    "self", "index", "kwargs", "callback_manager", "object_map",
} | {"vector_store_kwargs"}  # fmt: skip

_CHECKS: dict[str, Callable[[Any], Any]] = {
    "similarity_top_k": top_k,
    "filters": metadata_filters,
    "vector_store_query_mode": query_mode,
    "node_ids": ids,
    "doc_ids": ids,
}


class ConceptRetriever(VectorIndexRetriever):
    """LlamaIndex's retriever, which would search among the nodes of the index struct only once there are any.

    LlamaIndex keeps `IndexNode`s and `ImageNode`s beside the vector store too, takes their ids for those of all nodes,
    and reads them from there. The vector store of this package keeps them whole, so nothing but it is asked.

    Args:
        index: Where to search.
        **options: As of LlamaIndex's `VectorIndexRetriever`.

    Raises:
        ConfigurationError: It has no such option, or it makes no sense.
    """

    def __init__(self, index: IndexAsking, **options: Any) -> None:
        unheeded = sorted(options.keys() - OPTIONS - {"callback_manager", "object_map"})
        if unheeded:
            raise ConfigurationError(
                "a retriever has no such option",
                got=", ".join(unheeded),
                expected=", ".join(sorted(OPTIONS)),
                next_step="leave it out",
            )
        for name, check in _CHECKS.items():
            if name in options:
                options[name] = check(options[name])
        super().__init__(index, **options)

    def retrieve(self, str_or_query_bundle: QueryType) -> list[NodeWithScore]:
        """Nodes for a question.

        Raises:
            ConfigurationError: It is empty, or no text.
        """
        return super().retrieve(asked(str_or_query_bundle))

    async def aretrieve(self, str_or_query_bundle: QueryType) -> list[NodeWithScore]:
        """`retrieve`, async."""
        return await super().aretrieve(asked(str_or_query_bundle))

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return super()._retrieve(readable(query_bundle))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await super()._aretrieve(readable(query_bundle))

    def _determine_nodes_to_fetch(self, query_result: VectorStoreQueryResult) -> list[str]:
        """None: what the vector store gives is whole, and newer than what lies elsewhere."""
        return [] if query_result.nodes is not None else super()._determine_nodes_to_fetch(query_result)


def readable(query: QueryBundle) -> QueryBundle:
    """A question that can be embedded: half characters are replaced, see `unicode_text`.

    Args:
        query: What is asked; an embedding or texts to embed in the question's place are kept.

    Raises:
        ConfigurationError: There is nothing to search by.
    """
    if query.embedding is None and not any(text.strip() for text in query.embedding_strs):
        raise ConfigurationError(
            "the question is empty", got=repr(query.query_str), expected="words", next_step="ask in words"
        )
    strings = query.custom_embedding_strs
    if all(map(is_whole, [query.query_str, *(strings or [])])):
        return query
    return replace(
        query,
        query_str=whole(query.query_str),
        custom_embedding_strs=None if strings is None else [whole(text) for text in strings],
    )
