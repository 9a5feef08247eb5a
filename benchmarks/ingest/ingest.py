"""How fast are segments compressed, against the least that the arithmetic costs?

Compares `ConceptLibrary.ensure` (tokenise, cut, pick anchors, compress, write and fsync to a store on disk) with a bare
batched forward of the same tokens and anchors through the same layers, in turns; and tells whether twice the text
takes twice the time. Embedding for retrieval is not part of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import common
from benchmarks.cells import number, source, spread, table
from compllm_rag.compression.compressor import BATCH_POSITIONS, Compressor, batches
from compllm_rag.library import ConceptLibrary
from compllm_rag.store import MemoryStore


def bare_forward(compressor: Compressor, items: list[tuple[tuple[int, ...], int]]) -> None:
    """The arithmetic alone: the same batches of tokens and anchors through the same layers, nothing else."""
    window = sorted(((0, segment, k) for segment, k in items), key=lambda item: (len(item[1]), item[2]))
    with torch.inference_mode():
        for batch in batches(window, BATCH_POSITIONS[compressor.llm.device.type]):
            length = max(len(segment) for _, segment, _ in batch) + max(k for _, _, k in batch)
            ids = torch.full((len(batch), length), batch[0][1][0], device=compressor.llm.device)
            compressor.decoder(inputs_embeds=compressor.llm.embedding(ids), use_cache=False)


def measure(llm: str, sources: list[str], sizes: list[int], repeats: int, rate: float) -> dict[str, Any]:
    """All of it."""
    compressor = common.trained_like(llm)
    result: dict[str, Any] = {"llm": llm, "layers": compressor.config.layers, "rate": rate, "sizes": {}}
    for size in sizes:
        chunks = common.chunks_of(compressor, sources, size)
        library = ConceptLibrary(compressor, MemoryStore(compressor.hidden_size), rate=rate)
        cut = [library.passage(text) for text in chunks]
        unique = {
            key: (segment, k) for p in cut for key, segment, k in zip(p.keys, p.segments, p.n_concepts, strict=True)
        }
        items = list(unique.values())
        tokens = sum(len(segment) for segment, _ in items)
        common.progress(f"{tokens} tokens in {len(items)} unique segments")
        seconds = common.in_turns(
            {
                "bare": lambda items=items: bare_forward(compressor, items),  # type: ignore[misc]
                "ensure": lambda chunks=chunks: common.compressed(compressor, chunks, rate),  # type: ignore[misc]
            },
            repeats,
        )
        speeds = {name: [tokens / s for s in series] for name, series in seconds.items()}
        result["sizes"][str(size)] = {
            "source_tokens": tokens,
            "segments": len(items),
            "seconds": seconds,
            "tokens_per_s": {name: statistics.median(series) for name, series in speeds.items()},
            "ensure_over_bare": common.median_of_quotients(speeds["ensure"], speeds["bare"]),
        }
    first, last = (result["sizes"][str(size)] for size in (sizes[0], sizes[-1]))
    result["speed_at_largest_over_smallest"] = last["tokens_per_s"]["ensure"] / first["tokens_per_s"]["ensure"]
    return result


def main(argv: Sequence[str] | None = None) -> common.Record:
    """Run it."""
    options = common.parser("ingest", __doc__, "llm repeats texts rate")
    options.add_argument("--sizes", type=int, nargs="+", default=[5000, 10000, 20000], help="source tokens")
    args = common.parsed(options, argv)
    return common.written(args, measure(args.llm, common.texts(args.texts), args.sizes, args.repeats, args.rate))


def tables(record: common.Record) -> list[str]:
    """Lines of the section."""
    rows = [
        [f"{row['source_tokens']:,}", number(row["tokens_per_s"]["ensure"], 0), spread(row["ensure_over_bare"])]
        for row in record["sizes"].values()
    ]
    layers = f"the same {record['layers']} layers" if record["layers"] else "all layers"
    return [
        "## Ingestion",
        "",
        "Compressing into a store on disk (tokenise, cut, choose anchors, compress, write, fsync) against a bare "
        f"batched forward of the same tokens and anchors through {layers}:",
        "",
        f"{source(record)}.",
        "",
        *table(["source tokens", "tokens/s", "of the bare forward's speed (least to most)"], rows),
    ]
