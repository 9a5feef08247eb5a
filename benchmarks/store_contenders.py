"""Ways to keep concepts on a disk, for `store_read`: this package's store, and what it could have been."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import diskcache
import numpy as np
import torch
import xxhash

from compllm_rag.store import DiskStore

CHUNK = 100  # concepts of a chunk of 200 tokens at rate 2
_SEGMENT = (6, 11)  # concepts of a segment of at most 20 tokens, from and to


@dataclass(frozen=True)
class Segments:
    """Random segments of one chunk: key and concepts (n_concepts, width) of each."""

    keys: list[str]
    concepts: list[torch.Tensor]


def chunks(n_concepts: int, width: int, seed: int = 0) -> Iterator[Segments]:
    """Chunks of random concepts in fp16, at least `n_concepts` in all."""
    generator, sizes = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    number = made = 0
    while made < n_concepts:
        keys, parts, size = [], [], 0
        while size < CHUNK:
            n = int(sizes.integers(*_SEGMENT))
            keys.append(xxhash.xxh3_128_hexdigest(f"{seed}:{number}".encode()) * 2)
            parts.append(torch.randn(n, width, generator=generator).half())
            number, size = number + 1, size + n
        made += size
        yield Segments(keys, parts)


class Contender:
    """One way to keep concepts: `open`, then `read` as often as wanted, then `close`.

    Attributes:
        rehearsed: Whether a warm reading is the second one after opening, and not the first one after opening again.
    """

    rehearsed = True

    def add(self, chunk: Segments) -> None:
        """Write one chunk."""
        raise NotImplementedError

    def open(self) -> None:
        """Get ready to read."""

    def read(self) -> torch.Tensor:
        """All concepts (n, width) fp16."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of all files."""


class Flat(Contender):
    """One file and nothing else: no checksums, no index."""

    def __init__(self, folder: Path, width: int) -> None:
        folder.mkdir()
        self._path, self._width = folder / "concepts.bin", width
        self._path.touch()

    def add(self, chunk: Segments) -> None:
        """Write the concepts of one chunk behind the others."""
        with self._path.open("ab") as file:
            file.write(torch.cat(chunk.concepts).numpy().tobytes())

    def read(self) -> torch.Tensor:
        """All concepts (n, width) fp16."""
        return self._filled(np.empty(self._path.stat().st_size, dtype=np.uint8))

    def _filled(self, data: np.ndarray) -> torch.Tensor:
        with self._path.open("rb", buffering=0) as file:
            view, done = memoryview(data.data), 0
            while done < len(view):
                done += file.readinto(view[done:]) or 0
        return torch.from_numpy(data.view(np.float16)).view(-1, self._width)


class AlignedFlat(Flat):
    """The flat file, read to where a cache line begins; NumPy's memory begins 16 bytes behind, which costs copies."""

    def __init__(self, flat: Flat) -> None:
        self.__dict__ = flat.__dict__  # one file, read in two ways

    def read(self) -> torch.Tensor:
        """All concepts (n, width) fp16."""
        data = np.empty(self._path.stat().st_size + 64, dtype=np.uint8)
        start = -data.ctypes.data % 64
        return self._filled(data[start : start + data.size - 64])


class Store(Contender):
    """This package's store."""

    def __init__(self, folder: Path, width: int, encoding: str = "fp16") -> None:
        self.folder, self._width, self._encoding = folder, width, encoding
        self.chunks: list[list[str]] = []
        self._made: DiskStore | None = DiskStore(folder, hidden_size=width, encoding=encoding)

    def add(self, chunk: Segments) -> None:
        """Put the segments of one chunk."""
        self._store.put(zip(chunk.keys, chunk.concepts, strict=True))
        self.chunks.append(chunk.keys)

    @property
    def _store(self) -> DiskStore:
        if self._made is None:
            self._made = DiskStore(self.folder, hidden_size=self._width, read_only=True)
        return self._made

    def open(self) -> None:
        """Open it for reading."""
        self.close()
        self._store.stats()

    def read(self) -> torch.Tensor:
        """All concepts (n, width) fp16, in one call."""
        return self._joined([key for keys in self.chunks for key in keys])

    def read_by_chunks(self) -> torch.Tensor:
        """The same, chunk by chunk, as queries read."""
        return torch.cat([self._joined(keys) for keys in self.chunks])

    def read_some(self, numbers: list[int]) -> list[torch.Tensor]:
        """The concepts of some chunks."""
        return [self._joined(self.chunks[number]) for number in numbers]

    def _joined(self, keys: list[str]) -> torch.Tensor:
        found = self._store.get_joined(keys)
        if found is None:
            raise RuntimeError("a record is missing")
        return found

    def close(self) -> None:
        """Let go of all files."""
        if self._made is not None:
            self._made.close()
            self._made = None


class FirstRead(Store):
    """The store, read for the first time after opening."""

    rehearsed = False

    def __init__(self, store: Store) -> None:
        self.__dict__ = store.__dict__


class ByChunks(Store):
    """The store, read chunk by chunk."""

    def __init__(self, store: Store) -> None:
        self.__dict__ = store.__dict__  # one store, read in two ways

    def read(self) -> torch.Tensor:
        """All concepts (n, width) fp16, chunk by chunk."""
        return self.read_by_chunks()


class Files(Contender):
    """One file per chunk: a checksum, then the concepts."""

    def __init__(self, folder: Path, width: int) -> None:
        folder.mkdir()
        self._folder, self._width, self._n = folder, width, 0

    def add(self, chunk: Segments) -> None:
        """Write the file of one chunk."""
        payload = torch.cat(chunk.concepts).numpy().tobytes()
        (self._folder / f"{self._n:06d}").write_bytes(_sum(payload) + payload)
        self._n += 1

    def read(self) -> torch.Tensor:
        """All concepts (n, width) fp16."""
        return _joined([_checked((self._folder / f"{i:06d}").read_bytes()) for i in range(self._n)], self._width)


class Cache(Contender):
    """Everything in diskcache, with its own way of keeping bytes: small in SQLite, large as files."""

    def __init__(self, folder: Path, width: int) -> None:
        self._folder, self._width, self._keys = folder, width, list[str]()
        self._cache = self._opened()

    def _opened(self) -> diskcache.Cache:
        return diskcache.Cache(str(self._folder), eviction_policy="none", cull_limit=0, size_limit=2**40)

    def add(self, chunk: Segments) -> None:
        """Put the segments of one chunk."""
        with self._cache.transact():
            for key, concepts in zip(chunk.keys, chunk.concepts, strict=True):
                payload = concepts.numpy().tobytes()
                self._cache[key] = _sum(payload) + payload
                self._keys.append(key)

    def open(self) -> None:
        """Open it."""
        self.close()
        self._cache = self._opened()

    def read(self) -> torch.Tensor:
        """All concepts (n, width) fp16."""
        return _joined([_checked(self._cache[key]) for key in self._keys], self._width)

    def close(self) -> None:
        """Let go of all files."""
        self._cache.close()


def _sum(payload: bytes | memoryview) -> bytes:
    return xxhash.xxh3_64_digest(payload)


def _checked(record: bytes) -> memoryview:
    payload = memoryview(record)[8:]
    if _sum(payload) != record[:8]:
        raise RuntimeError("a checksum is wrong")
    return payload


def _joined(payloads: list[memoryview], width: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(payloads)), dtype=torch.float16).view(-1, width)
