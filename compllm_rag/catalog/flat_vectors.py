"""Unit vectors under ids of the caller's, in flat FAISS indexes: exact cosine search, real removal, cheap copies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from compllm_rag.catalog.vector_parts import Ids, VectorPart, Vectors, joined
from compllm_rag.errors import ConfigurationError, EmbedderMismatchError

_HEADER_BYTES = 4096  # far more than what FAISS writes around vectors and ids


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
    """Vectors by 64-bit id, in parts that never change; later ids are higher. Changes are not safe between threads.

    Args:
        dim: Their number of dimensions.
        parts: What they begin with.
    """

    def __init__(self, dim: int, parts: Sequence[VectorPart] = ()) -> None:
        self.dim = dim
        self._parts = tuple(parts)
        self._removed: list[Ids] = []
        self.cleared = False  # since it was made, or copied

    def copy(self) -> FlatVectors:
        """Another one that shares all parts, and may be changed while this one is searched."""
        return FlatVectors(self.dim, self._parts)

    @property
    def index(self) -> Any:
        """One FAISS index of all of them; made, where there are several parts."""
        return self.merged()._parts[0].index

    def merged(self) -> FlatVectors:
        """The same in one part, without a trace of what was removed."""
        whole = len(self._parts) == 1 and self._parts[0].left is None
        return self if whole else FlatVectors(self.dim, [joined(self._parts, self.dim)])

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @property
    def highest(self) -> int:
        """The highest id, of rows that are gone perhaps; 0 when there is none."""
        return max((int(part.ids[-1]) for part in self._parts if len(part.ids)), default=0)

    @property
    def last(self) -> int:
        """The highest id that is there; 0 when there is none."""
        return max((part.last for part in self._parts), default=0)

    def ids(self) -> Ids:
        """All ids, shape (n,), in ascending order."""
        parts = [np.empty(0, dtype=np.int64), *(part.live() for part in self._parts)]
        ids: Ids = np.sort(np.concatenate(parts))
        return ids

    def add(self, ids: Sequence[int] | Ids, vectors: Vectors) -> None:
        """Add unit vectors (n, dim) under new ids."""
        if not len(ids):
            return
        parts = [*self._parts, VectorPart.of(np.asarray(ids, dtype=np.int64), vectors)]
        # Parts grow as the digits of a binary number do: few of them, and each vector is copied a few times at most.
        while len(parts) > 1 and len(parts[-2].ids) <= 2 * len(parts[-1].ids):
            parts[-2:] = [joined(parts[-2:], self.dim)]
        self._parts = tuple(parts)

    def get(self, ids: Iterable[int]) -> dict[int, npt.NDArray[np.float32]]:
        """Unit vectors (dim,) by id; ids that are not there are skipped."""
        wanted = np.fromiter(set(ids), dtype=np.int64)
        found: dict[int, npt.NDArray[np.float32]] = {}
        for part in self._parts:
            places = part.places(wanted)
            if len(places):
                found.update(zip(part.ids[places].tolist(), part.vectors_at(places), strict=True))
        return found

    def remove(self, ids: Iterable[int] | Ids) -> None:
        """Remove vectors; ids that are not there are skipped."""
        gone = ids if isinstance(ids, np.ndarray) else np.fromiter(ids, dtype=np.int64)
        parts = []
        for part in self._parts:
            places = part.places(gone)
            if len(places):
                self._removed.append(part.ids[places])
                part = part.without(places)
            parts.append(part)
        self._parts = tuple(part for part in parts if len(part))

    def clear(self) -> None:
        """Remove all vectors."""
        self._parts, self._removed, self.cleared = (), [], True

    def changes(self, since: FlatVectors) -> tuple[Ids, Ids, Vectors]:
        """What became of a copy that was not cleared: ids removed, ids added, vectors added (n, dim).

        Args:
            since: What it was copied from. Ids are given in ascending order, so those above its highest are new.
        """
        former = since.highest
        removed = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *self._removed]))
        rows = [part.rows() for part in self._parts if part.ids[-1] > former]
        ids = np.concatenate([np.empty(0, dtype=np.int64), *(ids for ids, _ in rows)])
        vectors = np.concatenate([np.empty((0, self.dim), dtype=np.float32), *(vectors for _, vectors in rows)])
        return removed[removed <= former], ids[ids > former], vectors[ids > former]

    def search(self, vector: Vectors, k: int, among: Ids | None = None) -> list[tuple[int, float]]:
        """Find the nearest vectors.

        Args:
            vector: A unit vector, shape (dim,).
            k: How many, at most.
            among: Only these ids, shape (n,); None for all.

        Returns:
            Ids and cosine similarities, best first; ties in ascending order of ids.
        """
        hits = [hit for part in self._parts for hit in part.search(vector, k, among)]
        return sorted(hits, key=lambda hit: (-hit[1], hit[0]))[: max(k, 0)]

    def to_bytes(self) -> memoryview:
        """What FAISS would write into a file."""
        return self.merged()._parts[0].to_bytes()

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
        return cls(dim, [VectorPart.from_bytes(data, dim, source)])
