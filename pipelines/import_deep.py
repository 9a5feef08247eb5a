"""Make a compressor of deep concepts from the tensors of a training script: `layers.I.NAME.A` and `.B`, I a layer.

Below the entry layer they write concepts, from it on they read them. The LoRA's factor is 2, its alpha twice the rank.

Example: python pipelines/import_deep.py deep.safetensors smollm2-deep --entry-layer 15
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compllm_rag.compression.loading import untrained_deep
from compllm_rag.config import DEFAULT_LLM
from compllm_rag.errors import UnsupportedFormatError
from compllm_rag.models.adapters import load_lora_state
from compllm_rag.models.llm import TargetLLM

_NAME = re.compile(r"layers\.(\d+)\.(.+)\.([AB])")


def lora_states(
    tensors: dict[str, torch.Tensor], entry_layer: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors as PEFT names them: of the half that writes, and of the half that reads.

    Raises:
        UnsupportedFormatError: A name is none of a LoRA.
    """
    write, read = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise UnsupportedFormatError(
                "this is no tensor of deep concepts", got=name, expected="layers.I.NAME.A or .B"
            )
        layer, module, side = int(found[1]), found[2], found[3]
        half, number, prefix = (write, layer, "") if layer < entry_layer else (read, layer - entry_layer, "model.")
        half[f"{prefix}layers.{number}.{module}.lora_{side}.weight"] = tensor
    return write, read


def main() -> None:
    """Make it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--entry-layer", type=int, required=True)
    parser.add_argument("--information", type=Path, help="table of the tokens' information content, if it has its own")
    parser.add_argument("--llm", default=DEFAULT_LLM)
    parser.add_argument("--reader", type=Path, help="folder of a reader adapter; the shipped one where left out")
    args = parser.parse_args()
    from compllm_rag.compression.loading import shipped_adapter

    llm = TargetLLM.from_pretrained(args.llm, reader=args.reader or shipped_adapter(args.llm, "reader"))
    write, read = lora_states(load_file(args.weights), args.entry_layer)
    settings: dict[str, Any] = {}
    for prefix, half in (("lora", write), ("read", read)):
        ranks = {tensor.shape[0] for name, tensor in half.items() if ".lora_A." in name}
        if ranks:
            rank = ranks.pop()
            modules = tuple(sorted({name.split(".lora_")[0].rpartition(".")[2] for name in half}))
            settings |= {f"{prefix}_rank": rank, f"{prefix}_alpha": 2 * rank, f"{prefix}_modules": modules}
    table = load_file(args.information)["information"].float() if args.information else None
    made = untrained_deep(llm, args.entry_layer, information=table, **settings)
    load_lora_state(made.decoder, write)
    load_lora_state(made.halves.upper, read)
    made.save_pretrained(args.folder)
    print(f"written: {args.folder}, fingerprint {made.fingerprint[:16]}")


if __name__ == "__main__":
    main()
