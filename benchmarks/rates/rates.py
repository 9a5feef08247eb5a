"""Do rates that follow the text answer better than fixed ones at the same cost?

The same questions are asked with their passages as text, without them, at fixed rates, at rates by information (our
bands, and those of the seed article: dense text 1.5-2, medium 2-3, thin 3-4), at rates by the losses that `compllm-rag
train rates` learned (where the compressor has them), within budgets shared out over all passages, and with the guard in
front of a fixed rate. Recovered and F1 stand over the mean prefill cost of a passage token (text = 1), with bootstrap
intervals and paired differences to text over the same questions.

The article claims a mean rate of 2.5 at less than 1 % loss for its bands: `claim` says what came of it.

Settings that are done are kept beside the JSON (OUT.records.jsonl) and not asked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import Tenths, any_compressor_of, dtype_of, journal_of, parsed, parser, part, progress, written
from benchmarks.rates.bodies import ChosenBodies, priced
from benchmarks.remembered import remember_states
from compllm_rag.compression.rate_policies.choosing import RateChooser, best_losses, chooser_of, rates_within
from compllm_rag.compression.rate_policies.measures import TextMeasures
from compllm_rag.compression.rate_policies.policies import PricedRate
from compllm_rag.compression.rates import max_rate
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig, IngestConfig, RateOptions
from compllm_rag.errors import DataFileError
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Segmented, Setting
from compllm_rag.evaluation.questions import Question, read_questions
from compllm_rag.evaluation.runner import in_seeded_order
from compllm_rag.evaluation.statistics import Record, statistics

SETS = ("squad_dev", "hotpotqa_dev", "musique_dev", "narrativeqa_valid")
ARTICLE = (1.5, 2.0, 3.0, 4.0)
_CLAIM_RATE, _CLAIM_LOSS = 2.5, 1.0
Row = dict[str, Any]


def choosers(compressor: ConceptCompressor, args: Any) -> dict[str, RateChooser]:
    """What is compared, by name; budgets get their price later."""
    longest = compressor.config.longest_unit
    measures = TextMeasures(lambda: compressor)
    make = partial(chooser_of, measures=measures, longest_unit=longest)
    found = {f"fixed {rate:g}": make(IngestConfig(rate=rate)) for rate in args.rates if rate <= max_rate(longest)}
    found["information"] = make(IngestConfig(rate="information"))
    article = RateOptions(bands=ARTICLE)
    found["information, article's bands"] = make(IngestConfig(rate="information", rate_options=article))
    if compressor.losses is not None:
        for limit in args.losses:
            options = RateOptions(most_loss=limit)
            found[f"learned {limit:g}"] = make(IngestConfig(rate="learned", rate_options=options))
    for share in args.shares:
        policy = PricedRate(best_losses(measures), choices=rates_within(longest))
        found[f"budget {share:g}"] = RateChooser(policy)
    found["fixed 2 with guard"] = make(IngestConfig(rate=2.0, guard="exact"))
    return found


def ask(
    compressor: ConceptCompressor,
    name: str,
    setting: Setting,
    bodies: ChosenBodies | None,
    questions: list[Question],
    args: Any,
    segmented: Segmented,
) -> dict[str, Any]:
    """Records of one setting, and what its passages cost."""
    asker = Asker(compressor, setting, segmented, GenerationConfig(max_new_tokens=args.max_new_tokens), bodies)
    show = Tenths()
    records = asker.ask(
        questions,
        batch_size=args.batch_size,
        answer=setting.mode != "none",
        progress=lambda n: show(name, n / len(questions)),
    )
    shown = [passage.text for question in questions for passage in question.passages]
    tokens = sum(map(segmented.n_tokens, shown))
    cost = None if setting.mode == "none" else 1.0
    if bodies is not None:
        cost = sum(map(bodies.cost, shown)) / tokens
    as_text = 0 if bodies is None else sum(bodies.choice(text).reason is not None for text in shown)
    return {"records": [record.to_dict() for record in records], "cost": cost, "passages_as_text": as_text}


def row(made: dict[str, Any], text: list[Record], none: list[Record]) -> Row:
    """What a setting comes to."""
    found = statistics([Record.from_dict(record) for record in made["records"]], text, none)
    names = ("recovered", "f1", "em", "nll", "positions")
    return {
        "prefill_cost": made["cost"],
        "achieved_rate": found.values["achieved_rate"],
        "passages_as_text": made["passages_as_text"],
        **{name: found.values[name] for name in names},
        **{f"{name}_interval": found.intervals[name] for name in names[:3]},
        "to_text": {name: found.paired[name] for name in ("f1", "nll")},
    }


def claim(rows: dict[str, Row]) -> dict[str, Any]:
    """The article's sentence: its bands reach a mean rate of 2.5 and lose less than 1 % of what text scores."""
    mine, text = rows["information, article's bands"], rows["text"]
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


