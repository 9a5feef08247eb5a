"""What do answers lose when passages are read as concepts? Text, concepts, pruning and nothing, on several sets.

Reads evaluation sets from a folder (`--data-dir`, with `eval/*.jsonl.gz`), writes one JSON file a set as soon as that
set is done, and keeps each setting that is done beside it (SET.records.jsonl), so it can be interrupted and run again.
The probes need no data. `python -m benchmarks.report` turns the files into docs/quality.md.
"""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

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
    record_of,
)
from compllm_rag.compression.loading import with_unit_length
from compllm_rag.compression.rates import max_rate
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import CompressorConfig, Narrowing
from compllm_rag.evaluation.bodies import Setting
from compllm_rag.evaluation.journal import Journal
from compllm_rag.evaluation.probes import probe_file
from compllm_rag.evaluation.questions import read_questions, read_rows
from compllm_rag.evaluation.results import EvalConfig
from compllm_rag.evaluation.runner import evaluate_many


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """One evaluation set: its file, how many questions, which passages, and whether answers are generated."""

    file: str
    title: str
    limit: int
    passages: Literal["all", "gold"] = "all"
    generate: bool = True


SETS = {
    "squad": EvalSet("squad_dev.jsonl.gz", "SQuAD v1.1 dev", 500),
    "hotpotqa": EvalSet("hotpotqa_dev.jsonl.gz", "HotpotQA dev, gold paragraphs", 200, "gold"),
    "fairytaleqa": EvalSet("fairytaleqa_val.jsonl.gz", "FairytaleQA validation", 200),
    "quail": EvalSet("quail_dev.jsonl.gz", "QuAIL dev", 200, generate=False),
    "race": EvalSet("race_dev.jsonl.gz", "RACE dev", 200, generate=False),
    "narrativeqa": EvalSet("narrativeqa_valid.jsonl.gz", "NarrativeQA validation, summaries", 200),
}


def settings(
    config: CompressorConfig,
    rates: list[float],
    rivals: list[str],
    narrowings: Sequence[Narrowing] = (),
    narrowed_rates: Sequence[float] | None = None,
) -> list[Setting]:
    """Text, concepts and their rivals at each rate within reach, concepts narrowed in each way, nothing.

    Narrowed are those at `narrowed_rates`, None for all. At rate 1 nothing is left out that chance or pruning could
    choose; chance is a rival of deep concepts only.
    """
    reached = [rate for rate in rates if rate <= max_rate(config.longest_unit)]
    made = [Setting("text"), *(Setting.of("concepts", rate) for rate in reached)]
    made += [Setting.of(name, r) for name in rivals for r in reached if r > 1 and (config.deep or name != "random")]
    chosen = [rate for rate in reached if narrowed_rates is None or rate in narrowed_rates]
    made += [Setting.of("concepts", rate, narrowing=each) for each in narrowings for rate in chosen]
    return [*made, Setting("none")]


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it; the records of all sets by their names."""
    options = parser(
        "quality", __doc__, "llm data-dir rates reader compressor codec entry-layer dtype batch-size limit"
    )
    options.add_argument("--out", type=Path, default=Path("quality"), help="folder for the results, a file a set")
    options.add_argument("--rivals", nargs="*", choices=["random", "pruned", "budgeted"], default=["random", "pruned"])
    options.add_argument(
        "--narrow", nargs="*", type=Narrowing.parse, default=[], metavar="LAYER:SHARE", help="narrow concepts, too"
    )
    options.add_argument(
        "--narrow-rates", nargs="+", type=float, help="narrow at these of the rates alone (default: at all of them)"
    )
    options.add_argument("--unit-length", type=int, help="most tokens that deep concepts are made of at once")
    options.add_argument("--sets", nargs="+", choices=[*SETS, "probes"], default=["probes", *SETS])
    args = parsed(options, argv)
    if args.narrow_rates and (not args.narrow or not set(args.narrow_rates) <= set(args.rates)):
        options.error("--narrow-rates must be some of --rates, and --narrow must say how they are narrowed")
    args.out.mkdir(parents=True, exist_ok=True)
    compressor = any_compressor_of(args)
    weights = compressor.fingerprint
    if args.unit_length is not None:
        if not compressor.config.deep:
            options.error("--unit-length is of deep concepts")
        compressor = with_unit_length(compressor, args.unit_length)
    made = {}
    for name in args.sets:
        if name != "probes" and args.data_dir is None:
            progress(f"{name}: left out, there is no --data-dir")
            continue
        limit = args.limit or (SETS[name].limit if name in SETS else None)
        target = args.out / f"{name}.json"
        journal = journal_of(
            target, {"fingerprint": compressor.fingerprint, "limit": limit, "dtype": dtype_of(compressor)}
        )
        make = partial(_one, name, limit, compressor, args, journal)
        narrowed = {"narrow": list(map(str, args.narrow))} if args.narrow else {}
        narrowed |= {"narrow_rates": args.narrow_rates} if args.narrow_rates else {}
        made[name] = part(journal, name, make, rates=args.rates, **narrowed)
        if compressor.fingerprint != weights:
            made[name] = {**made[name], "weights": weights}
        target.write_text(json.dumps(made[name], indent=1) + "\n", encoding="utf-8")
    if args.json is not None:
        args.json.write_text(json.dumps(made) + "\n", encoding="utf-8")
    return made


def _one(name: str, limit: int | None, compressor: ConceptCompressor, args: Namespace, journal: Journal) -> Record:
    chosen = SETS.get(name) or EvalSet(probe_file().name, "Fidelity probes", 0)
    path = args.data_dir / "eval" / chosen.file if name in SETS else probe_file()
    config = EvalConfig(limit=limit, passages=chosen.passages, generate=chosen.generate, batch_size=args.batch_size)
    results = evaluate_many(
        compressor,
        read_questions(path),
        settings(compressor.config, args.rates, args.rivals, args.narrow, args.narrow_rates),
        config=config,
        data=path.name,
        progress=Tenths(),
        journal=journal,
    )
    shown = (f"{r.mode}@{r.rate or 1:g} {r.narrowing or ''} f1 {r.f1} recovered {r.recovered}" for r in results)
    progress(f"{name}: " + ", ".join(shown))
    record = {
        "fingerprint": compressor.fingerprint,
        "dtype": dtype_of(compressor),
        "limit": limit,
        "rates": args.rates,
        "set": name,
        "title": chosen.title,
        "llm": compressor.llm.source,
        "compressor": compressor.config.model_dump(mode="json"),
        "results": [result.to_dict() for result in results],
    }
    if name == "probes":
        record["kinds"] = [_by_kind(result, path) for result in results]
    return record_of(args, record)


def _by_kind(result: Any, path: Path) -> dict[str, Any]:
    """F1 and accuracy of each kind of probe, needles by depth too."""
    rows = {str(row["id"]): row for _, row in read_rows(path)}
    groups: dict[str, list[Any]] = {}
    for record in result.records:
        row = rows[record.id]
        groups.setdefault(str(row["kind"]), []).append(record)
        if "depth" in row:
            groups.setdefault(f"needle at {row['depth']} %", []).append(record)
    return {kind: {"n": len(g), "f1": round(sum(r.f1 for r in g) / len(g), 2)} for kind, g in groups.items()}
