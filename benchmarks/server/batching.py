"""What do several queries cost that come at the same time, against the same queries one after the other?

Each query has passages of its own, warm in a store, read as text or as deep concepts. One after the other they are
answered by `LocalGenerator`, at the same time by `BatchingGenerator` from as many threads. Answers go on to
`--tokens` whatever the LLM says, so that all ways make as many; all ways take turns, in another order each round.
Beside wall time stands the CPU time of the process: that is what can be trusted while other processes want the cores.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llama_index.core.schema import NodeWithScore, TextNode

from benchmarks.cells import number, source, table
from benchmarks.common import Record, any_compressor_of, chunks_of, parsed, parser, progress, texts, written
from compllm_rag.cli.demo import sample_questions
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig, Mode
from compllm_rag.generation.base import Generator
from compllm_rag.generation.batching import BatchingGenerator
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.generation.scheduler import Scheduler
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.synthesizer import ConceptSynthesizer
from compllm_rag.store import DiskStore

MODES: tuple[Mode, ...] = ("text", "concepts")
CHUNK = 200  # source tokens, about


class Queries:
    """Questions, each with passages of its own.

    Args:
        compressor: Its LLM answers.
        store: Warm.
        passages: Of each question.
        rate: Source tokens per concept.
        tokens: Of each answer.
    """

    def __init__(
        self, compressor: ConceptCompressor, store: DiskStore, passages: list[list[str]], rate: float, tokens: int
    ) -> None:
        self._compressor, self._store, self._rate = compressor, store, rate
        self._limit = GenerationConfig(max_new_tokens=tokens)
        rows = sample_questions()
        self._asked = [
            (
                str(rows[n % len(rows)]["question"]),
                [NodeWithScore(node=TextNode(text=text, id_=f"{n}.{i}"), score=1.0) for i, text in enumerate(found)],
            )
            for n, found in enumerate(passages)
        ]
        self._local = LocalGenerator(compressor.llm, self._limit, halves=compressor.halves)

    def one_by_one(self, n: int, mode: Mode) -> dict[str, Any]:
        """The first n of them, one after the other."""
        ask = self._asking(self._local, mode)
        begun = _now()
        return _summed(begun, [ask(number) for number in range(n)])

    def together(self, n: int, mode: Mode) -> dict[str, Any]:
        """The first n of them, from as many threads."""
        scheduler = Scheduler(n)
        ask = self._asking(BatchingGenerator.over(self._local, scheduler), mode)
        with ThreadPoolExecutor(n) as threads:
            begun = _now()
            made = _summed(begun, list(threads.map(ask, range(n))))
        [steps] = scheduler.measures.step_rows.collect()
        sums = {sample.name.rsplit("_", 1)[-1]: sample.value for sample in steps.samples}
        return made | {"rows_per_step": sums["sum"] / max(1.0, sums["count"])}

    def _asking(self, generator: Generator, mode: Mode) -> Any:
        # Anew, so that no passage is remembered: a query usually meets others.
        library = ConceptLibrary(self._compressor, self._store, rate=self._rate)
        synthesizer = ConceptSynthesizer(library, generator, mode=mode, generation=self._limit, overflow="error")

        def ask(n: int) -> dict[str, Any]:
            question, nodes = self._asked[n]
            account: dict[str, Any] = (synthesizer.synthesize(question, nodes).metadata or {})["compllm"]
            if account["store"]["misses"] or account["new_tokens"] != self._limit.max_new_tokens:
                raise RuntimeError(f"the store was not warm, or an answer ended early: {account}")
            return account

        return ask


def measure(args: Any) -> dict[str, Any]:
    """All of it."""
    compressor = any_compressor_of(args)
    compressor.llm.stop_ids = set  # type: ignore[method-assign]  # answers go on to the limit
    most = max(*args.concurrent, args.sequential)
    found = chunks_of(compressor, texts(args.texts), most * args.top_k * CHUNK * 2)[: most * args.top_k]
    passages = [found[n * args.top_k : (n + 1) * args.top_k] for n in range(most)]
    ways = [("one by one", args.sequential), *(("together", n) for n in args.concurrent)]
    rounds: dict[tuple[Mode, str, int], list[dict[str, Any]]] = {(m, *way): [] for m in args.modes for way in ways}
    with (
        tempfile.TemporaryDirectory() as folder,
        DiskStore(Path(folder) / "concepts", hidden_size=compressor.spec.width) as store,
    ):
        ConceptLibrary(compressor, store, rate=args.rate).ensure(found)
        store.flush()
        queries = Queries(compressor, store, passages, args.rate, args.tokens)
        for mode in args.modes:  # what is made at the first answer alone is not counted
            queries.together(1, mode)
        for round_ in range(args.repeats):
            for mode, way, n in random.Random(round_).sample(list(rounds), len(rounds)):
                ask = queries.one_by_one if way == "one by one" else queries.together
                made = ask(n, mode)
                rounds[mode, way, n].append(made)
                progress(f"round {round_ + 1} of {args.repeats}: {n} {way} as {mode}, {made['seconds']:.1f} s")
    return {
        "llm": args.llm,
        "rate": args.rate,
        "top_k": args.top_k,
        "tokens": args.tokens,
        "modes": {mode: _rows(rounds, mode, args) for mode in args.modes},
    }


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _summed(begun: tuple[float, float], accounts: list[dict[str, Any]]) -> dict[str, Any]:
    seconds, cpu_s = (now - then for now, then in zip(_now(), begun, strict=True))
    return {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "prompt_positions": statistics.mean(account["prompt_positions"] for account in accounts),
        "ttft_s": statistics.median(account["ttft_s"] + account["queue_s"] for account in accounts),
    }


def _rows(rounds: dict[tuple[Mode, str, int], list[dict[str, Any]]], mode: Mode, args: Any) -> dict[str, Any]:
    one_by_one = rounds[mode, "one by one", args.sequential]
    alone, cpu_alone = (statistics.median(made[name] for made in one_by_one) for name in ("seconds", "cpu_s"))
    rows: dict[str, Any] = {}
    for n in args.concurrent:
        made = rounds[mode, "together", n]
        seconds, cpu_s = (statistics.median(each[name] for each in made) for name in ("seconds", "cpu_s"))
        rows[str(n)] = {
            "seconds": seconds,
            "per_query_of_sequential": seconds / n / (alone / args.sequential),
            "of_sequential": seconds / alone,
            "cpu_s": cpu_s,
            "cpu_of_sequential": cpu_s / cpu_alone,
            "ttft_s": statistics.median(each["ttft_s"] for each in made),
            "rows_per_step": statistics.median(each["rows_per_step"] for each in made),
        }
    return {
        "prompt_positions": one_by_one[0]["prompt_positions"],
        "sequential": {
            "queries": args.sequential,
            "seconds": alone,
            "cpu_s": cpu_alone,
            "ttft_s": statistics.median(made["ttft_s"] for made in one_by_one),
        },
        "concurrent": rows,
    }


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser(
        "batching", __doc__, "llm repeats texts rate reader compressor codec entry-layer dtype", rate=1.0, repeats=3
    )
    options.add_argument("--concurrent", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="queries at the same time")
    options.add_argument("--sequential", type=int, default=4, help="queries one after the other, to compare with")
    options.add_argument("--top-k", type=int, default=2, help="passages of a query")
    options.add_argument("--tokens", type=int, default=128, help="of each answer")
    options.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="how passages are read")
    args = parsed(options, argv)
    return written(args, measure(args))


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    rows = []
    for mode, found in record["modes"].items():
        alone = found["sequential"]
        rows.append(
            [mode, f"{alone['queries']} one by one", f"{number(alone['seconds'], 1)} s", "1.00", "1.00", "1.00", "1.0"]
        )
        rows += [
            [
                mode,
                f"{n} together",
                f"{number(row['seconds'], 1)} s",
                number(row["of_sequential"], 2),
                number(row["cpu_of_sequential"], 2),
                number(row["per_query_of_sequential"], 2),
                number(row["rows_per_step"], 1),
            ]
            for n, row in found["concurrent"].items()
        ]
    first = next(iter(record["modes"].values()))["sequential"]["queries"]
    head = [
        "read as",
        "queries",
        "all answered after",
        f"of {first} one by one",
        "in CPU time",
        "a query, of one alone",
        "rows a step",
    ]
    return [
        "## Queries at the same time",
        "",
        f"Each query reads {record['top_k']} passages of about {CHUNK} tokens of its own and is answered by "
        f"{record['tokens']} tokens. One by one: `LocalGenerator`; together: `BatchingGenerator`. Below 1, so many "
        f"together are answered sooner than {first} one by one.",
        "",
        f"{source(record)}.",
        "",
        *table(head, rows),
    ]