def measure(compressor: ConceptCompressor, name: str, args: Any, journal: Any) -> dict[str, Any]:
    """One set of questions."""
    path = next((p for p in sorted((args.data_dir / "eval").glob(f"{name}.jsonl*"))), None)
    if path is None:
        raise DataFileError(
            "there is no such set",
            got=f"{name} in {args.data_dir}",
            expected="eval/NAME.jsonl(.gz)",
            next_step="see --sets",
        )
    segmented = Segmented(compressor)
    text = Setting("text")
    room = Asker(compressor, text, segmented, GenerationConfig(max_new_tokens=args.max_new_tokens))
    questions = [q for q in in_seeded_order(read_questions(path).questions) if room.room(q) <= room.window]
    questions = questions[: args.limit]
    progress(f"{name}: {len(questions)} questions")
    made: dict[str, dict[str, Any]] = {}
    for mode in ("text", "none"):
        make = partial(ask, compressor, f"{name}, {mode}", Setting.of(mode), None, questions, args, segmented)
        made[mode] = part(journal, f"{name}, {mode}", make)
    passages = [passage.text for question in questions for passage in question.passages]
    for label, chooser in choosers(compressor, args).items():
        if isinstance(chooser.policy, PricedRate):
            priced(chooser.policy, segmented, passages, float(label.split()[1]))
        bodies = ChosenBodies(compressor, chooser, segmented)
        make = partial(
            ask, compressor, f"{name}, {label}", Setting("concepts", 1.0), bodies, questions, args, segmented
        )
        made[label] = part(journal, f"{name}, {label}", make)
    records = {mode: [Record.from_dict(record) for record in made[mode]["records"]] for mode in ("text", "none")}
    rows = {label: row(each, records["text"], records["none"]) for label, each in made.items()}
    return {"n": len(questions), "rows": rows, "claim": claim(rows)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it."""
    shared = "llm reader compressor rates codec entry-layer dtype batch-size limit"
    options = parser("rates", __doc__, shared, batch_size=8, limit=150)
    options.add_argument("--data-dir", type=Path, required=True, help="holds eval/*.jsonl.gz")
    options.add_argument("--sets", nargs="+", default=list(SETS), help="of eval/")
    options.add_argument(
        "--losses", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2], help="limits of policy learned, nats a token"
    )
    options.add_argument(
        "--shares", type=float, nargs="+", default=[0.67, 0.5, 0.33], help="budgets, in shares of the tokens"
    )
    options.add_argument("--max-new-tokens", type=int, default=32)
    options.set_defaults(rates=[1.0, 1.5, 2.0, 3.0, 4.0])
    args = parsed(options, argv)
    compressor = remember_states(any_compressor_of(args))
    names = ("limit", "rates", "losses", "shares", "max_new_tokens")
    predictor = None if compressor.losses is None else compressor.losses.model_dump_json()
    same = {"llm": args.llm, "fingerprint": compressor.fingerprint, "losses_learned": predictor}
    same |= {"dtype": dtype_of(compressor)}
    same |= {name: getattr(args, name) for name in names}
    journal = journal_of(args.json, same)
    done = {name: measure(compressor, name, args, journal) for name in args.sets}
    shown = {name: value for name, value in same.items() if name != "losses_learned"}
    return written(args, {**shown, "learned": predictor is not None, "sets": done})
