"""How fast do concepts come from the disk into a tensor, against reading one flat file of that size?

By default 64k concepts of a 2,560-wide model, 128k tokens at rate 2, 335 MB in fp16. In turns: one flat file read as it
is; the store, all of it in one call and chunk by chunk, checksums verified; the same in diskcache alone and as one file
per chunk (their checksums verified as well); and the store in int8 and int4. Warm, and cold where the kernel can be
asked to drop the files from its page cache (the bytes that came from the disk are told). Then ten chunks of a 576-wide
model. Data are random numbers in a temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diskcache
import numpy as np
import torch
import xxhash

from benchmarks.common import median_of_quotients, parser, progress, write
from compllm_rag.store import DiskStore

_CHUNK = 100  # concepts of a chunk of 200 tokens at rate 2
_SEGMENT = (6, 11)  # concepts of a segment of at most 20 tokens, from and to
_CHUNKS_AT_ONCE = 10
_CORPUS = 500  # chunks that those ten are chosen from


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
        while size < _CHUNK:
            n = int(sizes.integers(*_SEGMENT))
            keys.append(xxhash.xxh3_128_hexdigest(f"{seed}:{number}".encode()) * 2)
            parts.append(torch.randn(n, width, generator=generator).half())
            number, size = number + 1, size + n
        made += size
        yield Segments(keys, parts)


class Contender:
    """One way to keep concepts: `open`, then `read` as often as wanted, then `close`."""

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
        data = np.empty(self._path.stat().st_size, dtype=np.uint8)
        with self._path.open("rb", buffering=0) as file:
            view, done = memoryview(data.data), 0
            while done < len(view):
                done += file.readinto(view[done:]) or 0
        return torch.from_numpy(data.view(np.float16)).view(-1, self._width)


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


def drop(folder: Path) -> None:
    """Ask the kernel to forget what it holds of the files of a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)


def from_disk() -> int | None:
    """Bytes this process has had fetched from a disk so far; None where the kernel does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return None


def timed(read: Callable[[], object]) -> tuple[float, int | None]:
    """Seconds of a read, and bytes that came from the disk."""
    before, begun = from_disk(), time.perf_counter()
    made = read()
    seconds, after = time.perf_counter() - begun, from_disk()
    del made
    return seconds, None if before is None or after is None else after - before


def rounds(contenders: dict[str, Contender], folders: dict[str, Path], repeats: int, *, cold: bool) -> dict[str, Any]:
    """Time all contenders in turns, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    fetched: dict[str, int | None] = {}
    for round_ in range(repeats + 1):
        for name, contender in contenders.items():
            if cold:
                contender.close()
                drop(folders[name])
            contender.open()
            if not cold:
                contender.read()
            took, fetched[name] = timed(contender.read)
            contender.close()
            if round_:
                seconds[name].append(took)
        progress(f"{'cold' if cold else 'warm'}, round {round_} of {repeats}")
    made: dict[str, Any] = {
        name: {
            "seconds": series,
            "median_s": statistics.median(series),
            "speed_over_flat": median_of_quotients(seconds["flat file"], series),
            **({"bytes_from_disk": fetched[name]} if cold else {}),
        }
        for name, series in seconds.items()
    }
    return made


def large(folder: Path, n_concepts: int, width: int, repeats: int) -> dict[str, Any]:
    """All concepts of a long prompt."""
    flat, files, cache = Flat(folder / "flat", width), Files(folder / "files", width), Cache(folder / "cache", width)
    stores = {name: Store(folder / name, width, name) for name in ("fp16", "int8", "int4")}
    total = 0
    for chunk in chunks(n_concepts, width):
        total += sum(len(part) for part in chunk.concepts)
        for keeper in (flat, files, cache, *stores.values()):
            keeper.add(chunk)
    contenders: dict[str, Contender] = {"flat file": flat, "store": stores["fp16"]}
    contenders |= {"store, chunk by chunk": ByChunks(stores["fp16"]), "diskcache alone": cache}
    contenders |= {"one file per chunk": files, "store, int8": stores["int8"], "store, int4": stores["int4"]}
    places = dict(
        zip(contenders, [folder / n for n in ("flat", "fp16", "fp16", "cache", "files", "int8", "int4")], strict=True)
    )
    expected = flat.read()
    for name in ("store", "store, chunk by chunk", "diskcache alone", "one file per chunk"):
        contenders[name].open()
        if not torch.equal(contenders[name].read(), expected):
            raise RuntimeError(f"{name} reads something else than was written")
    del expected
    return {
        "concepts": total,
        "width": width,
        "segments": sum(map(len, stores["fp16"].chunks)),
        "chunks": len(stores["fp16"].chunks),
        "bytes": 2 * total * width,
        "warm": rounds(contenders, places, repeats, cold=False),
        "cold": rounds(contenders, places, repeats, cold=True) if hasattr(os, "posix_fadvise") else None,
    }


def small(folder: Path, width: int, n_chunks: int, repeats: int) -> dict[str, Any]:
    """Ten chunks out of many."""
    choice = np.random.default_rng(1)
    made: dict[str, Any] = {"width": width, "chunks_at_once": _CHUNKS_AT_ONCE, "chunks": n_chunks}
    for encoding in ("fp16", "int8", "int4"):
        store = Store(folder / f"small-{encoding}", width, encoding)
        for chunk in chunks(n_chunks * _CHUNK, width, seed=1):
            store.add(chunk)
        series: dict[str, list[float]] = {"warm": [], "cold": []}
        for _ in range(20 * repeats):
            numbers = choice.choice(len(store.chunks), _CHUNKS_AT_ONCE, replace=False).tolist()
            store.close()
            drop(store.folder)
            store.open()
            for name in ("cold", "warm"):  # the first reading brings in what the second finds there
                series[name].append(timed(lambda: store.read_some(numbers))[0])  # noqa: B023 - called at once
        store.close()
        made[encoding] = {
            name: {
                "median_ms": 1e3 * statistics.median(found),
                "p95_ms": 1e3 * sorted(found)[int(0.95 * len(found))],
            }
            for name, found in series.items()
        }
    return made


def main() -> None:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("--concepts", type=int, default=2**16, help="how many, at least")
    options.add_argument("--width", type=int, default=2560)
    options.add_argument("--small-width", type=int, default=576)
    options.add_argument("--small-chunks", type=int, default=_CORPUS)
    options.add_argument("--folder", type=Path, help="where to put the temporary folder")
    args = options.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        made = large(folder, args.concepts, args.width, args.repeats)
        write(made | {"ten_chunks": small(folder, args.small_width, args.small_chunks, args.repeats)}, args.json)


if __name__ == "__main__":
    main()
