"""How fast are segments compressed, against the least that the arithmetic costs?

Compares `ConceptLibrary.ensure` (tokenise, cut, choose what to keep, compress, write and fsync to a store on disk) with
a bare batched forward of the same tokens through the same layers, in turns; and tells whether twice the text takes
twice the time. Of deep concepts these are the layers below the entry layer over the chunks alone, so that the opening
in front of each and the choice of tokens at rates above 1 count as losses; the goal is 80 % at rate 1. With
`--codec input` the anchors are part of the bare forward. Embedding for retrieval is not part of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import common
from benchmarks.cells import number, source, spread, table
from compllm_rag.compression.compressor import BATCH_POSITIONS, Compressor, batches
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import DEFAULT_RATES, Codec
from compllm_rag.library import ConceptLibrary
from compllm_rag.store import MemoryStore

Items = list[tuple[tuple[int, ...], int]]  # segments, or units of deep concepts, and K of each


def bare_forward(compressor: ConceptCompressor, items: Items) -> None:
    """The arithmetic alone: the same batches through the same layers, nothing else."""
    if isinstance(compressor, DeepCompressor):
        _bare_lower(compressor, items)
    elif isinstance(compressor, Compressor):
        _bare_input(compressor, items)


@torch.inference_mode()
def _bare_lower(compressor: DeepCompressor, items: Items) -> None:
    limit, embed = BATCH_POSITIONS[compressor.llm.device.type], compressor.llm.embedding
    rows = sorted((segment for segment, _ in items), key=len)
    while rows:
        # The longest of a batch is its last.
        size = max((n for n in range(1, len(rows) + 1) if n * len(rows[n - 1]) <= limit), default=1)
        ids = torch.full((size, len(rows[size - 1])), rows[0][0], device=compressor.llm.device)
        compressor.halves.lower(inputs_embeds=embed(ids), use_cache=False)
        del rows[:size]


def _bare_input(compressor: Compressor, items: Items) -> None:
    window = sorted(((0, segment, k) for segment, k in items), key=lambda item: (len(item[1]), item[2]))
    with torch.inference_mode():
        for batch in batches(window, BATCH_POSITIONS[compressor.llm.device.type]):
            length = max(len(segment) for _, segment, _ in batch) + max(k for _, _, k in batch)
            ids = torch.full((len(batch), length), batch[0][1][0], device=compressor.llm.device)
            compressor.decoder(inputs_embeds=compressor.llm.embedding(ids), use_cache=False)


def measure(llm: str, codec: Codec, sources: list[str], sizes: list[int], repeats: int, rate: float) -> dict[str, Any]:
    """All of it."""
    compressor = common.timed_compressor(llm, codec)
    config = compressor.config
    result: dict[str, Any] = {"llm": llm, "entry_layer": config.entry_layer, "layers": config.layers, "rate": rate}
    result |= {"selector": config.selector if config.deep else None, "sizes": {}}
    for size in sizes:
        chunks = common.chunks_of(compressor, sources, size)
        library = ConceptLibrary(compressor, MemoryStore(compressor.spec.width), rate=rate)
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
    options = common.parser("ingest", __doc__, "llm codec repeats texts rate", rate=None)
    options.add_argument("--sizes", type=int, nargs="+", default=[5000, 10000, 20000], help="source tokens")
    args = common.parsed(options, argv)
    rate = DEFAULT_RATES[args.codec] if args.rate is None else args.rate
    found = measure(args.llm, args.codec, common.texts(args.texts), args.sizes, args.repeats, rate)
    return common.written(args, found)


def tables(record: common.Record) -> list[str]:
    """Lines of the section."""
    rows = [
        [f"{row['source_tokens']:,}", number(row["tokens_per_s"]["ensure"], 0), spread(row["ensure_over_bare"])]
        for row in record["sizes"].values()
    ]
    layers = f"the same {record['layers']} layers" if record["layers"] else "all layers"
    deep = record.get("entry_layer", 0)
    told = f"tokens and anchors through {layers}:"
    if deep:
        told = f"tokens through the {deep} layers below the entry layer, at rate {record['rate']:g} (selector "
        told += f"`{record['selector']}`). The goal is 0.80 at rate 1:"
    return [
        "## Ingestion of deep concepts" if deep else "## Ingestion",
        "",
        "Compressing into a store on disk (tokenise, cut, choose what to keep, compress, write, fsync) against a bare "
        f"batched forward of the same {told}",
        "",
        f"{source(record)}.",
        "",
        *table(["source tokens", "tokens/s", "of the bare forward's speed (least to most)"], rows),
    ]
