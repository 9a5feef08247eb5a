"""Text top-k against more passages as concepts at equal cost: which answers better?

On paragraphs of SQuAD dev as a corpus, or on a set of LOFT: the top k documents as text for several k, and more of them
as concepts, are scored on the same questions, and the TTFT of each setting is measured on some of them, all settings in
turns, from a warm store on disk. For each k as text the setting of concepts with the most equal prompt positions, the
one whose prefill is nearest by arithmetic (deep concepts pass the layers from their entry layer on alone), and the one
with the most equal TTFT, are compared with it, paired over questions. `--rivals` puts passages pruned to the kept
tokens, and deep concepts at random places, beside them, at equal positions and prefill.

Settings that are done are kept beside the JSON (OUT.records.jsonl) and not asked again.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.schema import NodeWithScore, TextNode

from benchmarks.common import Tenths, journal_of, parsed, parser, part, progress, written
from benchmarks.loft.data import SQUAD, load, squad
from benchmarks.loft.in_context import read_by
from benchmarks.loft.loft import open_storage, passages, ranking, recall
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig, Mode
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Bodies, Segmented, Setting
from compllm_rag.evaluation.questions import Question
from compllm_rag.evaluation.results import EvalConfig
from compllm_rag.evaluation.runner import in_seeded_order
from compllm_rag.evaluation.statistics import statistics as summary
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.synthesizer import ConceptSynthesizer
from compllm_rag.prompt import QAPrompt, TextSpan
from compllm_rag.store import DiskStore

_RESAMPLES = 1000
Row = dict[str, Any]


Counts = Mapping[tuple[float | None, int], float]


def settings(
    text_ks: Sequence[int],
    rates: Sequence[float],
    positions: Counts,
    full: Counts | None = None,
    rivals: Sequence[str] = (),
) -> list[tuple[str, float | None, int]]:
    """(mode, rate, k): each k as text; as concepts each k, and those whose prompts are nearest to text's in cost.

    Args:
        text_ks: Documents read as text.
        rates: Of concepts.
        positions: Mean prompt positions by rate (None is text) and k.
        full: The same, each counted by the share of the layers that it passes; None: all pass all.
        rivals: Further modes, of each the one k whose prompts are nearest to each of text's in prefill.
    """
    made: list[tuple[str, float | None, int]] = [("text", None, k) for k in text_ks]
    for rate in rates:
        ks = [k for at, k in positions if at == rate]
        equal = {
            min(ks, key=lambda k: abs(np.log(cost[rate, k] / cost[None, t])))
            for t in text_ks
            for cost in (positions, full or positions)
        }
        made += [("concepts", rate, k) for k in sorted(equal | (set(text_ks) & set(ks)))]
        for rival in rivals if rate > 1 else ():  # at rate 1 nothing is dropped: they are text, and concepts
            own = positions if rival == "pruned" or full is None else full  # tokens pass all layers
            near = {min(ks, key=lambda k: abs(np.log(own[rate, k] / own[None, t]))) for t in text_ks}
            made += [(rival, rate, k) for k in sorted(near)]
    return made


def mean_positions(
    compressor: ConceptCompressor, asked: Mapping[int, Sequence[Question]], rates: Sequence[float], share: float = 1.0
) -> dict[tuple[float | None, int], float]:
    """Mean prompt positions by rate (None is text) and k, counted without compressing anything.

    Args:
        compressor: Cuts texts, and says how many concepts they take.
        asked: By k, questions over their first k documents.
        rates: Of concepts.
        share: What a concept counts, tokens counting 1; see `passed`.
    """
    prompt, segmented = QAPrompt(compressor.llm.tokenizer), Segmented(compressor)
    bodies: dict[float | None, Bodies] = {None: Bodies(compressor, Setting("text"), segmented)}
    bodies |= {rate: Bodies(compressor, Setting("concepts", rate), segmented) for rate in rates}

    def length(question: Question, body: Bodies, each: float) -> float:
        shown = [(p.title, [TextSpan((0,) * body.size(p.text))]) for p in question.passages]
        concepts = sum(body.size(p.text) for p in question.passages)
        return prompt.plan(question.question, shown).positions - (1 - each) * concepts

    return {
        (rate, k): statistics.fmean(length(question, body, 1.0 if rate is None else share) for question in questions)
        for rate, body in bodies.items()
        for k, questions in asked.items()
    }


def passed(compressor: ConceptCompressor) -> float:
    """The share of the LLM's layers that a concept passes."""
    return compressor.spec.prefill_cost(1.0)


