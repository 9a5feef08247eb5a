"""Do rates that follow the text answer better than fixed ones at the same cost?

The same questions are asked with their passages as text, without them, at fixed rates, at rates by information (our
bands, and those of the seed article: dense text 1.5-2, medium 2-3, thin 3-4), at rates by the losses that `compllm-rag
train rates` learned (where the compressor has them), within budgets shared out over all passages, and with the guard in
front of a fixed rate. Rivals take the prefill of fixed rates 2 and 4: deep concepts at places taken by chance, and the
best sentences by BM25 as text. `--rows` asks a part of the rows.

Recovered and F1 stand over the mean prefill cost of a passage token, and over the prompt positions of one (text = 1 in
both), with bootstrap intervals and paired differences to text over the same questions. The fidelity probes that ship
with the package are asked in the same rows, kind by kind. What policies choose for several kinds of text, and what they
expect to lose by it, is told without asking anything (kinds.py).

The article claims a mean rate of 2.5 at less than 1 % loss for its bands: `claim` says what came of it.

Settings that are done are kept beside the JSON (OUT.records.jsonl) and not asked again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import Tenths, any_compressor_of, dtype_of, journal_of, parsed, parser, part, progress, written
from benchmarks.rates import kinds
from benchmarks.rates.bodies import ChosenBodies
from benchmarks.rates.rows import ARTICLES_BANDS, GROUPS, RIVAL_RATES, rivals_of, rows_of, unavailable
from benchmarks.remembered import remember_states
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import DataFileError
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import PassageBodies, Segmented, Setting
from compllm_rag.evaluation.probes import probe_file
from compllm_rag.evaluation.questions import Question, read_questions, read_rows
from compllm_rag.evaluation.runner import in_seeded_order
from compllm_rag.evaluation.statistics import Record, differences, statistics

SETS = ("squad_dev", "hotpotqa_dev", "musique_dev", "narrativeqa_valid")
PROBES = ("numbers", "dates", "names", "code", "needle")
_CLAIM_RATE, _CLAIM_LOSS = 2.5, 1.0
Row = dict[str, Any]


def ask(
    compressor: ConceptCompressor,
    name: str,
    setting: Setting,
    bodies: PassageBodies | None,
    questions: list[Question],
    args: Any,
    segmented: Segmented,
) -> dict[str, Any]:
    """Records of one setting, and how many passages stayed text where that was chosen."""
    asker = Asker(compressor, setting, segmented, GenerationConfig(max_new_tokens=args.max_new_tokens), bodies)
    show = Tenths()
    records = asker.ask(
        questions,
        batch_size=args.batch_size,
        answer=setting.mode != "none",
        progress=lambda n: show(name, n / len(questions)),
    )
    shown = [passage.text for question in questions for passage in question.passages]
    as_text = (
        sum(bodies.choice(text).reason is not None for text in shown) if isinstance(bodies, ChosenBodies) else None
    )
    return {"records": [record.to_dict() for record in records], "passages_as_text": as_text}


def row(records: list[Record], as_text: int | None, text: list[Record], none: list[Record]) -> Row:
    """What a setting comes to.

    Args:
        records: Of the setting.
        as_text: Passages that stayed text; None where nothing chose.
        text: Of the same questions with the passages as text.
        none: Of the same questions without passages.

    Returns:
        Among others `prefill_cost` and `passage_positions`: what a token of the passages costs at prefill, and its
        prompt positions, text = 1; None without passages.
    """
    found = statistics(records, text, none)
    names = ("recovered", "f1", "em", "nll", "positions")
    tokens = sum(record.source_tokens for record in records)
    taken = sum(record.source_tokens if record.concepts is None else record.concepts for record in records)
    return {
        "prefill_cost": sum(record.cost or 0.0 for record in records) / tokens if tokens else None,
        "passage_positions": taken / tokens if tokens else None,
        "achieved_rate": found.values["achieved_rate"],
        "passages_as_text": as_text,
        **{name: found.values[name] for name in names},
        **{f"{name}_interval": found.intervals[name] for name in names[:3]},
        "to_text": {name: found.paired[name] for name in ("f1", "nll")},
    }


def over_rivals(records: dict[str, list[Record]]) -> list[Row]:
    """Paired differences of fixed rates to the rivals at their prefill cost, of those that were asked."""
    pairs = [(f"fixed {rate:g}", rival) for rate in RIVAL_RATES for rival in rivals_of(rate)]
    return [
        {"row": mine, "rival": rival}
        | differences(records[mine], records[rival], records["text"], records["none"], names=("f1", "recovered"))
        for mine, rival in pairs
        if mine in records and rival in records
    ]


def claim(rows: dict[str, Row]) -> dict[str, Any] | None:
    """The article's sentence: its bands reach a mean rate of 2.5 and lose less than 1 % of what text scores.

    None where its bands were not asked.
    """
    if ARTICLES_BANDS not in rows:
        return None
    mine, text = rows[ARTICLES_BANDS], rows["text"]
    rate, f1 = mine["achieved_rate"], mine["f1"]
    lost = None if not text["f1"] or f1 is None else 100 * (1 - f1 / text["f1"])
    reached, below = rate is not None and rate >= _CLAIM_RATE, lost is not None and lost < _CLAIM_LOSS
    return {
        "achieved_rate": rate,
        "f1_lost_percent": lost,
        "recovered": mine["recovered"],
        "rate_reached": reached,
        "loss_below_1_percent": below,
        "holds": reached and below,
    }


def measure(
    compressor: ConceptCompressor, name: str, asked: list[Question], limit: int, args: Any, journal: Any, **what: Any
) -> dict[str, Any]:
    """One set of questions.

    Args:
        compressor: With its LLM.
        name: Of the set, in the journal too.
        asked: Those that there are; the first `limit` of a seeded order that fit the window are asked.
        limit: How many.
        args: Options of the run.
        journal: Of the run.
        what: What the parts of this set depend on besides the run.
    """
    segmented = Segmented(compressor)
    room = Asker(compressor, Setting("text"), segmented, GenerationConfig(max_new_tokens=args.max_new_tokens))
    questions = [question for question in in_seeded_order(asked) if room.room(question) <= room.window][:limit]
    if not questions:
        raise DataFileError(
            "no question fits the window",
            got=f"{name}, {len(asked)} questions",
            expected=f"at most {room.window} positions, passages as text",
            next_step="leave this set out, or take an LLM with a longer window",
        )
    progress(f"{name}: {len(questions)} questions")
    passages = [passage.text for question in questions for passage in question.passages]
    records: dict[str, list[Record]] = {}
    as_text: dict[str, int | None] = {}

    def add(label: str, setting: Setting, bodies: PassageBodies | None) -> None:
        make = partial(ask, compressor, f"{name}, {label}", setting, bodies, questions, args, segmented)
        made = part(journal, f"{name}, {label}", make, **what)
        records[label] = [Record.from_dict(record) for record in made["records"]]
        as_text[label] = made["passages_as_text"] if isinstance(bodies, ChosenBodies) else None

    for mode in ("text", "none"):
        add(mode, Setting.of(mode), None)
    for label, make in rows_of(compressor, args).items():
        add(label, *make(compressor, segmented, passages))
    rows = {label: row(mine, as_text[label], records["text"], records["none"]) for label, mine in records.items()}
    return {"n": len(questions), "rows": rows, "over_rivals": over_rivals(records), "claim": claim(rows)}


def questions_of(name: str, folder: Path) -> list[Question]:
    """The questions of an evaluation set.

    Raises:
        DataFileError: There is no such set.
    """
    path = next((p for p in sorted((folder / "eval").glob(f"{name}.jsonl*"))), None)
    if path is None:
        raise DataFileError(
            "there is no such set",
            got=f"{name} in {folder}",
            expected="eval/NAME.jsonl(.gz)",
            next_step="see --sets",
        )
    return read_questions(path).questions


def probes_of(kind: str) -> list[Question]:
    """The probes of a kind."""
    kinds = {str(row["id"]): row["kind"] for _, row in read_rows(probe_file())}
    return [question for question in read_questions(probe_file()).questions if kinds[question.id] == kind]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it."""
    shared = "llm reader compressor rates codec entry-layer dtype batch-size limit"
    options = parser("rates", __doc__, shared, batch_size=8, limit=150)
    options.add_argument("--data-dir", type=Path, required=True, help="holds eval/*.jsonl.gz and text/*.jsonl.gz")
    options.add_argument("--sets", nargs="*", default=list(SETS), help="of eval/")
    options.add_argument("--rows", nargs="+", choices=GROUPS, help="a part of the rows (default: all there are)")
    options.add_argument(
        "--losses", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2], help="limits of policy learned, nats a token"
    )
    options.add_argument(
        "--shares", type=float, nargs="+", default=[0.67, 0.5, 0.33], help="budgets, in shares of the tokens"
    )
    known = sorted({str(row["kind"]) for _, row in read_rows(probe_file())})
    options.add_argument("--probes", nargs="*", choices=known, default=list(PROBES), help="kinds of fidelity probes")
    options.add_argument("--probe-limit", type=int, default=24, help="probes of each kind")
    options.add_argument("--chunk-limit", type=int, default=200, help="chunks of each kind of text; 0 leaves kinds out")
    options.add_argument("--max-new-tokens", type=int, default=32)
    options.set_defaults(rates=[1.0, 1.5, 2.0, 3.0, 4.0])
    args = parsed(options, argv)
    if args.probe_limit < 1:
        options.error("--probe-limit: at least 1; --probes without a kind asks none")
    compressor = remember_states(any_compressor_of(args))
    missing = unavailable(compressor)
    for group in args.rows or ():
        if group in missing:
            options.error(f"--rows {group}: {missing[group]}")
    names = ("limit", "rates", "losses", "shares", "max_new_tokens")
    learned = compressor.losses
    # Its digest: told whole, it would fill a page where a journal is of another run.
    predictor = None if learned is None else hashlib.sha256(learned.model_dump_json().encode()).hexdigest()
    same = {"llm": args.llm, "fingerprint": compressor.fingerprint, "losses_learned": predictor}
    same |= {"dtype": dtype_of(compressor)}
    same |= {name: getattr(args, name) for name in names}
    journal = journal_of(args.json, same)
    ask_set = partial(measure, compressor, args=args, journal=journal)
    sets = {name: ask_set(name, questions_of(name, args.data_dir), args.limit) for name in args.sets}
    n = args.probe_limit
    probes = {kind: ask_set(f"probes, {kind}", probes_of(kind), n, probe_limit=n) for kind in args.probes}
    chosen = kinds.measured(compressor, args.data_dir, args.probes, args.chunk_limit) if args.chunk_limit > 0 else None
    shown = {name: value for name, value in same.items() if name != "losses_learned"}
    return written(args, {**shown, "unavailable": missing, "sets": sets, "probes": probes, "kinds": chosen})
