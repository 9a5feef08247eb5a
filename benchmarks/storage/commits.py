"""What does a small upload cost in a large storage, the first and the thousandth, and what do searches cost beside it?

A storage of random unit vectors, each with a short text. An upload adds a few chunks and commits them, text and
vectors. With a *log*, as storages are written, and with a *vector file* for each commit, as they were before there was
a log. Searches: threads that ask one question after the other, alone, beside a writer that uploads at a steady pace,
and beside the same writer where each commit writes a vector file and searches take turns with it under one lock, as
before. No LLM, no embedder, no concepts.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery

from benchmarks.cells import measured, table
from benchmarks.common import Record, parsed, parser, progress, written
from compllm_rag.catalog import generations
from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.rows import make_row, write_rows
from compllm_rag.llamaindex.nodes import encode_node
from compllm_rag.llamaindex.vector_store import FaissTextVectorStore

_LAST = 9  # uploads of whose times the median stands for the last one


class Uploads:
    """Nodes with random vectors, numbered through.

    Args:
        dim: Dimensions.
        seed: Of the vectors.
    """

    def __init__(self, dim: int, seed: int) -> None:
        self._chance, self._dim, self._next = np.random.default_rng(seed), dim, 0
        self._name = f"{seed}"

    def vectors(self, n: int) -> npt.NDArray[np.float32]:
        """Unit vectors (n, dim)."""
        made = self._chance.standard_normal((n, self._dim), dtype=np.float32)
        made /= np.linalg.norm(made, axis=1, keepdims=True)
        return made

    def fill(self, folder: Path, n: int) -> None:
        """Make a storage of n chunks, ten of each document, with one commit."""
        (node,) = self.nodes(1)
        body = encode_node(node)
        with Catalog.create(folder, self._dim) as catalog, catalog.writing() as connection:
            names = ((f"corpus-{number}", f"corpus-{number // 10}") for number in range(n))
            rows = (
                make_row(name, document, f"Chunk {name}.", body.node.replace(body.node_id, name))
                for name, document in names
            )
            ids = write_rows(connection, list(rows))
            catalog.vectors(changing=True).add(ids, self.vectors(n))

    def nodes(self, n: int) -> list[TextNode]:
        """The nodes of one document."""
        self._next += 1
        source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"{self._name}-{self._next}")}
        return [
            TextNode(
                id_=f"{self._name}-{self._next}-{place}",
                text=f"Chunk {place} of document {self._next}.",
                embedding=vector.tolist(),
                relationships=source,
            )
            for place, vector in enumerate(self.vectors(n))
        ]


@contextmanager
def a_file_each_commit() -> Iterator[None]:
    """Commits as they were before there was a log."""
    former = generations.LEAST_LOG, generations.LOG_SHARE
    generations.LEAST_LOG, generations.LOG_SHARE = 0, 0.0
    try:
        yield
    finally:
        generations.LEAST_LOG, generations.LOG_SHARE = former


@contextmanager
def one_lock() -> Iterator[None]:
    """Searches as they were: they take turns with each other and with the writer."""
    snapshot = Catalog.snapshot

    @contextmanager
    def reading(self: Catalog) -> Iterator[Any]:
        with self.reading() as connection:
            yield connection, self.vectors()

    Catalog.snapshot = reading  # type: ignore[method-assign]
    try:
        yield
    finally:
        Catalog.snapshot = snapshot  # type: ignore[method-assign]


def upload(store: FaissTextVectorStore, nodes: list[TextNode]) -> float:
    """Seconds of one upload."""
    begun = time.perf_counter()
    with store.catalog.private():
        store.add(nodes)
        store.commit()
    return time.perf_counter() - begun


def uploads(folder: Path, made: Uploads, n: int, chunks: int) -> dict[str, Any]:
    """Times of some uploads, and the bytes of vectors that they wrote."""
    seconds, log_bytes, file_bytes, files = list[float](), 0, 0, {p.name: 0 for p in folder.glob("vectors-*.faiss")}
    with FaissTextVectorStore.open(folder) as store:
        for _ in range(n):
            before = {p.name: p.stat().st_size for p in folder.glob("vectors-*.log")}
            seconds.append(upload(store, made.nodes(chunks)))
            for path in folder.glob("vectors-*"):
                if path.suffix == ".log":
                    log_bytes += max(path.stat().st_size - before.get(path.name, 0), 0)
                elif path.name not in files:
                    files[path.name] = 1
                    file_bytes += path.stat().st_size
    ms = [1e3 * each for each in seconds]
    return {
        "uploads": n,
        "first_ms": ms[0],
        "last_ms": statistics.median(ms[-_LAST:]),
        "median_ms": statistics.median(ms),
        "most_ms": max(ms),
        "total_s": sum(seconds),
        "vector_files_written": sum(files.values()),
        "vector_bytes_per_upload": (log_bytes + file_bytes) / n,
    }


def searches(
    folder: Path, made: Uploads, seconds: float, *, threads: int, chunks: int, every_s: float | None
) -> dict[str, Any]:
    """Times of searches by some threads, beside a writer that uploads every so many seconds."""
    stop, times = threading.Event(), list[list[float]]()
    with FaissTextVectorStore.open(folder) as store:

        def search(vectors: npt.NDArray[np.float32], found: list[float]) -> None:
            at = 0
            while not stop.is_set():
                query = VectorStoreQuery(query_embedding=vectors[at % len(vectors)].tolist(), similarity_top_k=10)
                begun = time.perf_counter()
                store.query(query)
                found.append(time.perf_counter() - begun)
                at += 1

        workers = []
        for _ in range(threads):
            times.append([])
            workers.append(threading.Thread(target=search, args=(made.vectors(64), times[-1]), daemon=True))
        for worker in workers:
            worker.start()
        ends, n = time.perf_counter() + seconds, 0
        while time.perf_counter() < ends:
            begun = time.perf_counter()
            if every_s is not None:
                upload(store, made.nodes(chunks))
                n += 1
            time.sleep(max((every_s or 0.1) - (time.perf_counter() - begun), 0.0))
        stop.set()
        for worker in workers:
            worker.join()
    ms = sorted(1e3 * each for found in times for each in found)
    return {
        "searches": len(ms),
        "uploads": n,
        "p50_ms": statistics.median(ms),
        "p95_ms": ms[int(0.95 * (len(ms) - 1))],
        "most_ms": ms[-1],
    }


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser("commits", __doc__, "")
    options.add_argument("--vectors", type=int, default=100_000)
    options.add_argument("--dim", type=int, default=384)
    options.add_argument("--chunks", type=int, default=4, help="of one upload")
    options.add_argument("--uploads", type=int, default=1_000, help="with a log")
    options.add_argument("--uploads-before", type=int, default=9, help="with a vector file each")
    options.add_argument("--threads", type=int, default=2, help="that search")
    options.add_argument("--seconds", type=float, default=10.0, help="of searches in each situation")
    options.add_argument("--every", type=float, default=0.5, help="seconds between uploads beside searches")
    options.add_argument("--folder", type=Path, help="where to put the temporary folder")
    args = parsed(options, argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, copy = Path(name) / "log", Path(name) / "file"
        progress(f"a storage of {args.vectors} vectors")
        corpus, made = Uploads(args.dim, 1), Uploads(args.dim, 2)
        corpus.fill(folder, args.vectors)
        shutil.copytree(folder, copy)
        progress("uploads")
        found: dict[str, Any] = {"log": uploads(folder, made, args.uploads, args.chunks)}
        with a_file_each_commit():
            found["file"] = uploads(copy, made, args.uploads_before, args.chunks)
        progress("searches")
        same = {"threads": args.threads, "chunks": args.chunks}
        beside = {
            "alone": searches(folder, made, args.seconds, every_s=None, **same),
            "log": searches(folder, made, args.seconds, every_s=args.every, **same),
        }
        with a_file_each_commit(), one_lock():
            beside["file, one lock"] = searches(copy, made, args.seconds, every_s=args.every, **same)
            beside["alone, one lock"] = searches(copy, made, args.seconds, every_s=None, **same)
    sizes = {"vectors": args.vectors, "dim": args.dim, "chunks": args.chunks, "every_s": args.every, **same}
    return written(args, {**sizes, "commits": found, "searches": beside})


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    commits, beside = record["commits"], record["searches"]
    costs = [
        [
            what,
            f"{row['uploads']:,}",
            *(f"{row[name]:,.1f}" for name in ("first_ms", "last_ms", "median_ms", "most_ms")),
            f"{row['vector_bytes_per_upload'] / 1e3:,.0f}",
        ]
        for what, row in (("a log", commits["log"]), ("a vector file each commit", commits["file"]))
    ]
    names = {
        "alone": "no writer",
        "log": "a writer, a log",
        "alone, one lock": "no writer, one lock",
        "file, one lock": "a writer, a vector file each commit, one lock",
    }
    waits = [
        [what, f"{beside[name]['uploads']:,}", f"{beside[name]['searches']:,}"]
        + [f"{beside[name][column]:,.1f}" for column in ("p50_ms", "p95_ms", "most_ms")]
        for name, what in names.items()
    ]
    return [
        "## Commits",
        "",
        "Vectors lie in a FAISS file, `vectors-<n>.faiss`, and behind it in a log, `vectors-<n>.log`: one record a "
        "commit with the ids it removed, the ids it added and their vectors, closed by a SHA-256 that runs on from the "
        "file through every record (`compllm_rag/catalog/vector_log.py` describes the bytes). A commit appends its "
        "record, syncs it, and then commits the rows in SQLite, which name how much of the log belongs to them: what "
        "lies behind that is of a commit that never was, and is written over. When the log would pass a quarter of its "
        "file (and a megabyte), the commit writes the next file in its place, without what was removed; `compact` does "
        "so at any time. While there is a log the catalog is of format 2, which earlier releases refuse; without one "
        "it is of format 1, as ever. Searches read the last commit through connections of their own, and wait for no "
        "writer.",
        "",
        f"{measured(record)}: {record['vectors']:,} random vectors of {record['dim']} dimensions, uploads of "
        f"{record['chunks']} chunks, in milliseconds; *last* is the median of the last {_LAST}, *most* may be one that "
        "wrote a vector file.",
        "",
        *table(["", "uploads", "first", "last", "median", "most", "kB of vectors written, each"], costs),
        f"{record['threads']} threads that search (10 of all, exact) beside an upload every {record['every_s']:g} s, "
        "milliseconds a search. Look at ratios: how long a disk takes to sync depends on what else it does.",
        "",
        *table(["beside", "uploads", "searches", "p50", "p95", "most"], waits),
    ]
