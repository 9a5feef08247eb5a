"""How fast do concepts come from the disk into a tensor, against reading one flat file of that size?

By default 64k concepts of a 2,560-wide model, 128k tokens at rate 2, 335 MB in fp16. In turns: one flat file read as it
is, into memory as NumPy gives it and into memory that begins with a cache line; the store, all of it in one call and
chunk by chunk, checksums verified; the same in diskcache alone and as one file per chunk (their checksums verified as
well); and the store in int8 and int4. All end in a fresh fp16 tensor. Warm, the second reading after opening (and of
the store also the first), and cold where the kernel can be asked to drop the files from its page cache (the bytes that
came from the disk are told). Then ten chunks of a 576-wide model. Data are random numbers in a temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cells import measured, spread, table
from benchmarks.common import Record, median_of_quotients, parsed, parser, progress, written
from benchmarks.storage.contenders import CHUNK, Contender, Store, chunks, flat_files, in_diskcache, one_file_per_chunk
from compllm_rag.store.encodings import ENCODINGS

_CHUNKS_AT_ONCE = 10
_CORPUS = 500  # chunks that those ten are chosen from


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


def rounds(contenders: dict[str, Contender], repeats: int, *, cold: bool) -> dict[str, Any]:
    """Time all contenders in turns, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    fetched: dict[str, int | None] = {}
    order, chance = list(contenders), np.random.default_rng(0)
    for round_ in range(repeats + 1):
        # A disk that lets through only so much at a time is kindest to whoever comes after a pause.
        chance.shuffle(order)
        for name in order:
            contender = contenders[name]
            if cold:
                contender.close()
                drop(contender.folder)
            contender.open()
            if not cold:
                contender.read()  # for all: the kernel then has memory in large pages at hand
                if not contender.rehearsed:
                    contender.open()
            took, fetched[name] = timed(contender.read)
            contender.close()
            if round_:
                seconds[name].append(took)
        progress(f"{'cold' if cold else 'warm'}, round {round_} of {repeats}")
    return {
        name: {
            "seconds": series,
            "median_s": statistics.median(series),
            "speed_over_flat": median_of_quotients(seconds["flat file"], series),
            **({"bytes_from_disk": fetched[name]} if cold else {}),
        }
        for name, series in seconds.items()
    }


def large(folder: Path, n_concepts: int, width: int, repeats: int) -> dict[str, Any]:
    """All concepts of a long prompt."""
    held = list(chunks(n_concepts, width))
    total = sum(len(part) for chunk in held for part in chunk.concepts)
    stores = {name: Store(folder / name, width, held, name) for name in ENCODINGS}
    flat, aligned = flat_files(folder / "flat", width, held)
    same = {
        "flat file": flat,
        "flat file, aligned": aligned,
        "store": stores["fp16"].contender(),
        "store, first read": stores["fp16"].contender(rehearsed=False),
        "store, chunk by chunk": stores["fp16"].contender(by_chunks=True),
        "diskcache alone": in_diskcache(folder / "cache", width, held),
        "one file per chunk": one_file_per_chunk(folder / "files", width, held),
    }
    del held
    expected = flat.read()
    for name, contender in same.items():
        contender.open()
        if not torch.equal(contender.read(), expected):
            raise RuntimeError(f"{name} reads something else than was written")
    del expected
    contenders = same | {f"store, {name}": stores[name].contender() for name in ("int8", "int4")}
    # Cold, every reading is the first one after opening.
    first = {name: contender for name, contender in contenders.items() if contender.rehearsed}
    return {
        "concepts": total,
        "width": width,
        "segments": sum(map(len, stores["fp16"].chunks)),
        "chunks": len(stores["fp16"].chunks),
        "bytes": 2 * total * width,
        "warm": rounds(contenders, repeats, cold=False),
        "cold": rounds(first, repeats, cold=True) if hasattr(os, "posix_fadvise") else None,
    }


def small(folder: Path, width: int, n_chunks: int, repeats: int) -> dict[str, Any]:
    """Ten chunks out of many."""
    choice = np.random.default_rng(1)
    made: dict[str, Any] = {"width": width, "chunks_at_once": _CHUNKS_AT_ONCE, "chunks": n_chunks}
    for encoding in ENCODINGS:
        store = Store(folder / f"small-{encoding}", width, list(chunks(n_chunks * CHUNK, width, seed=1)), encoding)
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
            name: {"median_ms": 1e3 * statistics.median(found), "p95_ms": 1e3 * sorted(found)[int(0.95 * len(found))]}
            for name, found in series.items()
        }
    return made


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser("store_read", __doc__, "repeats")
    options.add_argument("--concepts", type=int, default=2**16, help="how many, at least")
    options.add_argument("--width", type=int, default=2560)
    options.add_argument("--small-width", type=int, default=576)
    options.add_argument("--small-chunks", type=int, default=_CORPUS)
    options.add_argument("--folder", type=Path, help="where to put the temporary folder")
    args = parsed(options, argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        made = large(folder, args.concepts, args.width, args.repeats)
        made["ten_chunks"] = small(folder, args.small_width, args.small_chunks, args.repeats)
    return written(args, made)


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    ten, rows = record["ten_chunks"], []
    for name, warm in record["warm"].items():
        cells = [name]
        for one in (warm, record["cold"].get(name) if record["cold"] else None):
            cells += [f"{one['median_s']:.3f} s", spread(one["speed_over_flat"])] if one else ["–", "–"]
        rows.append(cells)
    few = [
        [name, *(f"{ten[name][s]['median_ms']:.1f} ms ({ten[name][s]['p95_ms']:.1f})" for s in ("warm", "cold"))]
        for name in ENCODINGS
    ]
    return [
        "## Reading",
        "",
        f"{measured(record)}: {record['concepts']:,} concepts of width {record['width']:,} "
        f"({record['bytes'] / 1e6:,.0f} MB in fp16, {record['segments']:,} segments) to a tensor. *Speed* is that of "
        "one flat file of the fp16 data, read without checksums in the same round: median, least and most. All end in "
        "a fresh fp16 tensor; *aligned* tells one that begins with a cache line from one where NumPy puts it. A warm "
        "reading is the second after opening, so that the store knows where the records lie; its *first read* looks "
        "them up. Cold means opened anew and dropped from the page cache.",
        "",
        *table(["", "warm", "speed", "cold", "speed"], rows),
        f"{ten['chunks_at_once']} chunks at random out of {ten['chunks']}, width {ten['width']}, one call each:",
        "",
        *table(["encoding", "warm, median (95th percentile)", "cold"], few),
    ]
