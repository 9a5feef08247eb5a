"""What other vector stores do each in their own way: list their nodes, be empty, heed the limits of a query."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore, MetadataFilters, VectorStoreQuery

from compllm_rag.errors import ConfigurationError

_ALL = 2**31 - 1


def listed(
    inner: BasePydanticVectorStore, node_ids: list[str] | None, filters: MetadataFilters | None
) -> list[BaseNode]:
    """Nodes of a store that are named and pass the filters; all of them when neither is given.

    Raises:
        ConfigurationError: The store cannot list its nodes.
    """
    method = inner.get_nodes
    # Qdrant's gives the first 9,999 where it is not told how many.
    limit = {"limit": _ALL} if node_ids is None and "limit" in inspect.signature(method).parameters else {}
    try:
        return list(method(node_ids, filters, **limit) or [])
    except NotImplementedError as error:
        _cannot_list(inner, error)


def _cannot_list(inner: BasePydanticVectorStore, error: Exception) -> NoReturn:
    raise ConfigurationError(
        "this vector store cannot list its nodes",
        got=type(inner).__name__,
        expected="one with get_nodes, such as Qdrant's or Chroma's",
        next_step="delete through the index only; then nothing else needs a list",
    ) from error


def has_nodes(inner: BasePydanticVectorStore) -> bool:
    """False only where a query would fail: Qdrant makes its collection with the first node."""
    if type(inner).__name__ != "QdrantVectorStore":
        return True
    return bool(inner.client.collection_exists(inner.collection_name))  # type: ignore[attr-defined]


def limited(
    inner: BasePydanticVectorStore, query: VectorStoreQuery, of_document: Callable[[str], list[str]]
) -> VectorStoreQuery:
    """A query whose limits the other store heeds, or none.

    Args:
        inner: The store that is asked.
        query: What is asked.
        of_document: Ids of the nodes of a document.

    Raises:
        ConfigurationError: The store would not heed a limit.
    """
    node_ids = query.node_ids or None  # LlamaIndex's retriever passes an empty list for "no limit"
    if isinstance(inner, SimpleVectorStore) and query.doc_ids is not None:
        allowed = {node_id for doc_id in query.doc_ids for node_id in of_document(doc_id)}
        node_ids = sorted(allowed if node_ids is None else allowed.intersection(node_ids))
        return replace(query, node_ids=node_ids, doc_ids=None)
    if type(inner).__name__ == "ChromaVectorStore" and (node_ids or query.doc_ids is not None):
        raise ConfigurationError(
            "this vector store would not heed a limit to nodes or documents",
            got=type(inner).__name__,
            expected="filters",
            next_step="filter by metadata, as in MetadataFilter(key='document_id', value=...)",
        )
    return replace(query, node_ids=node_ids)
