"""What do the rivals of the seed article keep when they are trained as ours is: same reader, data and minutes of CPU?

Every row of `--rows` (NAME or NAME@RATE, source tokens per position) starts from nothing and trains for `--minutes` of
one CPU thread on the training questions of `--data-dir`, with the same examples in the same order; held-out ones give
its curve. Then all of them, text and no passages answer the same questions of SQuAD dev, which nobody trained on.

Weights are kept in `--out` (by default beside the JSON, OUT.weights) and answers in OUT.records.jsonl, so that a run
that was interrupted goes on where it stood, and rows can be added by running it again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import journal_of, parsed, parser, part, progress, written
from benchmarks.rivals.base import LeftOutError, Task, ask_with
from benchmarks.rivals.rivals import FILE, choose, prepared
from benchmarks.rivals.trained.about import KINDS
from benchmarks.rivals.trained.fitting import Fit, Schedule
from benchmarks.rivals.trained.row import Setup
from benchmarks.rivals.trained.rows import DEFAULT, Named, named
from compllm_rag.compression.loading import shipped_adapter, untrained_deep
from compllm_rag.config import DEFAULT_EMBEDDER
from compllm_rag.errors import ConfigurationError, DivergedError
from compllm_rag.evaluation.bodies import Setting
from compllm_rag.evaluation.questions import read_questions
from compllm_rag.evaluation.statistics import Record, differences, statistics
from compllm_rag.models.halves import default_entry_layer
from compllm_rag.models.llm import TargetLLM

_METRICS = ("f1", "em", "nll", "recovered")


def one(asked: Named, setup: Setup, schedule: Schedule, folder: Path, task: Task, facts: dict[str, Any]) -> Any:
    """Train a row, or go on training it, then ask the questions.

    Args:
        asked: Which.
        setup: What all rows share.
        schedule: How long.
        folder: Of its weights.
        task: The questions.
        facts: What its weights depend on besides.
    """
    torch.manual_seed(schedule.seed)
    row = asked.make(setup)
    progress(f"{asked.title}: {schedule.minutes:g} minutes of training" if row.learned() else asked.title)
    trained = Fit(row, schedule, folder, facts, progress).go()
    begun = time.perf_counter()
    asker = row.asker(task.compressor, task.segmented, task.generation)
    records = asker.ask(task.questions, batch_size=task.batch_size, answer=True, progress=lambda _: None)
    seconds = time.perf_counter() - begun
    source, positions = (sum(getattr(r, name) or 0 for r in records) for name in ("source_tokens", "concepts"))
    cost = asdict(row.cost(source / positions))
    progress(f"{asked.title}: {len(records)} questions, {seconds:.0f} s")
    return {**trained, "cost": cost, "seconds": seconds, "records": [record.to_dict() for record in records]}


def _row(
    asked: Named, found: dict[str, Any], records: dict[str, list[Record]], text: list[Record], none: list[Record]
) -> dict[str, Any]:
    """What is reported of a row."""
    mine = records[asked.word]
    values = statistics(mine, text, none)
    ours = records.get(f"deep@{asked.rate:g}" if asked.kind.rated else "deep@2")
    return {
        "name": asked.word,
        "title": asked.title,
        "rate": asked.rate if asked.kind.rated else None,
        "achieved_rate": values.values["achieved_rate"],
        "positions": values.values["positions"],
        **{name: found[name] for name in ("cost", "learned", "steps", "minutes", "curve", "nll_text", "nll_none")},
        **{name: values.values[name] for name in _METRICS},
        "intervals": {name: values.intervals[name] for name in _METRICS},
        "to_text": {name: values.paired[name] for name in ("f1", "nll")},
        "to_ours": differences(mine, ours, text, none) if ours and ours is not mine else None,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it."""
    options = parser("alike", __doc__, "llm reader embedder entry-layer batch-size", embedder=DEFAULT_EMBEDDER)
    options.add_argument("--data-dir", type=Path, required=True, help=f"holds train/*.jsonl(.gz) and eval/{FILE}")
    options.add_argument("--minutes", type=float, default=20.0, help="of one CPU thread, for each row")
    options.add_argument("--rows", nargs="+", default=DEFAULT, help=f"of {', '.join(KINDS)}")
    options.add_argument("--limit", type=int, default=100, help="questions of SQuAD dev")
    options.add_argument("--per-passage", type=int, default=2, help="most questions of one passage")
    options.add_argument("--rank", type=int, default=32, help="of every LoRA")
    options.add_argument("--validation", type=int, default=24, help="groups of held-out training questions")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="folder for weights; default: beside --json")
    args = parsed(options, argv)
    if args.out is None and args.json is None:
        options.error("weights have to be kept somewhere: name --json or --out")
    rows = list(dict.fromkeys(map(named, args.rows)))
    if args.minutes <= 0:
        raise ConfigurationError("minutes make no sense", got=args.minutes, expected="more than 0")
    torch.set_num_threads(1)
    schedule = Schedule(args.minutes, validation=args.validation, seed=args.seed)
    setup, task = _prepared(args)
    asked = [question.id for question in task.questions]
    facts = {
        "identity": setup.llm.identity,
        "entry_layer": setup.entry_layer,
        "rank": setup.rank,
        "embedder": setup.embedder,
        "trained_on": [path.name for path in setup.units.files],
    }
    same = facts | asdict(schedule) | {"questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest()}
    journal = journal_of(args.json, same)
    out = args.out or args.json.with_suffix(".weights")
    shown = {
        mode: [Record.from_dict(r) for r in part(journal, mode, partial(_fixed, task, mode))]
        for mode in ("text", "none")
    }
    found, left_out = dict[str, Any](), dict[str, str]()
    for row in rows:
        make = partial(one, row, setup, schedule, out / row.word, task, facts)
        try:
            found[row.word] = part(journal, row.word, make)
        except (LeftOutError, DivergedError) as error:
            left_out[row.word] = str(error)
            progress(f"{row.title}: left out, {error}")
    about = {"llm": args.llm, "data": FILE, "n": len(asked), "passages": len(task.texts), "depth": setup.llm.depth}
    measured = _measured([row for row in rows if row.word in found], found, shown["text"], shown["none"])
    return written(args, {**about, **same, **measured, "left_out": left_out})


def _measured(rows: Sequence[Named], found: dict[str, Any], text: list[Record], none: list[Record]) -> dict[str, Any]:
    """What is reported of text, of no passages and of the rows."""
    records = {word: [Record.from_dict(record) for record in made["records"]] for word, made in found.items()}
    fixed = {}
    for mode, mine in (("text", text), ("none", none)):
        made = statistics(mine, text, none)
        intervals = {name: made.intervals[name] for name in _METRICS}
        fixed[mode] = {name: made.values[name] for name in (*_METRICS, "positions")} | {"intervals": intervals}
    return {**fixed, "rows": [_row(row, found[row.word], records, text, none) for row in rows]}


def _prepared(args: Any) -> tuple[Setup, Task]:
    """What rows share, and what they are asked.

    The task's compressor is any of deep concepts: it cuts passages and knows the LLM, its concepts are not read.
    """
    reader = shipped_adapter(args.llm, "reader") if args.reader == "auto" else args.reader
    llm = TargetLLM.from_pretrained(args.llm, reader=Path(reader) if reader not in (None, "none") else None)
    layer = default_entry_layer(llm.depth) if args.entry_layer is None else args.entry_layer
    setup = Setup(llm, args.data_dir, layer, args.rank, args.embedder)
    chosen = choose(read_questions(args.data_dir / "eval" / FILE).questions, args.limit, args.per_passage)
    return setup, prepared(untrained_deep(llm, layer), args.llm, chosen, args.batch_size)


def _fixed(task: Task, mode: str) -> list[dict[str, Any]]:
    """Records of what needs no row."""
    progress(f"{mode}: {len(task.questions)} questions")
    setting = Setting.of(mode)
    return [record.to_dict() for record in ask_with(task, setting)]
