"""Concepts move to another entry layer with what their LLM's layers have learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import toy
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import load_compressor, untrained_deep
from compllm_rag.config import CompressorConfig
from compllm_rag.errors import ConfigurationError
from compllm_rag.models.adapters import lora_state
from compllm_rag.training.entry_layer import at_entry_layer
from tests.cli.test_cli import run
from trained import LORA, PROMPT, trained_deep

ALIKE = {"read_rank": LORA["lora_rank"], "read_alpha": LORA["lora_alpha"], "read_modules": LORA["lora_modules"]}


def compressor(layers: int = 4, **config: object) -> DeepCompressor:
    return trained_deep(toy.llm(layers=layers), **{**ALIKE, **config})


def test_a_layer_that_changes_sides_keeps_its_lora() -> None:
    made = compressor()
    up, down = at_entry_layer(made, 3), at_entry_layer(made, 1)
    assert (up.config.entry_layer, down.config.entry_layer) == (3, 1)
    below, above = lora_state(made.decoder), lora_state(made.halves.upper)
    moved = {k: v for k, v in lora_state(up.decoder).items() if "layers.2." in k}
    assert len(moved) == len(above) / 2 == len(below) / 2
    for name, tensor in moved.items():
        assert torch.equal(tensor, above["model." + name.replace("layers.2.", "layers.0.")]), name
    assert at_entry_layer(up, 2).fingerprint == at_entry_layer(down, 2).fingerprint == made.fingerprint
    assert len({made.fingerprint, up.fingerprint, down.fingerprint}) == 3
    assert at_entry_layer(made, 2) is made


def test_the_prompts_lora_moves_and_begins_without_effect_where_it_was_not() -> None:
    made = compressor(**PROMPT, marked=True)
    up, down = at_entry_layer(made, 3), at_entry_layer(made, 1)
    known, more, less = (lora_state(each.halves.lower) for each in (made, up, down))
    assert set(less) < set(known) < set(more)
    for state in (more, less):
        assert all(torch.equal(tensor, known[name]) for name, tensor in state.items() if name in known)
    assert not any(tensor.any() for name, tensor in more.items() if name not in known and ".lora_B." in name)
    assert torch.equal(up.marker, made.marker) and made.marker.any()


@pytest.mark.parametrize(
    ("config", "layer", "said"),
    [({"read_rank": 2, "read_alpha": 4}, 3, "the same kind of LoRA"), ({}, 9, "entry layer")],
)
def test_what_cannot_move_is_refused(config: dict[str, int], layer: int, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        at_entry_layer(compressor(**config), layer)


def test_untrained_concepts_move_as_well() -> None:
    made = untrained_deep(toy.llm(layers=4))
    assert at_entry_layer(made, 3).config == CompressorConfig(**(made.config.model_dump() | {"entry_layer": 3}))


def test_a_selector_is_learned_where_they_enter_then(tmp_path: Path) -> None:
    llm = toy.save(tmp_path / "llm", layers=4)
    (tmp_path / "train").mkdir()
    rows = [
        {"id": str(i), "question": f"Who is at number {i}?", "context": f"Mr Marsh of number {i} is here.",
         "answers": ["Marsh"]}
        for i in range(12)
    ]  # fmt: skip
    (tmp_path / "train" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--llm", llm, "--data-dir", tmp_path, "--out", tmp_path / "moved", "--groups", 4, "--gates", 1]
    run("train", "selector", *words, "--entry-layer", 3)
    made = load_compressor(tmp_path / "moved")
    assert (made.config.entry_layer, made.config.selector) == (3, "learned")
