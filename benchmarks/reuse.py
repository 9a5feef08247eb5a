"""What does a query cost when passages come again? Streams of queries over the same passages, and conversations.

Costs are measured on the LLM at hand: prefill by length, compressing a token, fetching a chunk's concepts, storing and
loading a chunk's KV cache. The streams are simulated with these costs over real passages, seeded:

- *zipf*: each query draws its passages from a Zipf distribution, in any order, as retrieval gives them;
- *conversations*: each turn keeps what was said and read before and draws one more passage behind it.

Compared are text; text with prefix caching (keys and values of the longest known prefix in whole blocks of 16, as
engines such as vLLM do it, and nothing is ever evicted); concepts, with and without prefix caching, all compressed
once at ingestion; and chunk KV computed at ingestion, loaded from disk, only the question prefilled. Whether an LLM
answers well from KV of chunks that never saw each other is not asked here; its cost alone is.
"""

from __future__ import annotations

import itertools
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import parser, progress, texts, timed, trained_like, write
from benchmarks.ttft import CHUNK, Case
from compllm_rag.compressor import Compressor
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.library import ConceptLibrary
from compllm_rag.prompt import PromptInputs
from compllm_rag.store import DiskStore, MemoryStore

BLOCK = 16
HEAD, QUESTION, ANSWER = 40, 20, 20  # positions of the system turn, of a question, of an answer


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes, measured.

    Attributes:
        prefill: (constant, per position, per position squared).
        compress: Per source token.
        fetch: Of one chunk's concepts from disk.
        kv_load: Of one chunk's KV cache from disk.
        kv_store: Of one chunk's KV cache to disk.
        kv_bytes: Of the KV cache of one source token.
        concept_bytes: Of the concepts of one source token.
    """

    prefill: tuple[float, float, float]
    compress: float
    fetch: float
    kv_load: float
    kv_store: float
    kv_bytes: float
    concept_bytes: float

    def read(self, positions: int, known: int = 0) -> float:
        """Seconds to prefill a prompt of which the first `known` positions are in a KV cache."""
        constant, linear, squared = self.prefill
        return constant + linear * (positions - known) + squared * (positions**2 - known**2)


def measure(compressor: Compressor, chunks: list[str], rate: float, lengths: list[int], repeats: int) -> Costs:
    """All costs, each the median of its rounds."""
    generator, llm = LocalGenerator(compressor.llm), compressor.llm

    def inputs(n: int) -> PromptInputs:
        noise = torch.randn(1, n, llm.hidden_size, device=llm.device) * 0.02
        return PromptInputs(noise.to(llm.dtype), None, None, [[]])

    def prefill(n: int) -> Callable[[], object]:
        ready = inputs(n)
        return lambda: generator.prefill(ready)

    calls = {n: prefill(n) for n in lengths}
    seconds: dict[int, list[float]] = {n: [] for n in lengths}
    for round_ in range(repeats + 1):
        for n in random.Random(round_).sample(lengths, len(lengths)):
            took = timed(calls[n])
            seconds[n] += [took] if round_ else []
        progress(f"prefill, round {round_} of {repeats}")
    few = chunks[:10]
    with tempfile.TemporaryDirectory() as folder:
        store = DiskStore(Path(folder) / "c", hidden_size=llm.hidden_size)
        library = ConceptLibrary(compressor, store, rate=rate)
        library.ensure(few)
        fetch = _median(lambda: [library.fetch(text) for text in few], repeats) / len(few)
        compress = _median(
            lambda: ConceptLibrary(compressor, MemoryStore(llm.hidden_size), rate=rate).ensure(few), repeats
        )
        tokens = sum(len(library.passage(text).ids) for text in few)
        concepts = sum(sum(library.passage(text).n_concepts) for text in few)
        _, cache = generator.prefill(inputs(CHUNK))
        kept = {
            f"{kind}{i}": tensor.half().contiguous()  # as concepts are kept
            for i, layer in enumerate(cache.layers)
            for kind, tensor in (("k", layer.keys), ("v", layer.values))
        }
        paths = [Path(folder) / f"{i}.safetensors" for i in range(len(few))]
        kv_store = _median(lambda: [save_file(kept, path) for path in paths], repeats) / len(few)
        kv_load = _median(lambda: [_touched(load_file(path)) for path in paths], repeats) / len(few)
    medians = [statistics.median(seconds[n]) for n in lengths]
    return Costs(
        fit(lengths, medians),
        compress / tokens,
        fetch,
        kv_load,
        kv_store,
        sum(t.numel() * t.element_size() for t in kept.values()) / CHUNK,
        2 * llm.hidden_size * concepts / tokens,
    )


def fit(lengths: list[int], seconds: list[float]) -> tuple[float, float, float]:
    """Constant, linear and squared cost of a prefill, none of them negative."""
    from scipy.optimize import nnls

    n = np.array(lengths, dtype=np.float64)
    rows = np.stack([np.ones_like(n), n, n**2], axis=1) / np.array(seconds)[:, None]  # relative errors count
    found, _ = nnls(rows, np.ones(len(n)))
    return float(found[0]), float(found[1]), float(found[2])


def _median(call: Callable[[], object], repeats: int) -> float:
    return statistics.median(timed(call) for _ in range(max(1, repeats)))


def _touched(tensors: dict[str, torch.Tensor]) -> float:
    """Read every page: what is mapped and never touched is not loaded."""
    return sum(float(tensor.view(torch.uint8).sum()) for tensor in tensors.values())


Prompt = list[tuple[str, int]]  # what stands there, and its source tokens (0: not a passage)


def zipf_stream(tokens: list[int], k: int, exponent: float, seed: int) -> Iterator[tuple[Prompt, bool]]:
    """Prompts of independent queries; every one is new."""
    rng = random.Random(seed)
    order = rng.sample(range(len(tokens)), len(tokens))
    weights = [1 / (rank + 1) ** exponent for rank in range(len(tokens))]
    for number in itertools.count():
        drawn: list[int] = []
        while len(drawn) < k:
            passage = rng.choices(order, weights)[0]
            drawn += [passage] if passage not in drawn else []
        yield [("head", 0), *((f"p{p}", tokens[p]) for p in drawn), (f"q{number}", 0)], True


def conversation_stream(
    tokens: list[int], k: int, exponent: float, seed: int, turns: int
) -> Iterator[tuple[Prompt, bool]]:
    """Prompts of conversations: k passages and a question, then each turn one more passage and question."""
    source = zipf_stream(tokens, k + turns - 1, exponent, seed)
    for number in itertools.count():
        passages = next(source)[0][1:-1]
        prompt: Prompt = [("head", 0), *passages[:k], (f"q{number}.0", 0)]
        yield prompt, True
        for turn in range(1, turns):
            prompt = [*prompt, (f"a{number}.{turn}", 0), passages[k + turn - 1], (f"q{number}.{turn}", 0)]
            yield prompt, False


def positions(prompt: Prompt, rate: float) -> list[tuple[str, int]]:
    """Parts with their prompt positions, passages at a rate (1 for text)."""
    made = []
    for name, tokens in prompt:
        fixed = {"h": HEAD, "q": QUESTION, "a": ANSWER}.get(name[0], 0)
        made.append((name, fixed or max(1, round(tokens / rate))))
    return made


class PrefixCache:
    """Prefixes that were prefilled; nothing is evicted, which favours it."""

    def __init__(self) -> None:
        self._known: set[tuple[str, ...]] = set()

    def hit(self, parts: list[tuple[str, int]]) -> int:
        """Positions of the longest known prefix, in whole blocks; the prompt is known afterwards."""
        names, best, total = [name for name, _ in parts], 0, 0
        for at, (_, size) in enumerate(parts, 1):
            total += size
            prefix = tuple(names[:at])
            best = total if prefix in self._known else best
            self._known.add(prefix)
        return best // BLOCK * BLOCK


def simulate(
    stream: Iterator[tuple[Prompt, bool]], tokens: list[int], costs: Costs, rate: float, queries: int
) -> dict[str, Any]:
    """Cumulated seconds and positions of every system over a stream; ingestion of all passages first."""
    everything = sum(tokens)
    upfront = {
        "text": 0.0,
        "text, prefix cache": 0.0,
        "concepts": costs.compress * everything,
        "concepts, prefix cache": costs.compress * everything,
        "chunk KV": sum(costs.read(n) + costs.kv_store * n / CHUNK for n in tokens),
    }
    caches = {"text, prefix cache": PrefixCache(), "concepts, prefix cache": PrefixCache()}
    spent = {name: [seconds] for name, seconds in upfront.items()}
    prefilled = dict.fromkeys(upfront, 0)
    seen: set[str] = set()
    again = total = 0
    for prompt, _ in itertools.islice(stream, queries):
        text, short = positions(prompt, 1), positions(prompt, rate)
        n_text, n_short = sum(n for _, n in text), sum(n for _, n in short)
        read = [(name, n) for name, n in prompt if n]
        for name, n in read:
            total += n
            again += n if name in seen else 0
            seen.add(name)
        known = {
            "text, prefix cache": caches["text, prefix cache"].hit(text),
            "concepts, prefix cache": caches["concepts, prefix cache"].hit(short),
        }
        loaded = sum(n for _, n in read)
        per_query = {
            "text": (costs.read(n_text), n_text),
            "text, prefix cache": (
                costs.read(n_text, known["text, prefix cache"]),
                n_text - known["text, prefix cache"],
            ),
            "concepts": (costs.read(n_short) + costs.fetch * len(read), n_short),
            "concepts, prefix cache": (
                costs.read(n_short, known["concepts, prefix cache"]) + costs.fetch * len(read),
                n_short - known["concepts, prefix cache"],
            ),
            "chunk KV": (costs.read(n_text, loaded) + costs.kv_load * loaded / CHUNK, n_text - loaded),
        }
        for name, (seconds, n) in per_query.items():
            spent[name].append(spent[name][-1] + seconds)
            prefilled[name] += n
    marks = sorted({q for q in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, queries) if q <= queries})
    return {
        "reused": 100 * again / total,
        "systems": {
            name: {
                "ingest_s": upfront[name],
                "per_query_s": (series[-1] - series[0]) / queries,
                "positions_per_query": prefilled[name] / queries,
                "amortised_s": {str(q): series[q] / q for q in marks},
                "breaks_even_with_text": _first_below(series, spent["text"]),
                "breaks_even_with_prefix_cache": _first_below(series, spent["text, prefix cache"]),
            }
            for name, series in spent.items()
        },
    }


def _first_below(mine: list[float], theirs: list[float]) -> int | None:
    """The query from which on the cumulated cost is less for good; None if it is not by the end."""
    if mine[-1] >= theirs[-1]:
        return None
    return next(q for q in range(len(mine), 0, -1) if q == 1 or mine[q - 1] >= theirs[q - 1])


def main() -> None:
    """Run it."""
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--rate", type=float, default=2.0)
    options.add_argument("--k", type=int, default=4, help="passages of a query")
    options.add_argument("--turns", type=int, default=4, help="of a conversation")
    options.add_argument("--exponent", type=float, default=1.0, help="of the Zipf distribution")
    options.add_argument("--queries", type=int, default=1000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 512, 1024, 1536], help="of the prefills")
    args = options.parse_args()
    compressor = trained_like(args.llm)
    sources = texts(args.texts)
    n_tokens = sum(len(compressor.segmenter.tokenize(text).ids) for text in sources)
    with tempfile.TemporaryDirectory() as folder:
        chunks = Case(compressor, sources, n_tokens, [], Path(folder)).chunks
    tokens = [len(compressor.segmenter.tokenize(text).ids) for text in chunks]
    costs = measure(compressor, chunks, args.rate, args.lengths, args.repeats)
    streams = {
        "zipf": zipf_stream(tokens, args.k, args.exponent, args.seed),
        "conversations": conversation_stream(tokens, args.k, args.exponent, args.seed, args.turns),
    }
    settings = {name: getattr(args, name) for name in ("rate", "k", "turns", "exponent", "queries", "seed")}
    found = {name: simulate(stream, tokens, costs, args.rate, args.queries) for name, stream in streams.items()}
    result = {"llm": compressor.llm.source, "passages": len(tokens), "source_tokens": sum(tokens), **settings}
    write({**result, "costs": vars(costs), "streams": found}, args.json)


if __name__ == "__main__":
    main()
