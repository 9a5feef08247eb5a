"""Does a read policy answer better than its rivals at the same prefill cost?

Passages are retrieved for each question (of SQuAD and NarrativeQA among the chunks of many questions, of HotpotQA and
MuSiQue among its own documents), and read as text, at a share of text's prefill cost in several ways, and not at all:
by the budgeted policy from a storage at one rate and at two, and where it reads but the likeliest sentences whatever is
left of the budget, by BM25 and by the relevance that was learned for the compressor; the best sentences by BM25 as
text, concepts of all passages at the rate of that cost, fewer passages as text (the first, and of the last as many
sentences as fit), and concepts at places taken by chance. All have the same budget a question, and what a question's
own pass through the lower layers takes is paid from it. Differences are paired over questions.

The set `held_out` is training rows that nothing is trained on, as `bench relevance` asks them: to choose settings by.

Parts that are done are kept beside the JSON (OUT.records.jsonl) and not asked again.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.common import any_compressor_of, dtype_of, journal_of, parsed, parser, part, progress, written
from benchmarks.planner.candidates import SETS, asked, found, recall, with_passages
from benchmarks.planner.contenders import CONTENDERS, LEARNED, LEAST_LEARNED, PLANNERS
from benchmarks.planner.sought import sought
from benchmarks.remembered import remember_states
from compllm_rag.compression.rate_policies.shares import shares_identity
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import DEFAULT_EMBEDDER, GenerationConfig, Narrowing
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import PassageBodies, Segmented, Setting
from compllm_rag.evaluation.journal import Journal
from compllm_rag.evaluation.questions import Question
from compllm_rag.evaluation.read_policies import QuestionBodies
from compllm_rag.evaluation.statistics import Record, differences, statistics
from compllm_rag.models.halves import Halves
from compllm_rag.models.narrowing import check_narrowing
from compllm_rag.reading.budgeted import BudgetedReadPolicy
from compllm_rag.training.material import Material

HELD_OUT = "held_out"
_SHOWN = ("f1", "em", "nll", "recovered", "positions")
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> Row:
    """Run it; the record of all sets."""
    shared = "llm data-dir reader compressor codec entry-layer dtype embedder batch-size limit"
    options = parser("planner", __doc__, shared, limit=150)
    options.add_argument("--sets", nargs="+", choices=[*SETS, HELD_OUT], default=list(SETS))
    options.add_argument("--costs", type=float, nargs="+", default=[0.25, 0.125], help="shares of text's prefill cost")
    options.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    options.add_argument(
        "--narrow", type=Narrowing.parse, help="LAYER:SHARE: narrow all prompts with concepts, and reckon with it"
    )
    options.add_argument("--top-k", type=int, default=4, help="passages of a question")
    options.add_argument("--pool", type=int, default=400, help="passages to look among, where a question has but one")
    options.add_argument("--max-new-tokens", type=int, default=24)
    args = parsed(options, argv)
    if args.data_dir is None:
        options.error("--data-dir is needed")
    compressor = remember_states(any_compressor_of(args))
    spec = compressor.spec
    if args.narrow is not None:
        check_narrowing(args.narrow, spec.config.entry_layer, spec.depth)
    rates = {cost: spec.prefill_cost(1.0, args.narrow) / cost for cost in args.costs}
    for cost, rate in rates.items():
        if rate < 1:
            options.error(f"--costs {cost:g}: concepts of this compressor take no more than {rate * cost:g}")
    same = {
        "fingerprint": compressor.fingerprint,
        "dtype": dtype_of(compressor),
        "limit": args.limit,
        "top_k": args.top_k,
        "pool": args.pool,
        "narrowing": None if args.narrow is None else str(args.narrow),
        "policy": repr(BudgetedReadPolicy()),
        **shares_identity(compressor.losses, compressor.fingerprint),
    }
    journal = journal_of(args.json, same)
    halves = compressor.halves.merged() if compressor.halves else None
    made = {name: _one(name, args, compressor, halves, rates, journal) for name in args.sets}
    return written(
        args,
        {**same, "llm": compressor.llm.source, "rates": {f"{c:g}": rate for c, rate in rates.items()}, "sets": made},
    )


def _one(
    name: str,
    args: Namespace,
    compressor: ConceptCompressor,
    halves: Halves | None,
    rates: Mapping[float, float],
    journal: Journal,
) -> Row:
    questions, title = _held_out(args, compressor) if name == HELD_OUT else _retrieved(name, args, compressor, journal)
    segmented, fits = Segmented(compressor), list[Question]()
    text = Asker(compressor, Setting("text"), segmented, _generation(args), halves=halves)
    fits = [question for question in questions if text.room(question) <= text.window]

    def ask(label: str, setting: Setting, bodies: PassageBodies | None = None) -> list[Record]:
        asker = Asker(compressor, setting, segmented, _generation(args), bodies, halves=halves)
        make = partial(_asked, asker, fits, args.batch_size, answer=setting.mode != "none")
        learned = compressor.interaction if label.startswith(LEARNED) else None
        by = {} if learned is None else {"relevance": learned.identity, "least": LEAST_LEARNED}
        return [Record.from_dict(record) for record in part(journal, f"{name}, {label}", make, **by)]

    whole, none = ask("text", Setting("text")), ask("none", Setting("none"))
    rows = [_row("text", None, whole, whole, none), _row("none", None, none, whole, none)]
    for cost, rate in rates.items():
        records = {}
        for label in args.contenders:
            if label == "random" and (not compressor.config.deep or rate == 1):
                continue
            if label.startswith(LEARNED) and compressor.interaction is None:
                progress(f"{name}, {label}: no relevance is learned for this compressor")
                continue
            bodies = CONTENDERS[label](compressor, segmented, rate, args.narrow)
            records[label] = ask(f"{label} at {cost:g}", Setting("text", narrowing=args.narrow), bodies)
            beside = [bodies.beside(question) for question in fits] if isinstance(bodies, QuestionBodies) else []
            rows.append(_row(label, cost, records[label], whole, none, sum(beside) / max(1, len(beside))))
            progress(f"{name}, {label} at {cost:g}: f1 {rows[-1]['f1']}, recovered {rows[-1]['recovered']}")
        for row in rows:
            if row["cost"] == cost and row["contender"] in PLANNERS:
                others = {label: theirs for label, theirs in records.items() if label not in PLANNERS}
                row["over"] = {
                    label: differences(records[row["contender"]], theirs, whole, none)
                    for label, theirs in others.items()
                }
    return {
        "title": title,
        "n": len(fits),
        "skipped": len(questions) - len(fits),
        "recall": recall(fits),
        "rows": rows,
    }


def _retrieved(
    name: str, args: Namespace, compressor: ConceptCompressor, journal: Journal
) -> tuple[list[Question], str]:
    """Questions of an evaluation set over the passages that were found for them, and the set's title."""
    chosen = SETS[name]
    questions, among = asked(
        args.data_dir / "eval" / chosen.file,
        limit=args.limit,
        pool=args.pool,
        pooled=chosen.pooled,
        segmenter=compressor.spec.segmenter,
    )
    places = part(journal, f"{name}, retrieval", lambda: found(questions, among, _embedder(args), args.top_k))
    return with_passages(questions, among, places), chosen.title


