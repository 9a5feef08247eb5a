"""A tiny world to train in: questions and texts over the toy story."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.config import CompressorConfig
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import TextSpan
from compllm_rag.training.examples import Body, Branch, Example
from compllm_rag.training.material import Material, MaterialConfig
from trained import information

LORA: dict[str, Any] = {
    "lora_rank": 4,
    "lora_alpha": 8,
    "lora_modules": ("q_proj", "v_proj", "down_proj"),
    "layers": 2,
    "scale": 0.3,
}


def fresh(llm: TargetLLM, **config: Any) -> Compressor:
    """An untrained compressor that can be trained."""
    return Compressor(llm, CompressorConfig(**{**LORA, **config}), information=information(llm))


def example(seed: int = 0) -> Example:
    """Two passages, three branches; one of them without a prompt."""
    a, b = (5 + seed, 7, 11, 13, 17), (20, 21, 22 + seed, 23, 24, 25, 26)
    body = Body((a[:3], a[3:]))
    other = Body((b,))
    branches = (
        Branch((30, 31, 32 + seed), (40, 41), "qa"),
        Branch((), (50, 51, 52), "continue"),
        Branch((33,), (60 + seed,), "copy"),
    )
    return Example((TextSpan((2, 3, 4)), body, TextSpan((9,)), other, TextSpan((8, 6))), branches)


def write_world(folder: Path, *, rows: int = 24, bad: bool = True) -> Path:
    """A data folder: `train/` with questions, `text/` with texts."""
    (folder / "train").mkdir(parents=True)
    (folder / "text").mkdir()
    sentences = [s.strip() for s in toy.TEXT.replace("\n", " ").split(". ") if s.strip()]
    with gzip.open(folder / "train" / "story.jsonl.gz", "wt", encoding="utf-8") as file:
        for i in range(rows):
            context = ". ".join(sentences[i % 6 : i % 6 + 3]) + f". Page {i}."
            qas = [
                {"id": f"{i}-{j}", "question": f"What is on page {i}, line {j}?", "answers": [f"line {i + j}"]}
                for j in range(3)
            ]
            file.write(json.dumps({"id": str(i), "title": f"Page {i}", "context": context, "qas": qas}) + "\n")
        if bad:
            file.write(json.dumps({"id": "no-context", "question": "Who?", "answers": ["Ada"]}) + "\n")
            file.write(json.dumps({"id": "no-answer", "context": "Ada.", "question": "Who?", "answers": []}) + "\n")
    with (folder / "text" / "stories.jsonl").open("w", encoding="utf-8") as file:
        for i in range(5):
            file.write(json.dumps({"id": f"t{i}", "title": "", "text": toy.TEXT * 2}) + "\n")
    return folder


def material(llm: TargetLLM, folder: Path, **config: Any) -> Material:
    """Material of the tiny world, cut as a compressor of S = 20 cuts."""
    return Material(*Material.files_of(folder), fresh(llm).segmenter, MaterialConfig(**{"max_context": 80, **config}))
