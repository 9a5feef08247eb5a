"""Which tokens should a concept start from? Hard pruning to different anchors, before any training of a compressor.

Scored on the held-out part of the TRAINING questions: how anchors are chosen is a setting, and evaluation sets are not
there to choose settings by.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.common import parser, progress, write
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


def main() -> None:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--data-dir", type=Path, required=True)
    options.add_argument("--reader", default="auto", help="folder of a reader, auto or none")
    options.add_argument("--groups", type=int, default=48, help="held-out groups of questions")
    options.add_argument("--rates", type=float, nargs="+", default=[2.0, 4.0])
    args = options.parse_args()
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
    write({"llm": args.llm, "groups": args.groups, "rows": rows}, args.json)


def _one(llm: TargetLLM, material: Material, table: torch.Tensor, words: bool, args: Any) -> dict[str, float]:
    config = CompressorConfig(layers=1, lora_rank=1, lora_alpha=1, lora_modules=LINEARS, anchor_words=words)
    task = CompressorTask(
        Compressor(llm, config, information=table), material, validation=args.groups, validation_rates=args.rates
    )
    return task.untrained()


if __name__ == "__main__":
    main()