def _held_out(args: Namespace, compressor: ConceptCompressor) -> tuple[list[Question], str]:
    """Questions of training rows that nothing is trained on, over four passages each."""
    segmenter = compressor.spec.segmenter
    groups = Material(*Material.files_of(args.data_dir), segmenter).held_out
    chosen = sought(groups, segmenter, _embedder(args), limit=args.limit, n_passages=args.top_k)
    answers = {question.id: question.answers for group in groups for question in group.questions}
    questions = [Question(one.id, one.passages, one.question, answers[one.id]) for one in chosen]
    return questions, "held-out training rows"


def _asked(asker: Asker, questions: Sequence[Question], batch_size: int, *, answer: bool) -> list[dict[str, Any]]:
    records = asker.ask(questions, batch_size=batch_size, answer=answer, progress=lambda _: None)
    return [record.to_dict() for record in records]


def _row(
    label: str,
    cost: float | None,
    records: Sequence[Record],
    text: Sequence[Record],
    none: Sequence[Record],
    beside: float = 0.0,
) -> Row:
    summed = statistics(records, text, none)
    tokens = max(1, sum(record.source_tokens for record in text))
    return {
        "contender": label,
        "cost": cost,
        **{name: summed.values[name] for name in _SHOWN},
        "intervals": {name: summed.intervals[name] for name in ("f1", "recovered")},
        "prefill_cost": sum(record.cost or 0.0 for record in records) / tokens,
        "prefill_tokens": sum(map(_prefill, records)) / len(records) + beside,
    }


def _prefill(record: Record) -> float:
    """What a prompt takes at prefill, in text tokens."""
    bodies = record.source_tokens if record.concepts is None else record.concepts
    return record.positions - bodies + (record.cost or 0.0)


def _generation(args: Namespace) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=args.max_new_tokens)


def _embedder(args: Namespace) -> Any:
    from compllm_rag.llamaindex.embedding import load_embedder

    return load_embedder(args.embedder or DEFAULT_EMBEDDER)[0]
