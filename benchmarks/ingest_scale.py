"""Does ingestion stay linear, and does its memory stay flat, as a storage grows?

Documents are ingested into one storage, slice after slice, through the whole path: chunks, vectors, concepts, commit.
Beside some slices the same number of tokens goes into a fresh storage, so that a slice is compared with a small ingest
of the same minute. Resident memory is read after each slice; the FAISS index, which is meant to lie in memory, is
stated. At the end small ingests of other depths (layers that compress) and batch sizes are timed in turns.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_index.core import Document

import compllm_rag.compressor as compression
from benchmarks.common import in_turns, parser, progress, reworded, texts, trained_like, write
from benchmarks.ingest import ensure, passages
from benchmarks.memory import resident
from compllm_rag import ConceptIndex, load_embedder
from compllm_rag.compressor import Compressor
from compllm_rag.questions import read_rows
from compllm_rag.segmentation import Segmenter

FILES = ("text/wikipedia_2wiki.jsonl.gz", "text/pubmed_abstracts.jsonl.gz")


def slices(segmenter: Segmenter, sources: Iterator[Document], size: int, count: int) -> list[list[Document]]:
    """Documents in slices of about `size` tokens each, none twice."""
    made: list[list[Document]] = []
    for _ in range(count):
        part: list[Document] = []
        tokens = 0
        while tokens < size:
            document = next(sources)
            tokens += len(segmenter.tokenize(document.text).ids)
            part.append(document)
        made.append(part)
    return made


def documents(data_dir: Path | None, folder: Path | None) -> Iterator[Document]:
    """Rows of the data folder's plain texts; without one, or when they are used up, the sample corpus, reworded."""
    for name in FILES if data_dir else ():
        for number, row in read_rows((data_dir or Path()) / name):
            yield Document(text=str(row["text"]), id_=f"{name}#{number}", metadata={"title": str(row.get("title", ""))})
    for number, text in enumerate(reworded(texts(folder))):
        yield Document(text=text, id_=f"reworded {number}")


def grow(parts: list[list[Document]], options: dict[str, Any], every: int) -> list[dict[str, Any]]:
    """Ingest slice after slice into one storage, and beside every few of them one into a fresh storage."""
    rows: list[dict[str, Any]] = []
    tokens = 0
    with tempfile.TemporaryDirectory() as scratch:
        index = ConceptIndex.create(Path(scratch) / "storage", **options)
        for number, part in enumerate(parts):
            seconds, report = _ingest(index, part)
            tokens += report.source_tokens
            row = {
                "tokens": tokens,
                "slice_tokens": report.source_tokens,
                "seconds": seconds,
                "tokens_per_s": report.source_tokens / seconds,
                "compressed": report.segments_compressed,
                "reused": report.segments_reused,
                "rss_bytes": resident(),
                "faiss_bytes": index.faiss.n_nodes * index.faiss.dim * 4,
                "fresh_tokens_per_s": None,
            }
            if number % every == 0 or number == len(parts) - 1:
                # Other ids, the same texts: a fresh storage shares nothing with the large one.
                fresh = ConceptIndex.create(Path(scratch) / f"fresh{number}", **options)
                took, again = _ingest(fresh, part)
                row["fresh_tokens_per_s"] = again.source_tokens / took
                fresh.close()
            rows.append(row)
            progress(
                f"{tokens} tokens: {row['tokens_per_s']:.0f} tokens/s, {row['rss_bytes'] / 2**20:.0f} MiB resident"
            )
        index.close()
    return rows


def _ingest(index: ConceptIndex, part: list[Document]) -> tuple[float, Any]:
    begun = time.perf_counter()
    report = index.ingest(part)
    return time.perf_counter() - begun, report


def depths(compressor: Compressor, chunks: list[str], layers: list[int | None], repeats: int) -> dict[str, Any]:
    """Tokens/s of compressing alone by the number of layers, None being all; untrained, which costs the same."""
    made = {}
    for depth in layers:
        config = compressor.config.model_copy(
            update={"layers": depth, "lora_rank": 0, "lora_alpha": 0, "lora_modules": ()}
        )
        made[str(depth or "all")] = Compressor(compressor.llm, config)
    return _speeds({name: _call(c, chunks) for name, c in made.items()}, compressor, chunks, repeats)


