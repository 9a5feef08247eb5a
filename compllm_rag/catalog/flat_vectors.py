"""Unit vectors in a flat FAISS index under ids of the caller's: exact cosine search, real removal, checked loading."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import faiss as _faiss  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import numpy.typing as npt

from compllm_rag.catalog.faults import damaged
from compllm_rag.errors import ConfigurationError, EmbedderMismatchError

faiss: Any = _faiss  # what types it has describe the C++ calls, not the Python methods laid over them
_HEADER_BYTES = 4096  # far more than what FAISS writes around vectors and ids
_ONE_THREAD_BYTES = 256 * 2**20  # one core scans this in some 20 ms
_parsing = threading.Lock()  # FAISS keeps its parsing limit in a global


def unit_vector(embedding: Sequence[float], dim: int, of: str) -> npt.NDArray[np.float32]:
    """Scale an embedding to length 1.

    Args:
        embedding: `dim` numbers.
        dim: What the index holds.
        of: Whose embedding this is, for messages.

    Returns:
        The vector, shape (dim,).

    Raises:
        EmbedderMismatchError: Another number of dimensions.
        ConfigurationError: NaN, infinite, or all zero: such a vector has no direction to compare.
    """
    vector = np.asarray(embedding, dtype=np.float64)
    if vector.shape != (dim,):
        raise EmbedderMismatchError(
            f"the embedding of {of} does not fit this index",
            got=f"{vector.size} dimensions" if vector.ndim == 1 else f"an array of shape {vector.shape}",
            expected=f"{dim} dimensions",
            next_step="use the embedder that the index was made with, or ingest again into a new folder",
        )
    largest = np.abs(vector).max()
    if not np.isfinite(largest) or largest == 0:
        raise ConfigurationError(
            f"the embedding of {of} has no direction",
            got="only zeros" if largest == 0 else "NaN or infinite values",
            expected="finite numbers, not all zero",
            next_step="look at the embedder and at this text",
        )
    vector = vector / largest  # squares of large or tiny numbers leave the range of a float
    unit: npt.NDArray[np.float32] = (vector / np.linalg.norm(vector)).astype(np.float32)
    return unit


class FlatVectors:
    """Vectors by 64-bit id. Not safe between threads by itself.

    Args:
        dim: Their number of dimensions.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._index = _empty(dim)
        # A removal moves all later vectors, so removals gather until somebody looks. Ids never come again.
        self._removed: set[int] = set()

    @property
    def index(self) -> Any:
        """The FAISS index itself."""
        self._settle()
        return self._index

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def ids(self) -> npt.NDArray[np.int64]:
        """All ids, shape (n,), in ascending order."""
        ids: npt.NDArray[np.int64] = np.sort(faiss.vector_to_array(self.index.id_map))
        return ids

    def add(self, ids: Sequence[int], vectors: npt.NDArray[np.float32]) -> None:
        """Add unit vectors (n, dim) under new ids."""
        if ids:
            self._index.add_with_ids(np.ascontiguousarray(vectors), np.asarray(ids, dtype=np.int64))

    def get(self, ids: Iterable[int]) -> dict[int, npt.NDArray[np.float32]]:
        """Unit vectors (dim,) by id; ids that are not there are skipped."""
        wanted = np.fromiter(set(ids) - self._removed, dtype=np.int64)
        held = faiss.vector_to_array(self._index.id_map)
        places = np.flatnonzero(np.isin(held, wanted))
        found = faiss.downcast_index(self._index.index).reconstruct_batch(places)
        return {int(held[place]): vector for place, vector in zip(places, found, strict=True)}

    def remove(self, ids: Iterable[int]) -> None:
        """Remove vectors; ids that are not there are skipped."""
        self._removed.update(ids)

    def clear(self) -> None:
        """Remove all vectors."""
        self._index = _empty(self.dim)
        self._removed.clear()

    def search(
        self, vector: npt.NDArray[np.float32], k: int, among: npt.NDArray[np.int64] | None = None
    ) -> list[tuple[int, float]]:
        """Find the nearest vectors.

        Args:
            vector: A unit vector, shape (dim,).
            k: How many, at most.
            among: Only these ids, shape (n,); None for all.

        Returns:
            Ids and cosine similarities, best first.
        """
        index = self.index
        k = min(k, int(index.ntotal) if among is None else len(among))
        if k < 1:
            return []
        parameters = None
        if among is not None:
            selector = faiss.IDSelectorBatch(among)
            parameters = faiss.SearchParameters(sel=selector)
        with _few_threads(int(index.ntotal) * self.dim * 4):
            scores, ids = index.search(vector[None, :], k, params=parameters)
        return [(int(id_), float(score)) for id_, score in zip(ids[0], scores[0], strict=True) if id_ >= 0]

    def to_bytes(self) -> memoryview:
        """What FAISS would write into a file."""
        return memoryview(faiss.serialize_index(self.index))

    @classmethod
    def most_bytes(cls, dim: int, n: int) -> int:
        """An upper bound of what n vectors take, to refuse a file before it is read."""
        return n * (4 * dim + 8) + _HEADER_BYTES

    @classmethod
    def from_bytes(cls, data: bytes, dim: int, source: str) -> FlatVectors:
        """Parse what `to_bytes` gave. The caller has checked its SHA-256: FAISS does not survive every forgery.

        Args:
            data: The bytes.
            dim: The number of dimensions they must have.
            source: Where they come from, for messages.

        Raises:
            CorruptRecordError: They hold something else.
        """
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
        vectors = cls(dim)
        vectors._index = index
        return vectors

    def _settle(self) -> None:
        if self._removed:
            self._index.remove_ids(np.fromiter(self._removed, dtype=np.int64, count=len(self._removed)))
            self._removed.clear()


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


def _empty(dim: int) -> Any:
    return faiss.IndexIDMap2(faiss.IndexFlatIP(dim))


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
