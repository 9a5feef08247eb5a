"""Finding nodes: vectors first, then what the query allows and its filters let pass."""

from __future__ import annotations

import sqlite3

import numpy as np
import numpy.typing as npt
from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQuery

from compllm_rag.catalog import rows as node_rows
from compllm_rag.catalog.flat_vectors import FlatVectors
from compllm_rag.catalog.rows import StoredNode
from compllm_rag.llamaindex.filters import matches

_WIDEN = 4  # how much further each search looks while filters leave too few


def allowed_ids(connection: sqlite3.Connection, query: VectorStoreQuery) -> npt.NDArray[np.int64] | None:
    """Ids (n,) of the rows that a query names by node or document; None where it names none."""
    limits = []
    if query.node_ids:
        limits.append(set(node_rows.ids_where(connection, "node_id", query.node_ids)))
    if query.doc_ids is not None:
        limits.append(set(node_rows.ids_where(connection, "ref_doc_id", query.doc_ids)))
    return np.array(sorted(set.intersection(*limits)), dtype=np.int64) if limits else None


def nearest(
    connection: sqlite3.Connection,
    vectors: FlatVectors,
    vector: npt.NDArray[np.float32],
    top_k: int,
    allowed: npt.NDArray[np.int64] | None,
    filters: MetadataFilters | None,
) -> list[tuple[StoredNode, float]]:
    """The `top_k` rows most similar to a vector that pass the filters, with their scores; ties in order of arrival.

    Args:
        connection: Within one transaction with `vectors`.
        vectors: Of the rows.
        vector: (dim,), of length 1.
        top_k: How many, at most.
        allowed: Ids of rows that may be found; None for all.
        filters: On metadata; the search widens until enough rows pass.
    """
    candidates = len(vectors) if allowed is None else len(allowed)
    width, seen = top_k if filters is None else top_k * _WIDEN, set[int]()
    passed: list[tuple[StoredNode, float]] = []
    while True:
        hits = [(id_, score) for id_, score in vectors.search(vector, width, allowed) if id_ not in seen]
        seen.update(id_ for id_, _ in hits)
        for row, score in node_rows.with_rows(connection, hits):
            if filters is None or matches(filters, row.metadata, row.ref_doc_id):
                passed.append((row, score))
        if len(passed) >= top_k or width >= candidates:
            return sorted(passed, key=lambda hit: (-hit[1], hit[0].id))[:top_k]
        width *= _WIDEN
