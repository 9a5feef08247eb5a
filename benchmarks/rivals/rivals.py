"""What do other ways of compressing passages keep, at the rate that concepts achieve?

The same passages, target LLM, reader and prompt for all: text, no passages, concepts (deep ones, with random places and
concepts at the input embeddings beside them, or those alone by `--codec input`), truncation, pruning, means of
embeddings, BM25 sentences, LLMLingua, LLMLingua-2, and KV pruning by kvpress at the KV size of a prompt with concepts.
All are compared at equal positions, and deep concepts, of which one costs less than a token, also at equal prefill
cost. Differences are paired, with bootstrap 95 % intervals over questions. What the packages need is made by

python -m benchmarks.rivals.environments make

and a rival without its environment (or weights) is left out, with the reason in the JSON. Records of each rival are
kept beside the JSON as it goes (OUT.records.jsonl), so a run that was interrupted goes on, and answers can be seen.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import any_compressor_of, dtype_of, journal_of, parsed, parser, part, progress, written
from benchmarks.rivals.base import Baseline, LeftOutError, Outcome, Task
from benchmarks.rivals.inside import inside
from benchmarks.rivals.kv_pruning import KVPruning
from benchmarks.rivals.lingua import TWO, Lingua
from benchmarks.rivals.process import RunnerError
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Segmented, Setting
from compllm_rag.evaluation.journal import Journal
from compllm_rag.evaluation.questions import Question, read_questions
from compllm_rag.evaluation.statistics import Record, Statistics, statistics

FILE = "squad_dev.jsonl.gz"
PRESSES = {"expected_attention": "ExpectedAttention", "snapkv": "SnapKV", "knorm": "Knorm"}
_METRICS = ("f1", "em", "nll", "recovered", "agreement")
_PAIRED = ("f1", "em", "nll")
_ALIKE = 0.1  # costs that differ by less are equal


def baselines(environments: Path | None, classifier: str | None, *, deep: bool = False) -> list[Baseline]:
    """All rivals.

    Args:
        environments: Folder of environments; None is the one in the cache directory.
        classifier: Token classifier of LLMLingua-2, folder or hub id; None leaves LLMLingua-2 away.
        deep: See `inside`.
    """
    made: list[Baseline] = [*inside(deep=deep), Lingua(environments)]
    if classifier:
        made.append(Lingua(environments, classifier))
    return made + [KVPruning(press, f"KV pruning, {title}", environments) for press, title in PRESSES.items()]


def choose(questions: Iterable[Question], limit: int, per_passage: int, seed: int = 0) -> list[Question]:
    """Questions in the seeded order of their passages, a few of each passage, those of one passage together."""
    groups: dict[tuple[str, ...], list[Question]] = {}
    for question in questions:
        groups.setdefault(tuple(passage.text for passage in question.passages), []).append(question)
    order, dice = list(groups.values()), random.Random(seed)
    dice.shuffle(order)
    return [q for group in order for q in dice.sample(group, min(per_passage, len(group)))][:limit]


def fitting(task: Task) -> list[Question]:
    """Those whose prompt with text fits the window: all rivals are asked the same."""
    asker = Asker(task.compressor, Setting("text"), task.segmented, task.generation)
    kept = [question for question in task.questions if asker.room(question) <= asker.window]
    if not kept:
        raise ConfigurationError("no question fits the window of the LLM", got=f"{len(task.questions)} questions")
    return kept


def _asked(rival: Baseline, task: Task, rate: float, journal: Journal) -> tuple[Outcome, float]:
    """A rival's outcome and the seconds it took, from the journal if it is there.

    Raises:
        LeftOutError, RunnerError: The rival cannot run.
    """
    label = f"{rival.title} at rate {rate:g}" if rival.compresses else rival.title

    def ask() -> dict[str, Any]:
        progress(f"{label}: {len(task.questions)} questions")
        begun = time.perf_counter()
        made = rival.ask(task, rate)
        seconds = time.perf_counter() - begun
        progress(f"{label}: {seconds:.0f} s")
        return {"seconds": seconds} | asdict(made)

    known = part(journal, label, ask, rival=rival.name, settings=rival.settings())
    records = [Record.from_dict(record) for record in known["records"]]
    return Outcome(records, known["prefilled"], known["prepare_s"], known["notes"]), known["seconds"]


def measure(task: Task, rivals: Sequence[Baseline], rates: Sequence[float], journal: Journal) -> dict[str, Any]:
    """All rivals at all rates; see the module."""
    rows: list[dict[str, Any]] = []
    left_out: dict[str, dict[str, Any]] = {}
    done: dict[str, Outcome] = {}
    asked: dict[tuple[str, float | None], Outcome] = {}
    for rate in rates:
        for rival in rivals:
            if rival.name in left_out or (not rival.compresses and rival.name in done):
                continue
            if rate <= 1 and rival.compresses and rival.name != "concepts":
                continue  # nothing is left out: it would be text
            try:
                outcome, seconds = _asked(rival, task, rate, journal)
            except (LeftOutError, RunnerError) as error:
                left_out[rival.name] = {"title": rival.title, "why": _why(error), "how": error.next_step}
                progress(f"{rival.title}: left out, {error}")
                continue
            done[rival.name] = outcome
            rows.append(_row(rival, task, rate, outcome, seconds, done))
            asked[rival.name, rows[-1]["rate"]] = outcome
    return {"rivals": rows, "left_out": left_out, "equal_prefill": equal_prefill(rows, asked)}


def equal_prefill(rows: list[dict[str, Any]], asked: dict[tuple[str, float | None], Outcome]) -> list[dict[str, Any]]:
    """Each rival against our concepts where a passage costs as much to prefill, within a tenth; F1 paired by question.

    Args:
        rows: As `_row` makes them.
        asked: Their outcomes by name and rate.
    """
    made = []
    for mine in (row for row in rows if row["name"] == "concepts"):
        for row in rows:
            if row["rate"] is None or row["name"] == "concepts" or row["prefill_cost"] is None:
                continue
            if abs(row["prefill_cost"] / mine["prefill_cost"] - 1) > _ALIKE:
                continue
            theirs, ours = asked[row["name"], row["rate"]].records, asked["concepts", mine["rate"]].records
            found = statistics(ours, theirs, asked["none", None].records)
            made.append(
                {
                    "prefill_cost": mine["prefill_cost"],
                    "concepts_rate": mine["rate"],
                    "name": row["name"],
                    "title": row["title"],
                    "rate": row["rate"],
                    "f1_concepts": mine["f1"],
                    "f1": row["f1"],
                    "concepts_to_rival": _rounded(found.paired["f1"]),
                }
            )
    return made


def _why(error: LeftOutError | RunnerError) -> str:
    return error.what if error.got is None else f"{error.what}: {error.got}"


def _row(
    rival: Baseline, task: Task, rate: float, outcome: Outcome, seconds: float, done: dict[str, Outcome]
) -> dict[str, Any]:
    """Values of one rival, and differences to text and to concepts at the same rate, as far as those were asked."""
    text, none = done.get("text"), done["none"]
    found = statistics(outcome.records, (text or outcome).records, none.records)
    ours = done.get("concepts") if rival.compresses else None
    made: dict[str, Any] = {
        "name": rival.name,
        "title": rival.title,
        "rate": rate if rival.compresses else None,
        "achieved_rate": found.values["achieved_rate"],
        "prefill_cost": rival.prefill_cost(task, found.values["achieved_rate"]),
        "kv_positions": found.values["positions"],
        "prefilled_positions": outcome.prefilled,
        **{name: found.values[name] for name in _METRICS},
        "intervals": {name: found.intervals[name] for name in _METRICS},
        "to_text": _paired(found) if text else None,
        "to_concepts": _paired(statistics(outcome.records, ours.records, none.records)) if ours else None,
        "prepare_s": outcome.prepare_s,
        "seconds": seconds,
        "notes": outcome.notes,
    }
    return {name: _rounded(value) for name, value in made.items()}


def _paired(found: Statistics) -> dict[str, Any]:
    return {name: found.paired[name] for name in _PAIRED}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def prepared(compressor: ConceptCompressor, llm: str, questions: list[Question], batch_size: int) -> Task:
    """The task, with the questions that fit."""
    task = Task(
        compressor, llm, questions, GenerationConfig(max_new_tokens=24), batch_size, progress, Segmented(compressor)
    )
    return Task(**{**vars(task), "questions": fitting(task)})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it."""
    options = parser(
        "rivals", __doc__, "llm rates reader compressor codec entry-layer dtype batch-size", rates=[1.0, 2.0, 4.0]
    )
    options.add_argument("--data-dir", type=Path, required=True, help=f"holds eval/{FILE}")
    options.add_argument("--limit", type=int, default=100, help="questions")
    options.add_argument("--per-passage", type=int, default=2, help="most questions of one passage")
    options.add_argument("--environments", type=Path, help="folder of environments (default: in the cache directory)")
    options.add_argument("--llmlingua2", default=TWO, help="folder or hub id of its token classifier, or none")
    options.add_argument("--rivals", nargs="+", help="only these, by name; text, none and concepts are always asked")
    args = parsed(options, argv)
    compressor = any_compressor_of(args)
    deep = compressor.config.deep
    rivals = baselines(args.environments, None if args.llmlingua2 == "none" else args.llmlingua2, deep=deep)
    if args.rivals:
        unknown = set(args.rivals) - {rival.name for rival in rivals}
        if unknown:
            options.error(f"no rival {', '.join(sorted(unknown))}; there are {', '.join(r.name for r in rivals)}")
        rivals = [r for r in rivals if r.name in {"text", "none", "concepts", *args.rivals}]
    chosen = choose(read_questions(args.data_dir / "eval" / FILE).questions, args.limit, args.per_passage)
    task = prepared(compressor, args.llm, chosen, args.batch_size)
    asked = [question.id for question in task.questions]
    same = {
        "fingerprint": compressor.fingerprint,
        "dtype": dtype_of(compressor),
        "questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "max_new_tokens": task.generation.max_new_tokens,
    }
    record = {
        "llm": args.llm,
        "trained": compressor.config.trained,
        "entry_layer": compressor.config.entry_layer,
        "data": FILE,
        "n": len(asked),
        "passages": len(task.texts),
        "per_passage": args.per_passage,
        "rates": args.rates,
        **same,
    }
    return written(args, record | measure(task, rivals, args.rates, journal_of(args.json, same)))
