"""Finding nodes: which rows a query allows is asked of SQLite, and only among those are vectors compared."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_index.core.indices.query.embedding_utils import get_top_k_mmr_embeddings
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryMode

from compllm_rag.catalog import rows as node_rows
from compllm_rag.catalog.flat_vectors import FlatVectors
from compllm_rag.catalog.rows import StoredNode
from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.filter_sql import ids_passing

_MODES = (VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.MMR)
_HYBRID_ONLY = ("alpha", "sparse_top_k", "hybrid_top_k")
_MMR_OPTIONS = ("mmr_threshold", "mmr_prefetch_factor", "mmr_prefetch_k")
_PREFETCH_FACTOR = 4.0  # as in LlamaIndex's own stores that prefetch
_PREFETCH_LEAST = 100  # vectors are at hand, and comparing so many with each other takes some milliseconds


@dataclass(frozen=True, slots=True)
class Diversity:
    """How results are kept from being alike (maximal marginal relevance).

    Attributes:
        threshold: 1 asks for similarity to the query alone, 0 for difference from what was chosen before.
        prefetch: How many of the most similar nodes are chosen from.
    """

    threshold: float
    prefetch: int


def search_mode(query: VectorStoreQuery, options: Mapping[str, Any]) -> Diversity | None:
    """What a query asks for besides similarity; None when that is all.

    Args:
        query: Its mode, and how many nodes it wants.
        options: LlamaIndex's `vector_store_kwargs`.

    Raises:
        ConfigurationError: Another mode, or an option that the mode does not have.
    """
    if query.mode not in _MODES:
        raise ConfigurationError(
            "this store does not search in this mode",
            got=query.mode.value,
            expected=" or ".join(mode.value for mode in _MODES),
            next_step="for words use index.as_bm25_retriever(), for words and vectors index.as_hybrid_retriever()",
        )
    unheeded = sorted(name for name in _HYBRID_ONLY if getattr(query, name) is not None)
    known = _MMR_OPTIONS if query.mode == VectorStoreQueryMode.MMR else ()
    unheeded += sorted(set(options) - set(known))
    if unheeded:
        raise ConfigurationError(
            f"a search in the mode {query.mode.value!r} has no such option",
            got=", ".join(unheeded),
            expected=", ".join(known) or "none",
            next_step="leave it out; vector_store_query_mode='mmr' takes "
            f"{', '.join(_MMR_OPTIONS)}, and weights of words are for index.as_hybrid_retriever()",
        )
    if query.mode == VectorStoreQueryMode.DEFAULT:
        return None
    threshold = options.get("mmr_threshold", query.mmr_threshold)
    threshold = 0.5 if threshold is None else threshold
    if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ConfigurationError("mmr_threshold makes no sense", got=repr(threshold), expected="a number from 0 to 1")
    return Diversity(float(threshold), _prefetch(query.similarity_top_k, options))


def _prefetch(top_k: int, options: Mapping[str, Any]) -> int:
    factor, k = options.get("mmr_prefetch_factor"), options.get("mmr_prefetch_k")
    if factor is not None and k is not None:
        raise ConfigurationError("mmr_prefetch_factor and mmr_prefetch_k exclude each other", next_step="leave one out")
    if factor is None and k is None:
        return max(int(top_k * _PREFETCH_FACTOR), _PREFETCH_LEAST)
    for name, value, least in (("mmr_prefetch_factor", factor, 1), ("mmr_prefetch_k", k, top_k)):
        if value is not None and (not isinstance(value, int | float) or not value >= least):
            raise ConfigurationError(f"{name} makes no sense", got=repr(value), expected=f"at least {least}")
    return int(k) if k is not None else int(top_k * float(factor or 1))


def allowed_ids(connection: sqlite3.Connection, query: VectorStoreQuery) -> npt.NDArray[np.int64] | None:
    """Ids (n,), ascending, of the rows that a query allows by node, document or metadata; None where it allows all."""
    limits = []
    if query.node_ids:
        limits.append(set(node_rows.ids_where(connection, "node_id", query.node_ids)))
    if query.doc_ids is not None:
        limits.append(set(node_rows.ids_where(connection, "ref_doc_id", query.doc_ids)))
    if query.filters is not None and query.filters.filters:
        limits.append(set(ids_passing(connection, query.filters)))
    return np.array(sorted(set.intersection(*limits)), dtype=np.int64) if limits else None


def nearest(
    connection: sqlite3.Connection,
    vectors: FlatVectors,
    vector: npt.NDArray[np.float32],
    top_k: int,
    allowed: npt.NDArray[np.int64] | None,
    diversity: Diversity | None = None,
) -> list[tuple[StoredNode, float]]:
    """The `top_k` rows most similar to a vector, with their scores; ties in order of arrival.

    Args:
        connection: Within one transaction with `vectors`.
        vectors: Of the rows.
        vector: (dim,), of length 1.
        top_k: How many, at most.
        allowed: Ids of rows that may be found; None for all.
        diversity: Choose them so that they are not alike; their scores are those of this choice then, in its order.
    """
    hits = vectors.search(vector, top_k if diversity is None else max(top_k, diversity.prefetch), allowed)
    hits.sort(key=lambda hit: (-hit[1], hit[0]))
    if diversity is not None:
        hits = _diverse(vectors, vector, hits, top_k, diversity.threshold)
    return list(node_rows.with_rows(connection, hits))


def _diverse(
    vectors: FlatVectors,
    vector: npt.NDArray[np.float32],
    hits: list[tuple[int, float]],
    top_k: int,
    threshold: float,
) -> list[tuple[int, float]]:
    if not hits:
        return []
    ids = [id_ for id_, _ in hits]
    found = vectors.get(ids)
    scores, chosen = get_top_k_mmr_embeddings(
        vector,  # type: ignore[arg-type]
        [found[id_] for id_ in ids],  # type: ignore[misc]
        similarity_fn=lambda a, b: float(a @ b),  # they are of length 1
        similarity_top_k=top_k,
        embedding_ids=ids,
        mmr_threshold=threshold,
    )
    return [(int(id_), float(score)) for id_, score in zip(chosen, scores, strict=True)]
