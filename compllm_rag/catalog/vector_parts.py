"""Vectors that never change: a FAISS index, the ids of its rows, and which of the rows are left.

What is added to a catalog becomes a part of its own, what is removed is struck out of a part's bits; both leave the
former parts as they were for whoever searches them at this moment. A search asks each part and merges, which gives
what one index of all rows would give: FAISS computes the score of a row from this row and the question alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import faiss as _faiss  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import numpy.typing as npt

from compllm_rag.catalog.faults import damaged

faiss: Any = _faiss  # what types it has describe the C++ calls, not the Python methods laid over them
Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
_ONE_THREAD_BYTES = 256 * 2**20  # one core scans this in some 20 ms
_parsing = threading.Lock()  # FAISS keeps its parsing limit in a global


@dataclass(frozen=True, eq=False)
class VectorPart:
    """Rows of one FAISS index.

    Attributes:
        ids: Of all its rows, (n,), ascending.
        index: `IndexIDMap2` over a flat inner-product index with n rows.
        left: Which rows are left, (n,); None for all of them.
    """

    ids: Ids
    index: Any
    left: npt.NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, ids: Ids, vectors: Vectors) -> VectorPart:
        """A part of unit vectors (n, dim) under ids (n,)."""
        if np.any(ids[1:] < ids[:-1]):
            order = np.argsort(ids, kind="stable")
            ids, vectors = ids[order], vectors[order]
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
        index.add_with_ids(np.ascontiguousarray(vectors), ids)
        return cls(ids.copy(), index)

    @classmethod
    def from_bytes(cls, data: bytes, dim: int, source: str) -> VectorPart:
        """Parse what `to_bytes` gave; see `FlatVectors.from_bytes`."""
        index = _parse(data, source)
        inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap2) else None
        if (
            not isinstance(inner, faiss.IndexFlat)
            or inner.metric_type != faiss.METRIC_INNER_PRODUCT
            or not index.d == inner.d == dim
            or not index.ntotal == inner.ntotal == index.id_map.size()
        ):
            raise damaged(
                "a vector file holds another kind of index",
                got=f"{type(inner or index).__name__} of {index.d} dimensions in {source}",
                expected=f"a flat inner-product index of {dim} dimensions under 64-bit ids",
            )
        ids: Ids = faiss.vector_to_array(index.id_map)
        part = cls(ids, index)
        return part if np.all(ids[1:] > ids[:-1]) else cls.of(ids, part.rows()[1])

    def to_bytes(self) -> memoryview:
        """What FAISS would write into a file; of a part of which all rows are left."""
        return memoryview(faiss.serialize_index(self.index))

    def __len__(self) -> int:
        return len(self.ids) if self.left is None else int(np.count_nonzero(self.left))

    @property
    def last(self) -> int:
        """The highest id that is left; 0 when there is none."""
        if self.left is None:
            return int(self.ids[-1]) if len(self.ids) else 0
        left = np.flatnonzero(self.left)
        return int(self.ids[left[-1]]) if len(left) else 0

    def live(self) -> Ids:
        """Ids of the rows that are left, ascending."""
        return self.ids if self.left is None else self.ids[self.left]

    def rows(self) -> tuple[Ids, Vectors]:
        """Ids (n,) and vectors (n, dim) of the rows that are left."""
        vectors: Vectors = self._flat().reconstruct_n(0, len(self.ids))
        return (self.ids, vectors) if self.left is None else (self.ids[self.left], vectors[self.left])

    def places(self, ids: Ids) -> npt.NDArray[np.int64]:
        """The rows of those of some ids that are left here."""
        if not len(self.ids):
            return np.empty(0, dtype=np.int64)
        places: npt.NDArray[np.int64] = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        places = places[self.ids[places] == ids]
        return places if self.left is None else places[self.left[places]]

    def vectors_at(self, places: npt.NDArray[np.int64]) -> Vectors:
        """Vectors (n, dim) of some rows."""
        found: Vectors = self._flat().reconstruct_batch(places)
        return found

    def without(self, places: npt.NDArray[np.int64]) -> VectorPart:
        """The same without some rows."""
        left = np.ones(len(self.ids), dtype=np.bool_) if self.left is None else self.left.copy()
        left[places] = False
        return replace(self, left=left)

    def search(self, vector: Vectors, k: int, among: Ids | None) -> list[tuple[int, float]]:
        """The k best of the rows that are left: ids and scores, best first, ties in ascending order of ids.

        Args:
            vector: A unit vector, (dim,).
            k: How many, at most.
            among: Only these ids, (n,); None for all.
        """
        mask, parameters = self.left, None
        if among is not None:
            mask = np.zeros(len(self.ids), dtype=np.bool_)
            mask[self.places(among)] = True
        n = len(self.ids) if mask is None else int(np.count_nonzero(mask))
        if mask is not None and n < len(self.ids):
            parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little")))
        flat, wanted = self._flat(), min(k + 1, n)
        if wanted < 1:
            return []
        with _few_threads(len(self.ids) * flat.d * 4):
            while True:
                (scores,), (places,) = flat.search(vector[None, :], wanted, params=parameters)
                # Which of several equal rows at the end FAISS keeps depends on their order: look on until they end.
                if wanted <= k or wanted == n or scores[k - 1] > scores[-1]:
                    break
                wanted = min(2 * wanted, n)
        order = np.lexsort((places, -scores))[:k]
        return [(int(self.ids[places[at]]), float(scores[at])) for at in order]

    def _flat(self) -> Any:
        return faiss.downcast_index(self.index.index)


def joined(parts: Sequence[VectorPart], dim: int) -> VectorPart:
    """One part of all rows that are left in some."""
    rows = [part.rows() for part in parts]
    ids = np.concatenate([np.empty(0, dtype=np.int64), *(ids for ids, _ in rows)])
    vectors = np.concatenate([np.empty((0, dim), dtype=np.float32), *(vectors for _, vectors in rows)])
    return VectorPart.of(ids, vectors)


@contextmanager
def _few_threads(scanned_bytes: int) -> Iterator[None]:
    # Where an LLM runs on the same cores, FAISS's threads wait for each other longer than one takes alone: 27 ms
    # instead of 1 ms for 20,000 vectors of 384 dimensions. (The setting is the calling thread's own.)
    former = faiss.omp_get_max_threads()
    if scanned_bytes < _ONE_THREAD_BYTES:
        faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(former)


def _parse(data: bytes, source: str) -> Any:
    with _parsing:
        former = faiss.get_deserialization_vector_byte_limit()
        # No vector inside can be longer than the whole; without a limit a forged length is allocated first.
        faiss.set_deserialization_vector_byte_limit(max(len(data), 1))
        try:
            return faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
        except (RuntimeError, MemoryError) as error:
            raise damaged("FAISS cannot read a vector file", got=f"{str(error)[:120]} in {source}") from error
        finally:
            faiss.set_deserialization_vector_byte_limit(former)
