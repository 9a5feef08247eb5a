"""Which tokens should a concept start from? Hard pruning to different anchors, before any training of a compressor.

Scored on the held-out part of the TRAINING questions: how anchors are chosen is a setting, and evaluation sets are not
there to choose settings by.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import measured, number, table
from benchmarks.common import Record, parsed, parser, progress, written
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.information import information_for
from compllm_rag.compression.loading import shipped_adapter
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.config import CompressorConfig
from compllm_rag.models.llm import TargetLLM
from compllm_rag.training.compressor_task import CompressorTask
from compllm_rag.training.importance import answer_odds
from compllm_rag.training.job_options import LINEARS, MaterialConfig
from compllm_rag.training.material import Material

# Weight of the answer odds, and whether words stay together.
CHOICES = [(0.0, False), (0.0, True), (1.0, False), (1.0, True), (2.0, False), (2.0, True), (3.0, True)]


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser("anchors", __doc__, "llm reader rates")
    options.add_argument("--data-dir", type=Path, required=True, help="holds what is trained on")
    options.add_argument("--groups", type=int, default=48, help="held-out groups of questions")
    args = parsed(options, argv)
    reader = shipped_adapter(args.llm, "reader") if args.reader == "auto" else args.reader
    llm = TargetLLM.from_pretrained(args.llm, reader=Path(reader) if reader not in (None, "none") else None)
    material = Material(
        *Material.files_of(args.data_dir), Segmenter(llm.tokenizer, 20), MaterialConfig(max_context=240)
    )
    table = information_for(llm.tokenizer)
    odds = answer_odds(material, table.numel())
    rows = []
    for weight, words in CHOICES:
        row = _one(llm, material, table + weight * odds, words, args)
        rows.append({"answer_weight": weight, "anchor_words": words, **row})
        progress(f"answer weight {weight:g}, words {words}: {row}")
    return written(args, {"llm": args.llm, "groups": args.groups, "rows": rows})


def _one(llm: TargetLLM, material: Material, table: torch.Tensor, words: bool, args: Any) -> dict[str, float]:
    config = CompressorConfig(layers=1, lora_rank=1, lora_alpha=1, lora_modules=LINEARS, anchor_words=words)
    task = CompressorTask(
        Compressor(llm, config, information=table), material, validation=args.groups, validation_rates=args.rates
    )
    return task.untrained()


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    rates = [key.removeprefix("pruned@") for key in record["rows"][0] if key.startswith("pruned@")]
    rows = [
        [f"{row['answer_weight']:g}", "yes" if row["anchor_words"] else "no"]
        + [number(row[f"pruned@{rate}"]) for rate in rates]
        for row in record["rows"]
    ]
    return [
        "## Anchors",
        "",
        "What is recovered by the anchors alone, before any training, by how they are chosen: information of the token "
        "by a unigram table, plus a weight times the log odds that a token is part of an answer, by token or by word "
        f"(the most informative token of a word speaks for all). {record['groups']} held-out groups of training "
        "questions, no evaluation set: this is where the choice was made.",
        "",
        f"{measured(record)}.",
        "",
        *table(["weight of the odds", "words together", *(f"recovered, rate {rate}" for rate in rates)], rows),
    ]
