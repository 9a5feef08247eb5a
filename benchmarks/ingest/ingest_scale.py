"""Does ingestion stay linear, and does its memory stay flat, as a storage grows?

Documents are ingested into one storage, slice after slice, through the whole path: chunks, vectors, concepts, commit.
Beside some slices the same number of tokens goes into a fresh storage, so that a slice is compared with a small ingest
of the same minute. Resident memory is read after each slice; the FAISS index, which is meant to lie in memory, is
stated. Embedding and compressing are timed apart. At the end small ingests with other depths (layers that compress),
segment lengths and batch sizes are timed in turns.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from llama_index.core import Document
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from benchmarks import common
from benchmarks.ingest.sweeps import batch_sizes, sweep, variant
from benchmarks.memory import Peak, resident
from compllm_rag import ConceptIndex, load_embedder
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.evaluation.questions import read_rows

FILES = ("text/wikipedia_2wiki.jsonl.gz", "text/pubmed_abstracts.jsonl.gz")


class TimedEmbedder(BaseEmbedding):
    """An embedder that counts the seconds its texts take.

    Args:
        inner: What embeds.
    """

    _inner: BaseEmbedding = PrivateAttr()
    _seconds: float = PrivateAttr(default=0.0)

    def __init__(self, inner: BaseEmbedding) -> None:
        super().__init__(model_name=inner.model_name, embed_batch_size=inner.embed_batch_size)
        self._inner = inner

    @property
    def seconds(self) -> float:
        """So far."""
        return self._seconds

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        begun = time.perf_counter()
        made = self._inner.get_text_embedding_batch(texts)
        self._seconds += time.perf_counter() - begun
        return made

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._inner.get_query_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


def slices(segmenter: Segmenter, sources: Iterator[Document], size: int, count: int) -> list[list[Document]]:
    """Documents in slices of about `size` tokens each, none twice."""
    made: list[list[Document]] = []
    for _ in range(count):
        made.append([])
        tokens = 0
        while tokens < size:
            made[-1].append(next(sources))
            tokens += len(segmenter.tokenize(made[-1][-1].text).ids)
    return made


def documents(data_dir: Path | None, folder: Path | None) -> Iterator[Document]:
    """Rows of the data folder's plain texts; without one, or when they are used up, the sample corpus, reworded."""
    for name in FILES if data_dir else ():
        for number, row in read_rows((data_dir or Path()) / name):
            yield Document(text=str(row["text"]), id_=f"{name}#{number}", metadata={"title": str(row.get("title", ""))})
    for number, text in enumerate(common.reworded(common.texts(folder))):
        yield Document(text=text, id_=f"reworded {number}")


def grow(parts: list[list[Document]], compressor: Compressor, embedder: BaseEmbedding, every: int) -> dict[str, Any]:
    """Ingest slice after slice into one storage, and beside every few of them one into a fresh storage.

    The embedder is loaded once: storages that each load their own would make memory look as if it grew.
    """
    timed = TimedEmbedder(embedder)
    rows: list[dict[str, Any]] = []
    tokens = 0
    with tempfile.TemporaryDirectory() as scratch:
        index = ConceptIndex.create(Path(scratch) / "storage", compressor=compressor, embedder=timed)
        for number, part in enumerate(parts):
            row = _ingest(index, part, timed)
            tokens += row["slice_tokens"]
            row |= {"tokens": tokens, "rss_bytes": resident(), "fresh_tokens_per_s": None}
            # Vectors as float32 under 64-bit ids; what FAISS reserves beyond them counts as growth.
            row["faiss_bytes"] = index.faiss.n_nodes * (index.faiss.dim * 4 + 8)
            if number % every == 0 or number == len(parts) - 1:
                # The same texts again: a fresh storage shares nothing with the large one.
                fresh = ConceptIndex.create(Path(scratch) / f"fresh{number}", compressor=compressor, embedder=timed)
                row["fresh_tokens_per_s"] = _ingest(fresh, part, timed)["tokens_per_s"]
                fresh.close()
            rows.append(row)
            common.progress(
                f"{tokens} tokens: {row['tokens_per_s']:.0f} tokens/s, {row['rss_bytes'] / 2**20:.0f} MiB resident"
            )
        stored = index.store.stats()
        index.close()
        disk, adapters = on_disk(Path(scratch) / "storage")
    sizes = {"concepts": stored.payload_bytes, "faiss": rows[-1]["faiss_bytes"], "disk": disk}
    per_token = {name: size / tokens for name, size in sizes.items()}
    return {"rows": rows, "bytes_per_token": per_token, "adapter_bytes": adapters}


def on_disk(storage: Path) -> tuple[int, int]:
    """Bytes of what grows with the corpus, and of the copies of the adapters, which every storage holds once."""
    sizes = {path.relative_to(storage): path.stat().st_size for path in storage.rglob("*") if path.is_file()}
    adapters = sum(size for path, size in sizes.items() if path.parts[0] in ("compressor", "reader"))
    return sum(sizes.values()) - adapters, adapters