def quality(
    compressor: ConceptCompressor, asked: list[Question], mode: str, rate: float | None, config: EvalConfig
) -> Row:
    """One setting's metrics, and F1 question by question in the order of the ids.

    Only this setting is asked: `evaluate_many` would read the text again for every one.

    Raises:
        PromptTooLongError: A question does not fit the window.
    """
    generation = GenerationConfig(max_new_tokens=config.max_new_tokens)
    asker = Asker(compressor, Setting.of(mode, rate), Segmented(compressor), generation)
    show = Tenths()
    done = asker.ask(asked, batch_size=config.batch_size, answer=True, progress=lambda n: show(mode, n / len(asked)))
    found = summary(done, done, done)
    names = ("f1", "em", "subspan_em", "nll", "positions", "achieved_rate")
    share = passed(compressor) if mode in ("concepts", "random") else 1.0
    whole = statistics.fmean(r.positions - (1 - share) * (r.concepts or 0) for r in done)
    by_id = {r.id: round(r.f1 or 0.0, 4) for r in sorted(done, key=lambda r: r.id)}
    values = {name: found.values[name] for name in names}
    return {
        "n": len(done),
        **values,
        "full_positions": whole,
        "interval": found.intervals["f1"],
        "f1_by_question": by_id,
    }


def ttft(
    libraries: dict[float, ConceptLibrary], asked: dict[int, list[Question]], rows: list[Row], rounds: int
) -> None:
    """Seconds until the first token of each setting, all of them in turns in a new order each round.

    Args:
        libraries: By rate, with the concepts of the questions' documents.
        asked: By k, the questions that are timed.
        rows: Settings; `ttft_s` (median) and `ttft_all_s` are added to each.
        rounds: Times through all settings and questions; one more goes before and does not count.
    """
    one, order = GenerationConfig(max_new_tokens=1), list(range(len(rows)))
    seconds: list[list[float]] = [[] for _ in rows]
    for round_ in range(rounds + 1):
        random.Random(round_).shuffle(order)
        for number in order:
            row = rows[number]
            library, mode = libraries[row["rate"] or min(libraries)], row["mode"]
            for question in asked[row["k"]]:
                took = _first_token(library, question, mode, one)
                if round_:
                    seconds[number].append(took)
        progress(f"TTFT, round {round_} of {rounds}")
    for row, series in zip(rows, seconds, strict=True):
        row["ttft_s"], row["ttft_all_s"] = statistics.median(series), [round(s, 4) for s in series]


def _first_token(library: ConceptLibrary, question: Question, mode: Mode, generation: GenerationConfig) -> float:
    nodes = [NodeWithScore(node=TextNode(text=p.text, metadata={"title": p.title})) for p in question.passages]
    synthesizer = ConceptSynthesizer(library, mode=mode, generation=generation, overflow="error")
    response = synthesizer.synthesize(question.question, nodes)
    return float((response.metadata or {})["compllm"]["ttft_s"])


def pairs(rows: list[Row], cost: str, seed: int = 0, mode: str = "concepts") -> list[Row]:
    """For each k as text the concepts of the most equal cost, and the paired difference of F1 with its interval.

    Args:
        rows: Settings with `positions`, `ttft_s` and `f1_by_question`.
        cost: `positions`, `full_positions` (those times the share of the layers that each passes) or `ttft_s`.
        seed: Of the bootstrap over questions.
        mode: What is compared with text in place of concepts.
    """
    concepts = [row for row in rows if row["mode"] == mode]
    made = []
    for text in (row for row in rows if row["mode"] == "text"):
        rates = sorted({row["rate"] for row in concepts})
        for rate in rates:
            near = min((r for r in concepts if r["rate"] == rate), key=lambda r: abs(np.log(r[cost] / text[cost])))
            shared = sorted(set(text["f1_by_question"]) & set(near["f1_by_question"]))
            change = np.array([near["f1_by_question"][q] - text["f1_by_question"][q] for q in shared])
            drawn = np.random.default_rng(seed).integers(0, len(change), size=(_RESAMPLES, len(change)))
            low, high = np.percentile(change[drawn].mean(1), [2.5, 97.5])
            made.append(
                {
                    "text_k": text["k"],
                    "mode": mode,
                    "rate": rate,
                    "concepts_k": near["k"],
                    "cost_ratio": near[cost] / text[cost],
                    "f1_text": text["f1"],
                    "f1_concepts": near["f1"],
                    "difference": float(change.mean()),
                    "interval": [float(low), float(high)],
                }
            )
    return made


