"""How fast are segments compressed, against the least that the arithmetic costs?

Compares `ConceptLibrary.ensure` (tokenise, cut, pick anchors, compress, write and fsync to a store on disk) with a bare
batched forward of the same tokens and anchors through the same layers, in turns; and tells whether twice the text
takes twice the time. Embedding for retrieval is not part of it.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import in_turns, median_of_quotients, parser, progress, texts, trained_like, write
from compllm_rag.compression.compressor import BATCH_POSITIONS, Compressor, batches
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.node_parser import chunk_texts
from compllm_rag.store import DiskStore, MemoryStore


def passages(compressor: Compressor, sources: list[str], n_tokens: int) -> list[str]:
    """Chunks of the texts, about `n_tokens` in all."""
    out: list[str] = []
    total = 0
    for source in itertools.cycle(sources):
        for text, _, _ in chunk_texts(compressor.segmenter.tokenize(source), 200):
            if total >= n_tokens:
                return out
            out.append(text)
            total += len(compressor.segmenter.tokenize(text).ids)
    return out


def bare_forward(compressor: Compressor, items: list[tuple[tuple[int, ...], int]]) -> None:
    """The arithmetic alone: the same batches of tokens and anchors through the same layers, nothing else."""
    window = sorted(((0, segment, k) for segment, k in items), key=lambda item: (len(item[1]), item[2]))
    with torch.inference_mode():
        for batch in batches(window, BATCH_POSITIONS[compressor.llm.device.type]):
            length = max(len(segment) for _, segment, _ in batch) + max(k for _, _, k in batch)
            ids = torch.full((len(batch), length), batch[0][1][0], device=compressor.llm.device)
            compressor.decoder(inputs_embeds=compressor.llm.embedding(ids), use_cache=False)


def ensure(compressor: Compressor, chunks: list[str], rate: float) -> None:
    """Compress chunks into a new store on disk."""
    with tempfile.TemporaryDirectory() as folder:
        store = DiskStore(Path(folder) / "concepts", hidden_size=compressor.hidden_size)
        with store:
            ConceptLibrary(compressor, store, rate=rate).ensure(chunks)
            store.flush()


def measure(llm: str, sources: list[str], sizes: list[int], repeats: int, rate: float) -> dict[str, Any]:
    """All of it."""
    compressor = trained_like(llm)
    result: dict[str, Any] = {"llm": llm, "layers": compressor.config.layers, "rate": rate, "sizes": {}}
    for size in sizes:
        chunks = passages(compressor, sources, size)
        library = ConceptLibrary(compressor, MemoryStore(compressor.hidden_size), rate=rate)
        cut = [library.passage(text) for text in chunks]
        unique = {
            key: (segment, k) for p in cut for key, segment, k in zip(p.keys, p.segments, p.n_concepts, strict=True)
        }
        items = list(unique.values())
        tokens = sum(len(segment) for segment, _ in items)
        progress(f"{tokens} tokens in {len(items)} unique segments")
        seconds = in_turns(
            {
                "bare": lambda items=items: bare_forward(compressor, items),  # type: ignore[misc]
                "ensure": lambda chunks=chunks: ensure(compressor, chunks, rate),  # type: ignore[misc]
            },
            repeats,
        )
        speeds = {name: [tokens / s for s in series] for name, series in seconds.items()}
        result["sizes"][str(size)] = {
            "source_tokens": tokens,
            "segments": len(items),
            "seconds": seconds,
            "tokens_per_s": {name: statistics.median(series) for name, series in speeds.items()},
            "ensure_over_bare": median_of_quotients(speeds["ensure"], speeds["bare"]),
        }
    first, last = (result["sizes"][str(size)] for size in (sizes[0], sizes[-1]))
    result["speed_at_largest_over_smallest"] = last["tokens_per_s"]["ensure"] / first["tokens_per_s"]["ensure"]
    return result


def main() -> None:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("--sizes", type=int, nargs="+", default=[5000, 10000, 20000], help="source tokens")
    options.add_argument("--rate", type=float, default=2.0)
    args = options.parse_args()
    write(measure(args.llm, texts(args.texts), args.sizes, args.repeats, args.rate), args.json)


if __name__ == "__main__":
    main()
