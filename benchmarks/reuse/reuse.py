"""What does a query cost when passages come again? Streams of queries over the same passages, and conversations.

Costs are measured on the LLM at hand (costs.py). The streams are simulated with these costs over real
passages with their own numbers of tokens and concepts and the default prompt's own lines around them, seeded:

- *zipf*: each query draws its passages from a Zipf distribution, in any order, as retrieval gives them;
- *conversations*: each turn keeps what was said and read before and draws one more passage behind it.

Compared are text; concepts, all compressed once at ingestion, or each when it is first read (*lazy*); KV of chunks
computed at ingestion and loaded from disk, only what stands between them prefilled; and all of them with prefix
caching: keys and values of the longest known prefix in whole blocks of 16, as engines such as vLLM do it, and nothing
is ever evicted. Whether an LLM answers well from KV of chunks that never saw each other is not asked here; its cost
alone is. Decoding costs the same per position for all and is left out.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.common import Record, journal_of, parsed, parser, part, progress, texts, timed_compressor, written
from benchmarks.reuse.costs import Costs, measure
from benchmarks.reuse.streams import (
    ANSWER,
    BLOCK,
    PrefixCache,
    Prompt,
    Sizes,
    conversation_stream,
    own_tokens,
    positions,
    sizes_of,
    zipf_stream,
)
from benchmarks.ttft.case import CHUNK, chunks_in

PREFIXES = "text, prefix cache"


class System:
    """A way to answer, and what it has spent.

    Args:
        passages: Prompt positions of each passage.
        ingest_s: Seconds spent before the first query.
        fetch_s: To fetch one passage from disk.
        load_s: To load one position of a passage into the KV cache, in place of prefilling it; None prefills.
        lazy_s: To compress one source token of a passage when it is first read.
        kept_bytes: Kept from ingestion on.
        prefixes: With prefix caching.
        deep: Passages are deep concepts, which pass the upper layers alone.

    Attributes:
        spent: Seconds in all: after ingestion, and after each query.
        prefilled: Positions in all.
    """

    def __init__(
        self,
        passages: tuple[int, ...],
        *,
        ingest_s: float = 0.0,
        fetch_s: float = 0.0,
        load_s: float | None = None,
        lazy_s: float = 0.0,
        kept_bytes: float = 0.0,
        prefixes: bool = False,
        deep: bool = False,
    ) -> None:
        self.passages, self.kept_bytes = passages, kept_bytes
        self.cache = PrefixCache() if prefixes else None
        self.spent, self.prefilled = [ingest_s], 0
        self._fetch_s, self._load_s, self._lazy_s = fetch_s, load_s, lazy_s
        self._seen: set[int] = set()
        self._deep = deep

    def ask(self, prompt: Prompt, sizes: Sizes, costs: Costs) -> None:
        """Answer one prompt."""
        parts = positions(prompt, sizes, self.passages)
        total = sum(n for _, n in parts)
        known = self.cache.hit(parts) if self.cache else 0
        # Passages that lie wholly in the known prefix need neither a fetch nor a load.
        ends = itertools.accumulate(n for _, n in parts)
        read = [p for (_, p), end in zip(prompt, ends, strict=True) if p >= 0 and end > known]
        seconds = self._fetch_s * len(read) + self._lazy_s * sum(sizes.text[p] for p in set(read) - self._seen)
        if self._load_s is not None:
            loaded = min(sum(self.passages[p] for p in read), total - known)
            seconds, known = seconds + self._load_s * loaded, known + loaded
        self._seen |= set(read)
        if self._deep:
            tokens = [own_tokens(prompt, sizes, parts, first) for first in (total, known)]
            reading = costs.read_deep(tokens[0], total, tokens[1], known)
        else:
            reading = costs.read(total, known)
        self.spent.append(self.spent[-1] + seconds + reading)
        self.prefilled += total - known

    def cached_bytes(self, sizes: Sizes, costs: Costs) -> float:
        """What the prefix cache keeps; deep concepts have keys and values in the layers that they pass."""
        if self.cache is None:
            return 0.0
        concepts = self.cache.of_passages - self.cache.passages * sizes.marker if self._deep else 0
        return costs.kv_bytes * (self.cache.positions - (1 - costs.share) * concepts)


def systems_of(sizes: Sizes, costs: Costs) -> dict[str, System]:
    """All that are compared, nothing spent on queries yet."""
    compress_s = costs.compress * sum(sizes.text)
    kv_s = sum(costs.read(n) + costs.kv_store * n / CHUNK for n in sizes.text)
    stored, kv = costs.concept_bytes * sum(sizes.concepts), costs.kv_bytes * sum(sizes.text)
    concepts: dict[str, Any] = {"fetch_s": costs.fetch, "kept_bytes": stored, "deep": costs.upper is not None}
    chunk_kv: dict[str, Any] = {"ingest_s": kv_s, "load_s": costs.kv_load / CHUNK, "kept_bytes": kv}
    return {
        "text": System(sizes.text),
        PREFIXES: System(sizes.text, prefixes=True),
        "concepts": System(sizes.concepts, ingest_s=compress_s, **concepts),
        "concepts, lazy": System(sizes.concepts, lazy_s=costs.compress, **concepts),
        "concepts, prefix cache": System(sizes.concepts, ingest_s=compress_s, **concepts, prefixes=True),
        "chunk KV": System(sizes.text, **chunk_kv),
        "chunk KV, prefix cache": System(sizes.text, **chunk_kv, prefixes=True),
    }


def simulate(stream: Iterator[Prompt], sizes: Sizes, costs: Costs, queries: int) -> dict[str, Any]:
    """Cumulated seconds and positions of every system over a stream; ingestion of all passages first."""
    systems = systems_of(sizes, costs)
    seen: set[int] = set()
    again = total = 0
    for prompt in itertools.islice(stream, queries):
        for p in (p for _, p in prompt if p >= 0):
            total += sizes.text[p]
            again += sizes.text[p] if p in seen else 0
            seen.add(p)
        for system in systems.values():
            system.ask(prompt, sizes, costs)
    marks = sorted({q for q in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, queries) if q <= queries})
    text, cached = systems["text"].spent, systems[PREFIXES].spent
    return {
        "reused": 100 * again / total,
        "passages_read": len(seen),
        "systems": {
            name: {
                "ingest_s": system.spent[0],
                "per_query_s": (system.spent[-1] - system.spent[0]) / queries,
                "positions_per_query": system.prefilled / queries,
                "kept_bytes": system.kept_bytes + system.cached_bytes(sizes, costs),
                "amortised_s": {str(q): system.spent[q] / q for q in marks},
                "breaks_even_with_text": first_below(system.spent, text),
                "breaks_even_with_prefix_cache": first_below(system.spent, cached),
            }
            for name, system in systems.items()
        },
    }


def first_below(mine: list[float], theirs: list[float]) -> int | None:
    """The query from which on the cumulated cost is less for good; None if it is not by the end."""
    if mine[-1] >= theirs[-1]:
        return None
    return next(q for q in range(len(mine), 0, -1) if q == 1 or mine[q - 1] >= theirs[q - 1])


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser("reuse", __doc__, "llm codec repeats texts rate", repeats=3)
    options.add_argument("--k", type=int, default=4, help="passages of a query")
    options.add_argument("--turns", type=int, default=4, help="of a conversation")
    options.add_argument("--exponent", type=float, default=1.0, help="of the Zipf distribution")
    options.add_argument("--queries", type=int, default=1000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 512, 1024, 1536], help="of the prefills")
    args = parsed(options, argv)
    compressor = timed_compressor(args.llm, args.codec)
    sources = texts(args.texts)
    n_tokens = sum(len(compressor.spec.segmenter.tokenize(text).ids) for text in sources)
    chunks = chunks_in(compressor, sources, n_tokens)
    sizes = sizes_of(compressor, chunks, args.rate)
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    same = {
        "llm": compressor.llm.source,
        "fingerprint": compressor.fingerprint,
        "entry_layer": compressor.config.entry_layer,
        "passages": len(chunks),
        "source_tokens": sum(sizes.text),
        "concepts": sum(sizes.concepts),
        **{name: getattr(args, name) for name in ("rate", "lengths", "repeats")},
        "measured_on": torch.cuda.get_device_name() if compressor.llm.device.type == "cuda" else threads,
    }
    # Streams are simulated anew in any case.
    make = partial(measure, compressor, chunks, args.rate, args.lengths, args.repeats)
    found, rounds = part(journal_of(args.json, same), "costs", make)
    costs = Costs(**found)
    streams = {
        "zipf": zipf_stream(len(chunks), args.k, args.exponent, args.seed),
        "conversations": conversation_stream(len(chunks), args.k, args.exponent, args.seed, args.turns),
    }
    simulated = {}
    for name, stream in streams.items():
        progress(f"stream {name}, {args.queries} queries")
        simulated[name] = simulate(stream, sizes, costs, args.queries)
    drawn = {name: getattr(args, name) for name in ("k", "turns", "exponent", "queries", "seed")}
    record = {**same, "costs": found, "costs_all_s": rounds, **drawn}
    return written(args, {**record, "answer": ANSWER, "block": BLOCK, "streams": simulated})