def _ingest(index: ConceptIndex, part: list[Document], embedder: TimedEmbedder) -> dict[str, Any]:
    """Ingest a slice: where its time went, and the most memory meanwhile."""
    embedded, compressed, before = embedder.seconds, index.library.metrics.work.seconds, resident()
    begun = time.perf_counter()
    with Peak(torch.device("cpu")) as peak:
        report = index.ingest(part)
    seconds = time.perf_counter() - begun
    return {
        "slice_tokens": report.source_tokens,
        "seconds": seconds,
        "embed_s": embedder.seconds - embedded,
        "compress_s": index.library.metrics.work.seconds - compressed,
        "tokens_per_s": report.source_tokens / seconds,
        "compressed": report.segments_compressed,
        "reused": report.segments_reused,
        "peak_rss_bytes": before + peak.bytes,
    }


def linearity(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Time per token of the large storage over that of small ones of the same minutes; memory that grew.

    `time_over_small_ingests` is by size, of all up to there; `time_over_fresh` of single slices.
    `memory_growth_bytes` is from the end of the first quarter, when caches are warm, without the FAISS index.
    """
    both = [r["fresh_tokens_per_s"] / r["tokens_per_s"] for r in rows if r["fresh_tokens_per_s"]]
    start = rows[len(rows) // 4]
    grown = rows[-1]["rss_bytes"] - start["rss_bytes"] - (rows[-1]["faiss_bytes"] - start["faiss_bytes"])
    sizes = {}
    for place, row in enumerate(rows):
        if row["fresh_tokens_per_s"]:
            # All of the storage so far, over small ingests spread over the same time.
            small = statistics.median(1 / r["fresh_tokens_per_s"] for r in rows[: place + 1] if r["fresh_tokens_per_s"])
            whole = sum(r["seconds"] for r in rows[: place + 1]) / row["tokens"]
            sizes[str(row["tokens"])] = whole / small
    return {
        "time_over_small_ingests": sizes,
        "time_over_fresh_first": both[0],
        "time_over_fresh_last": both[-1],
        "time_over_fresh_median": statistics.median(both),
        "memory_growth_bytes": grown,
        "memory_growth_tokens": rows[-1]["tokens"] - start["tokens"],
    }


def main(argv: Sequence[str] | None = None) -> common.Record:
    """Run it."""
    options = common.parser("ingest_scale", __doc__, "llm repeats texts embedder", repeats=2)
    options.add_argument(
        "--data-dir", type=Path, help=f"holds {', '.join(FILES)}; default: the sample corpus, reworded"
    )
    options.add_argument("--total", type=int, default=200_000, help="source tokens")
    options.add_argument("--slice", type=int, default=10_000, help="source tokens of a slice")
    options.add_argument("--every", type=int, default=4, help="a fresh storage beside every so many slices")
    options.add_argument("--layers", type=int, nargs="*", default=[8, 12, 16, 0], help="layers that compress; 0: all")
    options.add_argument("--segments", type=int, nargs="*", default=[10, 20, 40], help="most tokens of a segment")
    options.add_argument("--batches", type=int, nargs="*", default=[1024, 4096, 16384], help="positions of a batch")
    options.add_argument("--sweep-tokens", type=int, default=3000)
    args = common.parsed(options, argv)
    compressor = common.trained_like(args.llm)
    source = "sample corpus" if args.texts is None else "texts given"
    same = {"llm": args.llm, "fingerprint": compressor.fingerprint, "total": args.total, "slice": args.slice}
    same |= {"every": args.every, "sweep_tokens": args.sweep_tokens, "repeats": args.repeats}
    same |= {"texts": "rows of the data folder" if args.data_dir else f"{source}, reworded"}
    chunks = common.chunks_of(compressor, common.texts(args.texts), args.sweep_tokens)

    def growth() -> dict[str, Any]:
        sources = documents(args.data_dir, args.texts)
        cut = slices(compressor.segmenter, sources, args.slice, args.total // args.slice)
        embedder = load_embedder(args.embedder)[0] if args.embedder else load_embedder()[0]
        made = grow(cut, compressor, embedder, args.every)
        return made | linearity(made["rows"])

    def layers() -> dict[str, Any]:
        depths = {str(depth or "all"): variant(compressor, layers=depth or None) for depth in args.layers}
        return {"rows": sweep(depths, chunks, args.repeats)}

    def segments() -> dict[str, Any]:
        lengths = {str(length): variant(compressor, segment_length=length) for length in args.segments}
        return {"rows": sweep(lengths, chunks, args.repeats)}

    def batches() -> dict[str, Any]:
        return {"rows": batch_sizes(compressor, chunks, args.batches, args.repeats)}

    parts = {"growth": (args.embedder, growth), "layers": (args.layers, layers)}
    parts |= {"segments": (args.segments, segments), "batches": (args.batches, batches)}
    journal = common.journal_of(args.json, same)
    done = {
        name: {"settings": settings} | common.part(journal, name, make, settings=settings)
        for name, (settings, make) in parts.items()
    }
    shipped = {"layers": compressor.config.layers, "segment_length": compressor.config.segment_length}
    return common.written(args, {**same, "shipped": shipped, **done})
