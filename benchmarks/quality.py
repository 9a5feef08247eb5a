"""What do answers lose when passages are read as concepts? Text, concepts, pruning and nothing, on several sets.

Reads evaluation sets from a folder (`--data-dir`, with `eval/*.jsonl.gz`), writes one JSON file a set as soon as that
set is done, and keeps each setting that is done beside it (SET.records.jsonl), so it can be interrupted and run again.
The probes need no data. `python -m benchmarks.report` turns the files into docs/quality.md.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal

from benchmarks.common import command, environment, parser, progress
from compllm_rag.compression.loading import load_compressor_for
from compllm_rag.compression.rates import max_rate
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


def settings(segment_length: int, rates: list[float]) -> list[tuple[str, float | None]]:
    """Text, concepts and pruning at each rate within reach, nothing."""
    reached = [rate for rate in rates if rate <= max_rate(segment_length)]
    made: list[tuple[str, float | None]] = [("text", None)]
    made += [("concepts", rate) for rate in reached] + [("pruned", rate) for rate in reached]
    return [*made, ("none", None)]


def main() -> None:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--data-dir", type=Path, help="holds eval/*.jsonl.gz; without it only the probes run")
    options.add_argument("--out", type=Path, default=Path("quality"), help="folder for the results, a file a set")
    options.add_argument("--sets", nargs="+", choices=[*SETS, "probes"], default=["probes", *SETS])
    options.add_argument("--limit", type=int, help="questions of each set (default: 500 of SQuAD, 200 of the others)")
    options.add_argument("--rates", type=float, nargs="+", default=[2.0, 4.0, 6.0])
    options.add_argument("--reader", default="auto", help="folder of a reader, auto or none")
    options.add_argument("--compressor", default="auto", help="folder of a compressor, auto or none")
    options.add_argument("--batch-size", type=int, default=16)
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    compressor = load_compressor_for(
        args.llm,
        reader=None if args.reader == "none" else args.reader,
        compressor=None if args.compressor == "none" else args.compressor,
    )
    made = []
    for name in args.sets:
        chosen = SETS.get(name)
        if chosen is not None and args.data_dir is None:
            progress(f"{name}: left out, there is no --data-dir")
            continue
        made.append(name)
        path = probe_file() if chosen is None else args.data_dir / "eval" / chosen.file
        limit = args.limit or (chosen.limit if chosen else None)
        _one(name, path, chosen or EvalSet(path.name, "Fidelity probes", 0), limit, compressor, args)
    text = json.dumps({name: json.loads((args.out / f"{name}.json").read_text(encoding="utf-8")) for name in made})
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")


def _one(name: str, path: Path, chosen: EvalSet, limit: int | None, compressor: Any, args: Any) -> None:
    target = args.out / f"{name}.json"
    same = {"fingerprint": compressor.fingerprint, "limit": limit, "rates": args.rates}
    if target.exists() and {k: json.loads(target.read_text(encoding="utf-8")).get(k) for k in same} == same:
        progress(f"{name}: done before")
        return
    config = EvalConfig(limit=limit, passages=chosen.passages, generate=chosen.generate, batch_size=args.batch_size)
    results = evaluate_many(
        compressor,
        read_questions(path),
        settings(compressor.config.segment_length, args.rates),
        config=config,
        data=path.name,
        progress=_Steps(),
        journal=Journal(args.out / f"{name}.records.jsonl"),
    )
    record: dict[str, Any] = {
        "command": command(sys.argv),
        "environment": environment(),
        **same,
        "set": name,
        "title": chosen.title,
        "llm": compressor.llm.source,
        "compressor": compressor.config.model_dump(mode="json"),
        "results": [result.to_dict() for result in results],
    }
    if name == "probes":
        record["kinds"] = [_by_kind(result, path) for result in results]
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    progress(f"{name}: " + ", ".join(f"{r.mode}@{r.rate or 1:g} f1 {r.f1} recovered {r.recovered}" for r in results))


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


class _Steps:
    """A line whenever a tenth of a setting is done."""

    def __init__(self) -> None:
        self.last = ("", -1)

    def __call__(self, message: str, share: float | None) -> None:
        now = (message, int(10 * (share or 0)))
        if now != self.last:
            self.last = now
            progress(f"{message}, {10 * now[1]} %")


if __name__ == "__main__":
    main()
