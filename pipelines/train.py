"""The training job: reader, deep concepts or compressor, on one device or many, to run in time slots and to copy from.

    python pipelines/train.py reader --data-dir data --out runs/reader
    python pipelines/train.py deep --data-dir data --out runs/deep --reader runs/reader/best
    python pipelines/train.py compressor --data-dir data --out runs/compressor --reader runs/reader/best --minutes 9
    torchrun --nproc-per-node 4 pipelines/train.py compressor --llm org/name@revision --data-dir data --out runs/large

The options are those of `compllm-rag train`; called again with the same ones, it goes on where it was. With `torchrun`
each process reads examples of its own and the gradients are averaged; the first one validates and writes.

A 4B model on one GPU of 80 GB: the frozen weights in bfloat16 take 8 GB and are shared by target and compressor; LoRA,
head and their optimizer state stay under 1 GB; what is left goes to activations, which `--micro-tokens` bounds (start
with 4096; halve it if memory does not suffice, the result is the same).
"""

from __future__ import annotations

import os
import sys

from compllm_rag.cli.main import app


def main() -> None:
    """Run `compllm-rag train` with the arguments of the job; only the first process talks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if int(os.environ.get("RANK", "0")) > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - for good
    app(["train", *sys.argv[1:]], prog_name="train.py")


if __name__ == "__main__":
    main()
