"""Ways to keep concepts on a disk, for `store_read`: this package's store, and what it could have been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@dataclass(frozen=True)
class Contender:
    """One way to read concepts back: `open`, then `read` as often as wanted, then `close`.

    Attributes:
        folder: Holds its files.
        read: All concepts (n, width) fp16.
        open: Gets ready to read.
        close: Lets go of all files.
        rehearsed: Whether a warm reading is the second one after opening, and not the first one after opening again.
    """

    folder: Path
    read: Callable[[], torch.Tensor]
    open: Callable[[], object] = lambda: None
    close: Callable[[], object] = lambda: None
    rehearsed: bool = True


class Store:
    """This package's store, with these chunks in it."""

    def __init__(self, folder: Path, width: int, held: list[Segments], encoding: str = "fp16") -> None:
        self.folder, self._width = folder, width
        self._made: DiskStore | None = DiskStore(folder, hidden_size=width, encoding=encoding)
        self.chunks = [chunk.keys for chunk in held]
        for chunk in held:
            self._made.put(zip(chunk.keys, chunk.concepts, strict=True))

    def contender(self, *, by_chunks: bool = False, rehearsed: bool = True) -> Contender:
        """Read in one call, or chunk by chunk as queries read."""

        def read() -> torch.Tensor:
            if by_chunks:
                return torch.cat(self.read_some(list(range(len(self.chunks)))))
            return self._joined([key for keys in self.chunks for key in keys])

        return Contender(self.folder, read, self.open, self.close, rehearsed)

    def open(self) -> None:
        """Open it for reading, as if for the first time."""
        self.close()
        self._made = DiskStore(self.folder, hidden_size=self._width, read_only=True)
        self._made.stats()

    def read_some(self, numbers: list[int]) -> list[torch.Tensor]:
        """The concepts (n, width) of some chunks."""
        return [self._joined(self.chunks[number]) for number in numbers]

    def _joined(self, keys: list[str]) -> torch.Tensor:
        found = self._made.get_joined(keys) if self._made is not None else None
        if found is None:
            raise RuntimeError("a record is missing")
        return found

    def close(self) -> None:
        """Let go of all files."""
        if self._made is not None:
            self._made.close()
            self._made = None


def flat_files(folder: Path, width: int, held: list[Segments]) -> tuple[Contender, Contender]:
    """One file and nothing else, no checksums and no index: read to where NumPy puts it, and to a cache line's begin.

    NumPy's memory begins 16 bytes behind one, which costs copies.
    """
    folder.mkdir()
    path = folder / "concepts.bin"
    with path.open("wb") as file:
        for chunk in held:
            file.write(torch.cat(chunk.concepts).numpy().tobytes())
    size = path.stat().st_size

    def filled(data: np.ndarray) -> torch.Tensor:
        with path.open("rb", buffering=0) as file:
            view, done = memoryview(data.data), 0
            while done < len(view):
                done += file.readinto(view[done:]) or 0
        return torch.from_numpy(data.view(np.float16)).view(-1, width)

    def aligned() -> torch.Tensor:
        data = np.empty(size + 64, dtype=np.uint8)
        start = -data.ctypes.data % 64
        return filled(data[start : start + size])

    return Contender(folder, lambda: filled(np.empty(size, dtype=np.uint8))), Contender(folder, aligned)


def one_file_per_chunk(folder: Path, width: int, held: list[Segments]) -> Contender:
    """A checksum, then the concepts."""
    folder.mkdir()
    paths = [folder / f"{number:06d}" for number in range(len(held))]
    for path, chunk in zip(paths, held, strict=True):
        path.write_bytes(_summed(torch.cat(chunk.concepts)))
    return Contender(folder, lambda: _joined([_checked(path.read_bytes()) for path in paths], width))


def in_diskcache(folder: Path, width: int, held: list[Segments]) -> Contender:
    """Everything in diskcache, with its own way of keeping bytes: small in SQLite, large as files."""
    cache = diskcache.Cache(str(folder), eviction_policy="none", cull_limit=0, size_limit=2**40)
    for chunk in held:
        with cache.transact():
            for key, concepts in zip(chunk.keys, chunk.concepts, strict=True):
                cache[key] = _summed(concepts)
    keys = [key for chunk in held for key in chunk.keys]

    def opened() -> None:
        cache.close()
        len(cache)  # it opens its database when it is next asked

    return Contender(folder, lambda: _joined([_checked(cache[key]) for key in keys], width), opened, cache.close)


def _summed(concepts: torch.Tensor) -> bytes:
    payload = concepts.numpy().tobytes()
    return xxhash.xxh3_64_digest(payload) + payload


def _checked(record: bytes) -> memoryview:
    payload = memoryview(record)[8:]
    if xxhash.xxh3_64_digest(payload) != record[:8]:
        raise RuntimeError("a checksum is wrong")
    return payload


def _joined(payloads: list[memoryview], width: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(payloads)), dtype=torch.float16).view(-1, width)
