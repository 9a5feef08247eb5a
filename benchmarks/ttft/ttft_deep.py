"""What deep concepts save of the time to the first token: text, concepts at some rates, and the bound of two halves.

The bound is the lower half over the prompt's own tokens and the upper half over them and as many random states: what is
left of a prompt when fetching and laying out take no time. All ways take turns, in another order each round. Beside it:
the KV cache, what a further token takes, on a CPU the resident peak of a process that answers once, and what it costs
to compress, against one bare forward of the layers below the entry layer over the same tokens.

`bench ttft` is this with `--codec deep`, the default; `bench ttft --codec input --help` explains the one for concepts
at the input embeddings. Longer contexts than the LLM reads: `bench ttft_long`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import number, table
from benchmarks.common import (
    Record,
    any_compressor_of,
    dtype_of,
    in_turns,
    journal_of,
    median_of_quotients,
    parsed,
    parser,
    part,
    progress,
    reworded,
    texts,
    written,
)
from benchmarks.memory import cache_bytes
from benchmarks.ttft.peak import resident_peak
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import Narrowing
from compllm_rag.errors import ConfigurationError
from compllm_rag.generation.halves import SplitForward, States, Tokens, split_rows
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.library import ConceptLibrary
from compllm_rag.prompt import PromptPlan, QAPrompt, Span, TextSpan
from compllm_rag.store import DiskStore

QUESTION = "What is the passage mostly about?"
CHUNK = 200  # source tokens
_CHOOSES = {
    "information+surprisal": "one forward of the whole LLM",
    "learned": "one more forward of the lower half",
    "information": "a table",
    "random": "chance",
}
_PARTS = ("fetch_s", "layout_s", "prefill_s")


def chunks(compressor: ConceptCompressor, sources: list[str], length: int) -> list[str]:
    """Chunks of about `CHUNK` tokens, `length` in all, none of them twice."""
    out: list[str] = []
    total = 0
    for text in reworded(sources):
        for unit in compressor.spec.units(text):
            if total >= length:
                return out
            out.append(str(compressor.llm.tokenizer.decode(unit)))
            total += len(unit)
    return out


class Case:
    """A context of one length, warm in a store at every rate.

    Args:
        compressor: Of deep concepts.
        found: The context's chunks.
        rates: Source tokens per concept.
        folder: For the stores.
    """

    def __init__(self, compressor: DeepCompressor, found: list[str], rates: list[float], folder: Path) -> None:
        self.compressor, self.chunks = compressor, found
        self.generator = LocalGenerator(compressor.llm, halves=compressor.halves)
        self.prompt = QAPrompt(compressor.llm.tokenizer)
        self.libraries = {}
        for rate in rates:
            store = DiskStore(folder / f"{len(found)}-{rate:g}", hidden_size=compressor.spec.width)
            self.libraries[rate] = ConceptLibrary(compressor, store, rate=rate)
            self.libraries[rate].ensure(found)
            store.flush()

    def bodies(self, rate: float | None) -> list[list[Span]]:
        """Text of the chunks, or their concepts from the store."""
        library = self.libraries[min(self.libraries) if rate is None else rate]
        if rate is None:
            return [[TextSpan(library.passage(text).ids, i)] for i, text in enumerate(self.chunks)]
        return [[library.fetch(text, missing="error").span(i)] for i, text in enumerate(self.chunks)]

    def plan(self, bodies: Sequence[Sequence[Span]], narrowing: Narrowing | None = None) -> PromptPlan:
        """The prompt."""
        return replace(self.prompt.plan(QUESTION, [("", body) for body in bodies]), narrowing=narrowing)

    def run(self, rate: float | None, narrowing: Narrowing | None = None) -> dict[str, float]:
        """Seconds of each part, once."""
        begun = time.perf_counter()
        bodies = self.bodies(rate)
        fetched = time.perf_counter()
        forward = self.generator.lay_out([self.plan(bodies, narrowing)])
        laid_out = time.perf_counter()
        self.generator.begin(forward).argmax(-1).tolist()
        ended = time.perf_counter()
        return dict(zip(_PARTS, (fetched - begun, laid_out - fetched, ended - laid_out), strict=True))

    def bound(self, rate: float) -> Callable[[], object]:
        """The halves over as many tokens and random states, laid out beforehand."""
        [row] = split_rows([self.plan(self.bodies(rate))])
        scale = self.compressor.spec.scale
        random: list[Tokens | States] = [
            States(torch.randn(item.states.shape) * scale, item.positions) if isinstance(item, States) else item
            for item in row
        ]
        halves = self.generator.halves
        if halves is None:
            raise ConfigurationError("the compressor has no halves", expected="one of deep concepts")
        forward = SplitForward(halves, [random])
        return lambda: forward.prefill().argmax(-1).tolist()

    def afterwards(self, rate: float | None, narrowing: Narrowing | None, steps: int) -> dict[str, Any]:
        """Seconds of a further token, median of `steps`, and bytes of the KV caches behind the prefill."""
        forward: Any = self.generator.lay_out([self.plan(self.bodies(rate), narrowing)])
        token = self.generator.begin(forward).argmax(-1)
        kept, took = cache_bytes(*forward.caches), []
        for _ in range(steps):
            begun = time.perf_counter()
            token = forward.extend(token[:, None])[:, -1].argmax(-1)
            token.tolist()  # waits for a GPU
            took.append(time.perf_counter() - begun)
        return {"kv_bytes": kept, "per_token_s": statistics.median(took) if took else None}


def name_of(rate: float | None, narrowing: Narrowing | None = None) -> str:
    """How passages are read, in keys."""
    name = "text" if rate is None else f"rate {rate:g}"
    return name if narrowing is None else f"{name}, narrowed {narrowing}"


def measure(
    case: Case, rates: list[float], repeats: int, decode: int, narrowings: Sequence[Narrowing] = ()
) -> dict[str, Any]:
    """One context: a row each for text, every rate, and every rate narrowed in each way."""
    runs: dict[str, list[dict[str, float]]] = {}
    ways = [(None, None), *((rate, narrowing) for narrowing in (None, *narrowings) for rate in rates)]

    def call(rate: float | None, narrowing: Narrowing | None) -> None:
        runs.setdefault(name_of(rate, narrowing), []).append(case.run(rate, narrowing))

    calls: dict[str, Callable[[], object]] = {name_of(*way): partial(call, *way) for way in ways}
    calls |= {f"bound {rate:g}": case.bound(rate) for rate in rates}
    seconds = in_turns(calls, repeats, new_order=True)
    rows = []
    for rate, narrowing in ways:
        name = name_of(rate, narrowing)
        plan = case.plan(case.bodies(rate))
        kept = runs[name][1:]  # the first round is not counted
        row: dict[str, Any] = {"rate": rate, "positions": plan.positions, **case.afterwards(rate, narrowing, decode)}
        row |= {} if narrowing is None else {"narrowing": str(narrowing)}
        row |= {part_name: statistics.median(run[part_name] for run in kept) for part_name in _PARTS}
        row["ttft_s"] = statistics.median(seconds[name])
        row["ttft_over_text"] = median_of_quotients(seconds[name], seconds["text"])
        bound = seconds[f"bound {rate:g}"] if rate and narrowing is None else None
        row["ttft_over_bound"] = median_of_quotients(seconds[name], bound) if bound else None
        rows.append(row)
    tokens = sum(len(case.libraries[rates[0]].passage(text).ids) for text in case.chunks)
    return {"source_tokens": tokens, "chunks": len(case.chunks), "rows": rows}


def ingestion(compressor: DeepCompressor, found: list[str], repeats: int) -> dict[str, Any]:
    """Compressing the same units at rates 1 and 2, against a bare forward of the lower half over their tokens."""
    units = [unit for text in found for unit in compressor.spec.units(text)]
    lower, embed = compressor.halves.lower, compressor.llm.embedding
    ids = [torch.tensor([unit], device=compressor.llm.device) for unit in units]

    @torch.inference_mode()
    def bare() -> None:
        for row in ids:
            lower(inputs_embeds=embed(row), use_cache=False)

    calls: dict[str, Callable[[], object]] = {"bare": bare}
    for rate in (1, 2):
        calls[f"rate {rate}"] = partial(compressor.compress, units, [-(-len(unit) // rate) for unit in units])
    seconds = in_turns(calls, repeats, new_order=True)
    tokens = sum(map(len, units))
    return {
        "source_tokens": tokens,
        "bare_over_compress": {name: median_of_quotients(seconds["bare"], seconds[name]) for name in list(calls)[1:]},
        "tokens_per_s": {name: tokens / statistics.median(took) for name, took in seconds.items()},
    }


def peak_task(args: Any, length: int, folder: Path, rate: float | None) -> dict[str, Any]:
    """What `python -m benchmarks.ttft.peak` needs to answer one question over that context."""
    asked = {name: getattr(args, name) for name in ("llm", "reader", "compressor", "codec", "entry_layer", "dtype")}
    texts_of = str(args.texts) if args.texts else None
    return {
        "deep": asked,
        "texts": texts_of,
        "length": length,
        "rates": args.rates,
        "folder": str(folder),
        "rate": rate,
    }


def peak_case(task: dict[str, Any], args: Any, sources: list[str]) -> Callable[[], object]:
    """The answer of a task, everything loaded and every store warm."""
    compressor = _deep(args)
    case = Case(compressor, chunks(compressor, sources, task["length"]), task["rates"], Path(task["folder"]))
    return lambda: case.run(task["rate"])


def _deep(args: Any) -> DeepCompressor:
    """The compressor that options name.

    Raises:
        ConfigurationError: It is of concepts at the input embeddings.
    """
    made = any_compressor_of(args)
    if isinstance(made, DeepCompressor):
        return made
    raise ConfigurationError(
        "this benchmark measures deep concepts",
        got="concepts at the input embeddings",
        next_step="compllm-rag bench ttft --codec input",
    )


def main(argv: Sequence[str] | None = None, name: str = "ttft_deep") -> Record:
    """Run it."""
    options = parser(name, __doc__, "llm reader compressor codec entry-layer dtype repeats texts rates", repeats=5)
    options.set_defaults(rates=[1.0, 2.0, 4.0])
    options.add_argument("--lengths", type=int, nargs="+", default=[250, 1000, 4000, 7500], help="source tokens")
    options.add_argument(
        "--narrow", nargs="*", type=Narrowing.parse, default=[], metavar="LAYER:SHARE", help="narrow concepts, too"
    )
    options.add_argument("--decode", type=int, default=16, help="tokens after the first that are timed; 0: none")
    options.add_argument("--memory", choices=["longest", "all", "none"], default="longest", help="peaks on a CPU")
    args = parsed(options, argv)
    compressor = _deep(args)
    same = {
        "llm": compressor.llm.source,
        "fingerprint": compressor.fingerprint,
        "entry_layer": compressor.config.entry_layer,
        "selector": compressor.config.selector,
        "depth": compressor.spec.depth,
        "dtype": dtype_of(compressor),
        "rates": args.rates,
        "repeats": args.repeats,
        "decode": args.decode,
        "threads": torch.get_num_threads(),
        **({"narrow": list(map(str, args.narrow))} if args.narrow else {}),
    }
    journal = journal_of(args.json, same)
    with tempfile.TemporaryDirectory() as folder:

        def one(length: int) -> dict[str, Any]:
            progress(f"context of {length} tokens")
            case = Case(compressor, chunks(compressor, texts(args.texts), length), args.rates, Path(folder))
            return measure(case, args.rates, args.repeats, args.decode, args.narrow)

        def peaks(length: int) -> dict[str, dict[str, int]]:
            progress(f"peaks at {length} tokens")
            tasks = {rate: peak_task(args, length, Path(folder), rate) for rate in (None, *args.rates)}
            return {name_of(rate): resident_peak(task) for rate, task in tasks.items()}

        lengths = {str(length): part(journal, f"{length} tokens", partial(one, length)) for length in args.lengths}
        wanted = {"longest": [max(args.lengths)], "all": args.lengths, "none": []}[args.memory]
        for length in wanted if compressor.llm.device.type == "cpu" else []:
            found = part(journal, f"peaks at {length} tokens", partial(peaks, length))
            for row in lengths[str(length)]["rows"]:
                if "narrowing" in row:
                    continue
                peak = found[name_of(row["rate"])]
                row["peak_bytes"], row["resident_peak_bytes"] = (
                    peak["peak_bytes"] - peak["before_bytes"],
                    peak["peak_bytes"],
                )
    some = chunks(compressor, texts(args.texts), 2000)
    compressing = part(journal, "ingestion", partial(ingestion, compressor, some, args.repeats))
    return written(args, {**same, "lengths": lengths, "ingestion": compressing})


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    rows, every = [], [row for found in record["lengths"].values() for row in found["rows"]]
    decoded, peaks = any(row.get("per_token_s") for row in every), any("peak_bytes" in row for row in every)
    for found in record["lengths"].values():
        for row in found["rows"]:
            over = row["ttft_over_bound"]
            rows.append(
                [
                    number(found["source_tokens"], 0),
                    _read_as(row),
                    number(row["positions"], 0),
                    number(row["kv_bytes"] / 2**20, 1),
                    *([_mib(row)] if peaks else []),
                    number(row["ttft_s"], 3),
                    *(number(row[name] * 1000, 1) for name in ("fetch_s", "layout_s")),
                    _spread(row["ttft_over_text"]) if row["rate"] else "–",
                    _spread(over) if over else "–",
                    *([number(row["per_token_s"] * 1000, 1)] if decoded else []),
                ]
            )
    head = [
        "source tokens",
        "read as",
        "positions",
        "KV MiB",
        *(["peak MiB"] if peaks else []),
        "TTFT s",
        "fetch ms",
        "layout ms",
        "over text",
        "over bound",
        *(["decode ms / token"] if decoded else []),
    ]
    share = record["ingestion"]["bare_over_compress"]
    speed = record["ingestion"]["tokens_per_s"]
    return [
        "## Time to first token of deep concepts",
        "",
        f"Entry layer {record['entry_layer']} of {record['depth']}, {record['dtype']}, {record['threads']} threads; "
        f"medians of {record['repeats']} rounds, with the least and the most; *over bound* has 1.02 for its goal. "
        f"`{record['command']}`.",
        "",
        *table(head, rows),
        f"Compressing runs at {_spread(share['rate 1'])} of the speed of a bare forward of the lower layers over the "
        f"same tokens at rate 1 ({number(speed['rate 1'], 0)} tokens/s), and at {_spread(share['rate 2'])} at rate 2, "
        f"where {_CHOOSES[record.get('selector', 'information+surprisal')]} chooses the tokens to keep. The goal is "
        "0.80 at rate 1.",
        "",
    ]


def _read_as(row: dict[str, Any]) -> str:
    if row["rate"] is None:
        return "text"
    return f"concepts, rate {row['rate']:g}" + (f", narrowed {row['narrowing']}" if "narrowing" in row else "")


def _mib(row: dict[str, Any]) -> str:
    return number(row["peak_bytes"] / 2**20, 0) if "peak_bytes" in row else "–"


def _spread(found: dict[str, float]) -> str:
    return f"{number(found['median'], 2)} [{number(found['min'], 2)}, {number(found['max'], 2)}]"
