"""What does each choice in the compressor bring? Small runs, all alike but for one choice, of equal time or steps.

Every run starts anew with the same seed and data, trains for `--minutes` (or `--steps`, fairer where a machine is
busy), and is scored on the held-out part of the TRAINING data; runs that are done are kept in `--out` and not repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cells import measured, number, table
from benchmarks.common import Record, parsed, parser, part, progress, written
from compllm_rag.compression.loading import shipped_adapter
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.config import CompressorConfig
from compllm_rag.evaluation.journal import Journal
from compllm_rag.models.llm import TargetLLM
from compllm_rag.training.cards import read_log
from compllm_rag.training.compressor_task import CompressorTask
from compllm_rag.training.job_options import LINEARS, MaterialConfig, ObjectiveConfig, RatesConfig
from compllm_rag.training.jobs import new_compressor
from compllm_rag.training.live_reader import LiveReader
from compllm_rag.training.loop import train
from compllm_rag.training.material import Material
from compllm_rag.training.run_config import RunConfig

EQUAL = {
    "time": "of equal time on the same machine, so a cheaper choice takes more steps",
    "steps": "of equal steps, so a cheaper choice takes less time",
}
NOTE = (
    "Runs from nothing, all alike but for one choice, {equal}; scores are of held-out training questions, of no "
    "evaluation set. They say which choice learns faster at the start, not where it ends."
)
CHOICES: dict[str, dict[str, Any]] = {
    "as shipped: anchors, KL, 12 layers": {},
    "anchors by unigram information alone": {"config": {"anchor_words": False}, "answer_weight": 0.0},
    "concepts start from means": {"config": {"queries": "mean"}},
    "paper's queries: EOS": {"config": {"queries": "eos"}},
    "no KL": {"objective": {"kl": 0.0}},
    "no hidden states": {"objective": {"hidden": 0.0}},
    "8 layers": {"config": {"layers": 8}},
    "16 layers": {"config": {"layers": 16}},
    "all layers": {"config": {"layers": None}},
    "anchors at their source positions": {"config": {"anchor_positions": "source"}},
    "sink token in front": {"config": {"sink": True}},
    "no reader": {"reader": None},
    "reader trained along": {"live": 8},
    "segments of 40 tokens": {"config": {"segment_length": 40}},
}


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser("ablations", __doc__, "llm")
    options.add_argument("--data-dir", type=Path, required=True, help="holds what is trained on")
    options.add_argument("--out", type=Path, required=True, help="folder for the runs")
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--steps", type=int, help="equal steps in place of equal time")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--max-context", type=int, default=240)
    options.add_argument("--validation", type=int, default=24)
    options.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    args = parsed(options, argv)
    names = ("llm", "minutes", "steps", "batch", "max_context", "validation")
    journal = Journal(args.out / "records.jsonl", {name: getattr(args, name) for name in names})
    rows = [
        part(journal, name, partial(_one, number, name, args))
        for number, name in enumerate(CHOICES)
        if name in args.choices
    ]
    untrained = {
        "name": "hard pruning (no training)",
        "steps": 0,
        "nll_text": rows[0]["nll_text"],
        **{f"concepts@{rate}": rows[0].get(f"pruned@{rate}") for rate in (2, 4)},
    }
    note = NOTE.format(equal=EQUAL["steps" if args.steps else "time"])
    return written(args, {"note": note, "rows": [untrained, *rows]})


def _one(number: int, name: str, args: Any) -> dict[str, Any]:
    choice = CHOICES[name]
    out = args.out / f"{number:02d}"
    reader = shipped_adapter(args.llm, "reader") if choice.get("reader", "auto") == "auto" else None
    llm = TargetLLM.from_pretrained(args.llm, reader=reader)
    live = LiveReader(llm, choice["live"], reader) if "live" in choice else None
    depth = llm.model.config.get_text_config().num_hidden_layers
    fields = {"layers": min(12, depth), "lora_rank": 32, "lora_alpha": 64, "lora_modules": LINEARS}
    fields |= {"anchor_words": True} | choice.get("config", {})
    if fields["layers"] is not None:
        fields["layers"] = min(fields["layers"], depth)
    config = CompressorConfig(**fields)
    segmenter = Segmenter(llm.tokenizer, config.segment_length, config.segmenter_version)
    material = Material(*Material.files_of(args.data_dir), segmenter, MaterialConfig(max_context=args.max_context))
    compressor = new_compressor(llm, config, material, choice.get("answer_weight", 2.0))
    objective = ObjectiveConfig(**choice.get("objective", {}))
    task = CompressorTask(compressor, material, objective, RatesConfig(), validation=args.validation, live=live)
    steps = args.steps or 100_000
    run = RunConfig(
        steps=steps,
        minutes=None if args.steps else args.minutes,
        batch=args.batch,
        micro_tokens=800,
        warmup=20,
        decay=0.0,
        validate_every=steps,
        save_minutes=60,
    )
    train(task, run, out, lambda message, share: progress(f"{name}: {message}"))
    found = task.validate(lambda message, share: None)
    return {"name": name, "steps": read_log(out / "log.jsonl")[0][-1]["step"], **found}


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    head = ["what", "steps", "recovered, rate 2", "recovered, rate 4", "NLL with text"]
    rows = []
    for row in record["rows"]:
        recovered = [number(row.get(f"concepts@{rate}")) for rate in (2, 4)]
        rows.append([row["name"], str(row["steps"]), *recovered, number(row["nll_text"], 2)])
    return ["## Ablations", "", record["note"], "", f"{measured(record)}.", "", *table(head, rows)]