def main(argv: Sequence[str] | None = None) -> Row:
    """Run it."""
    options = parser("equal_cost", __doc__, "llm repeats data-dir rates codec dtype embedder batch-size", repeats=2)
    options.add_argument("--loft", type=Path, help="folder rag/SET/SIZE in LOFT's layout, in place of --data-dir")
    options.add_argument("--storage", type=Path, help="keep the storage there (default: a temporary folder)")
    options.add_argument("--text-ks", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--most", type=int, default=16, help="documents at most")
    options.add_argument("--limit", type=int, default=60, help="questions")
    options.add_argument("--rivals", nargs="*", choices=["pruned", "random"], default=[], help="beside concepts")
    options.add_argument("--timed", type=int, default=8, help="questions whose TTFT is measured")
    args = parsed(options, argv)
    if args.loft is None and args.data_dir is None:
        options.error("--data-dir or --loft is needed")
    loft = load(args.loft) if args.loft else squad(args.data_dir / SQUAD)
    queries = in_seeded_order(loft.queries, limit=args.limit)
    with tempfile.TemporaryDirectory() as scratch:
        index = open_storage(loft, args.storage or Path(scratch) / "storage", args)
        compressor, ranked = index.compressor, ranking(index, queries, max([args.most, *args.text_ks]))
        index.close()
        if "random" in args.rivals and not compressor.config.deep:
            options.error("--rivals random is of deep concepts")
        same = {
            "set": loft.name,
            "note": loft.note,
            "n": len(queries),
            "documents": len(loft.documents),
            "recall": recall(queries, ranked),
            **read_by(compressor),
        }
        asked = {k: passages(loft, queries, ranked, k) for k in range(1, max([args.most, *args.text_ks]) + 1)}
        journal, config, rows = journal_of(args.json, same), EvalConfig(batch_size=args.batch_size), []
        counted = mean_positions(compressor, asked, args.rates)
        full = mean_positions(compressor, asked, args.rates, passed(compressor))
        for mode, rate, k in settings(args.text_ks, args.rates, counted, full, args.rivals):
            make = partial(quality, compressor, asked[k], mode, rate, config)
            row = part(journal, f"{Setting.of(mode, rate)}, {k} documents", make)
            rows.append({"mode": mode, "rate": rate, "k": k} | row)
        few = {k: questions[: args.timed] for k, questions in asked.items()}
        timed = [row for row in rows if row["mode"] in ("text", "concepts")]
        _timed(args, few, compressor, timed, Path(scratch))
    result = {**same, "timed": min(args.timed, len(queries)), "rows": rows}
    costs = {"equal_positions": "positions", "equal_prefill": "full_positions"}
    equal = {
        name: [pair for mode in ("concepts", *args.rivals) for pair in pairs(rows, cost, mode=mode)]
        for name, cost in costs.items()
    }
    return written(args, {**result, **equal, "equal_ttft": pairs(timed, "ttft_s")})


def _timed(
    args: Namespace, asked: dict[int, list[Question]], compressor: ConceptCompressor, rows: list[Row], scratch: Path
) -> None:
    """Warm stores at each rate, then TTFT of all settings."""
    longest = max(row["k"] for row in rows)
    texts = list(dict.fromkeys(p.text for question in asked[longest] for p in question.passages))
    libraries = {}
    for rate in args.rates:
        store = DiskStore(scratch / f"concepts-{rate:g}", hidden_size=compressor.spec.width)
        libraries[rate] = ConceptLibrary(compressor, store, rate=rate)
        libraries[rate].ensure(texts)
    ttft(libraries, asked, rows, args.repeats)