def batch_sizes(compressor: Compressor, chunks: list[str], sizes: list[int], repeats: int) -> dict[str, Any]:
    """Tokens/s of compressing alone by the positions of one batch."""
    device = compressor.llm.device.type
    before = compression.BATCH_POSITIONS[device]

    def call(size: int) -> Any:
        def run() -> None:
            compression.BATCH_POSITIONS[device] = size
            ensure(compressor, chunks, 2.0)

        return run

    try:
        return _speeds({str(size): call(size) for size in sizes}, compressor, chunks, repeats)
    finally:
        compression.BATCH_POSITIONS[device] = before


def _call(compressor: Compressor, chunks: list[str]) -> Any:
    return lambda: ensure(compressor, chunks, 2.0)


def _speeds(calls: dict[str, Any], compressor: Compressor, chunks: list[str], repeats: int) -> dict[str, Any]:
    tokens = sum(len(compressor.segmenter.tokenize(text).ids) for text in chunks)
    seconds = in_turns(calls, repeats)
    return {
        name: {"tokens_per_s": statistics.median(tokens / s for s in series), "seconds": series}
        for name, series in seconds.items()
    }


def linearity(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Time per token of the large storage's slices over a fresh storage's of the same minute; memory that grew.

    `memory_growth_bytes` is from the end of the first quarter, when caches are warm, without the FAISS index.
    """
    both = [r["fresh_tokens_per_s"] / r["tokens_per_s"] for r in rows if r["fresh_tokens_per_s"]]
    start = rows[len(rows) // 4]
    grown = rows[-1]["rss_bytes"] - start["rss_bytes"] - (rows[-1]["faiss_bytes"] - start["faiss_bytes"])
    return {
        "time_over_fresh_first": both[0],
        "time_over_fresh_last": both[-1],
        "time_over_fresh_median": statistics.median(both),
        "memory_growth_bytes": grown,
        "memory_growth_tokens": rows[-1]["tokens"] - start["tokens"],
    }


def main() -> None:
    """Command line."""
    options = parser(__doc__)
    options.set_defaults(repeats=2)
    options.add_argument(
        "--data-dir", type=Path, help=f"holds {', '.join(FILES)}; default: the sample corpus, reworded"
    )
    options.add_argument("--embedder", help="retrieval embedder; default: the embedded one")
    options.add_argument("--total", type=int, default=200_000, help="source tokens")
    options.add_argument("--slice", type=int, default=10_000, help="source tokens of a slice")
    options.add_argument("--every", type=int, default=5, help="a fresh storage beside every so many slices")
    options.add_argument("--layers", type=int, nargs="*", default=[8, 12, 16, 0], help="layers that compress; 0: all")
    options.add_argument("--batches", type=int, nargs="*", default=[1024, 4096, 16384], help="positions of a batch")
    options.add_argument("--sweep-tokens", type=int, default=3000)
    args = options.parse_args()
    compressor = trained_like(args.llm)
    rows = _former(args.json, args)
    if not rows:
        sources = documents(args.data_dir, args.texts)
        parts = slices(compressor.segmenter, sources, args.slice, args.total // args.slice)
        # Loaded once: storages that each load their own would make memory look as if it grew.
        embedder = load_embedder(args.embedder)[0] if args.embedder else load_embedder()[0]
        rows = grow(parts, {"compressor": compressor, "embedder": embedder}, args.every)
    result = {"llm": args.llm, "total": args.total, "slice": args.slice, "rows": rows, **linearity(rows)}
    if args.json is not None:
        args.json.write_text(json.dumps(result), encoding="utf-8")
    chunks = passages(compressor, texts(args.texts), args.sweep_tokens)
    result["layers"] = depths(compressor, chunks, [depth or None for depth in args.layers], args.repeats)
    result["batches"] = batch_sizes(compressor, chunks, args.batches, args.repeats)
    result["layers_shipped"] = compressor.config.layers
    write({**result, "texts": "rows of the data folder" if args.data_dir else "sample corpus, reworded"}, args.json)


def _former(path: Path | None, args: Any) -> list[dict[str, Any]]:
    """The rows of a run that was interrupted behind them."""
    if path is None or not path.exists():
        return []
    former = json.loads(path.read_text(encoding="utf-8"))
    same = all(former.get(name) == getattr(args, name) for name in ("llm", "total", "slice"))
    return list(former["rows"]) if same and "layers" not in former else []


if __name__ == "__main__":
    main()
