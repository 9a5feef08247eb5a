"""Do chunks that were encoded apart lose what text keeps? The same questions with 1, 2, 4 and 8 passages in the prompt.

Three kinds of questions: *needle* (the shipped probes: one fact within a longer passage), *single* (SQuAD dev: the
paragraph with the answer) and *two-hop* (HotpotQA dev: both paragraphs that the answer rests on). Passages of other
questions of the same file that hold none of the answers are put beside them in a seeded random order, of HotpotQA the
question's own distractors first. Text, deep concepts at some rates and no passages read the same prompts, so that what
is lost is by concepts, not by the number of passages.

Settings that are done are kept beside the JSON (OUT.records.jsonl) and not asked again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cells import apart, difference, number, source, table, with_interval
from benchmarks.common import (
    Record,
    Tenths,
    any_compressor_of,
    dtype_of,
    journal_of,
    parsed,
    parser,
    part,
    progress,
    written,
)
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.journal import Journal
from compllm_rag.evaluation.probes import probe_file
from compllm_rag.evaluation.questions import Question, SourcePassage, read_questions, read_rows
from compllm_rag.evaluation.results import EvalConfig
from compllm_rag.evaluation.runner import evaluate_many, in_seeded_order


@dataclass(frozen=True)
class Kind:
    """A kind of questions.

    Attributes:
        title: For people.
        file: Below `--data-dir`; None takes the needles of the shipped probes.
    """

    title: str
    file: str | None


KINDS = {
    "needle": Kind("needle in a passage (probes)", None),
    "single": Kind("one passage answers (SQuAD dev)", "eval/squad_dev.jsonl.gz"),
    "two-hop": Kind("two passages answer (HotpotQA dev)", "eval/hotpotqa_dev.jsonl.gz"),
}


def questions_of(kind: str, data_dir: Path | None) -> list[Question]:
    """All questions of a kind.

    Raises:
        DataFileError: See `read_questions`.
    """
    file = KINDS[kind].file
    if file is None:
        needles = {str(row["id"]) for _, row in read_rows(probe_file()) if row["kind"] == "needle"}
        return [question for question in read_questions(probe_file()).questions if question.id in needles]
    return read_questions((data_dir or Path()) / file).questions


def among(question: Question, others: Sequence[SourcePassage], count: int) -> Question | None:
    """A question with its supporting passages among others, `count` passages in all, in an order of its own.

    Args:
        question: Its distractors, if it has any, are taken first.
        others: Passages of other questions, enough of them without an answer to this one.
        count: Passages in all.

    Returns:
        None where the question rests on more passages than that.
    """
    gold = [passage for passage in question.passages if passage.supporting]
    if not gold or len(gold) > count:
        return None
    rng = random.Random(question.id)
    own = [passage for passage in question.passages if not passage.supporting]
    known, answers = {passage.text for passage in question.passages}, [answer.lower() for answer in question.answers]
    strangers = rng.sample(others, len(others))
    free = (p for p in strangers if p.text not in known and not any(answer in p.text.lower() for answer in answers))
    shown = [*gold, *own[: count - len(gold)]]
    while len(shown) < count:
        stranger = next(free, None)
        if stranger is None:
            raise ConfigurationError(
                "there are too few passages of other questions",
                got=f"{len(shown)} for {question.id}",
                expected=f"{count} passages",
                next_step="lower --counts",
            )
        shown.append(replace(stranger, supporting=False))
        known.add(stranger.text)
        free = (p for p in free if p.text not in known)
    rng.shuffle(shown)
    return replace(question, passages=tuple(shown))


def asked(kind: str, data_dir: Path | None, counts: Sequence[int], limit: int) -> dict[int, list[Question]]:
    """The questions of a kind by the number of passages: the same ones for each, those that rest on few enough."""
    everything = questions_of(kind, data_dir)
    # Needles of one text at several depths are one question: passages of the same question are no distractors.
    pools: dict[str, list[SourcePassage]] = {}
    chosen = in_seeded_order(everything, limit=None)
    least = 2 if kind == "two-hop" else 1
    usable = [q for q in chosen if sum(p.supporting for p in q.passages) == least][:limit]
    texts: dict[str, SourcePassage] = {}
    for other in everything:
        for passage in other.passages:
            texts.setdefault(passage.text, passage)
    for question in usable:
        same = {p.text for q in everything if q.question == question.question for p in q.passages}
        pools[question.id] = [passage for text, passage in texts.items() if text not in same]
    found: dict[int, list[Question]] = {}
    for count in counts:
        made = [among(question, pools[question.id], count) for question in usable]
        if count >= least:
            found[count] = [question for question in made if question is not None]
    return found


def measure(
    compressor: ConceptCompressor,
    questions: list[Question],
    rates: Sequence[float],
    config: EvalConfig,
    journal: Journal,
) -> list[dict[str, Any]]:
    """Text, concepts at each rate, and nothing, on the same prompts."""
    settings: list[tuple[str, float | None]] = [("text", None), *(("concepts", rate) for rate in rates), ("none", None)]
    found = evaluate_many(compressor, questions, settings, config=config, progress=Tenths(), journal=journal)
    return [result.to_dict() for result in found]


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser("chunks", __doc__, "llm data-dir rates reader compressor codec entry-layer dtype batch-size limit")
    options.set_defaults(rates=[1.0, 2.0], batch_size=8, limit=100)
    options.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8], help="passages in the prompt")
    options.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    args = parsed(options, argv)
    if min(args.counts) < 1:
        options.error("--counts must be 1 or more")
    if args.data_dir is None and any(KINDS[kind].file for kind in args.kinds):
        options.error("--data-dir is needed, but for --kinds needle")
    compressor = any_compressor_of(args)
    same = {
        "llm": args.llm,
        "fingerprint": compressor.fingerprint,
        "dtype": dtype_of(compressor),
        "entry_layer": compressor.config.entry_layer,
        "limit": args.limit,
        "rates": args.rates,
    }
    journal, config = journal_of(args.json, same), EvalConfig(batch_size=args.batch_size)
    kinds = {}
    for kind in args.kinds:
        by_count = {}
        for count, questions in asked(kind, args.data_dir, args.counts, args.limit).items():
            progress(f"{kind}, {count} passages: {len(questions)} questions")
            make = partial(measure, compressor, questions, args.rates, config, journal)
            by_count[str(count)] = part(journal, f"{kind}, {count} passages", make)
        kinds[kind] = {"title": KINDS[kind].title, "counts": by_count}
    return written(args, {**same, "kinds": kinds})


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    head = ["passages", "read as", "rate", "positions", "NLL", "recovered", "F1", "ΔF1"]
    lines = [
        "## Deep concepts, several chunks" if record["entry_layer"] else "## Input concepts, several chunks",
        "",
        "The passages that a question rests on among passages of other questions, in random order: what text loses by "
        "them, and what concepts lose besides, chunks having been encoded apart. *Recovered* and Δ are against text "
        f"with the same passages. {source(record)}.",
        "",
    ]
    for kind in record["kinds"].values():
        rows = []
        for count, results in kind["counts"].items():
            for number_of, row in enumerate(results):
                cells = ["" if number_of else count, row["mode"], number(row["achieved_rate"], 2)]
                cells += [number(row["positions"], 0), number(row["nll"], 2)]
                cells.append(with_interval(row["recovered"], apart(row["intervals"].get("recovered"))))
                cells.append(with_interval(row["f1"], apart(row["intervals"].get("f1"))))
                cells.append(difference(None if row["mode"] == "text" else row["paired"].get("f1")))
                rows.append(cells)
        n = next(iter(kind["counts"].values()))[0]["n"] if kind["counts"] else 0
        lines += [f"### {kind['title']}, {n} questions", "", *table(head, rows)]
    return lines
