"""Compressors of deep concepts on disk and by name: what is saved comes back, and what does not belong is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import load_compressor, load_compressor_for, untrained_deep
from compllm_rag.compression.pretrained import load_reading, load_spec
from compllm_rag.compression.spec import ConceptSpec, DeferredCompressor
from compllm_rag.errors import ConfigurationError, FingerprintMismatchError, UnsupportedFormatError
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import TargetLLM
from trained import DEEP, PROMPT, information, trained, trained_deep

UNITS, KS = [list(range(5, 45)), [100, 7, 100, 7, 9]], [15, 5]
SETTINGS: dict[str, dict[str, Any]] = {
    "both LoRAs": {},
    "write alone": {"read_rank": 0, "read_alpha": 0, "read_modules": ()},
    "read alone": {"lora_rank": 0, "lora_alpha": 0, "lora_modules": ()},
    "prompt LoRA": PROMPT,
    "marked": {"marked": True},
    "another unit": {"unit_length": 60, "opening": (1, 2), "selector": "random", "entry_layer": 1},
}
FRESH = toy.llm(layers=4)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return trained_deep(FRESH).save_pretrained(tmp_path / "compressor")


@torch.inference_mode()
def read(halves: Halves) -> torch.Tensor:
    """What the upper half makes of some states."""
    states = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    return halves.above(states, torch.ones(1, 9, dtype=torch.long), torch.arange(9)[None])


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_saved_comes_back(tmp_path: Path, name: str) -> None:
    made = trained_deep(FRESH, **SETTINGS[name])
    folder = made.save_pretrained(tmp_path / "c")
    loaded = load_compressor(folder, FRESH)
    assert isinstance(loaded, DeepCompressor)
    assert (loaded.config, loaded.fingerprint) == (made.config, made.fingerprint)
    assert torch.equal(torch.cat(loaded.compress(UNITS, KS)), torch.cat(made.compress(UNITS, KS)))
    assert torch.equal(read(loaded.halves), read(made.halves))
    # Whoever only reads has the LoRA that reads, and none of the rest.
    assert torch.equal(read(load_reading(folder, FRESH, made.config)), read(made.halves))
    assert torch.equal(read(made.halves), read(Halves(FRESH, made.config.entry_layer))) == (made.config.read_rank == 0)
    spec = load_spec(folder, FRESH)
    assert spec.fingerprint == made.spec.fingerprint
    assert (spec.config, spec.width, spec.scale) == (made.config, 33, made.spec.scale)
    assert spec.units(toy.TEXT) == made.spec.units(toy.TEXT)


def test_an_untrained_one_comes_back(tmp_path: Path) -> None:
    made = untrained_deep(FRESH)
    loaded = DeepCompressor.from_pretrained(made.save_pretrained(tmp_path), FRESH)
    assert loaded.fingerprint == made.fingerprint
    assert torch.equal(torch.cat(loaded.compress(UNITS, KS)), torch.cat(made.compress(UNITS, KS)))


# Identity


def test_everything_that_changes_a_concept_or_its_reading_changes_the_fingerprint() -> None:
    made = trained_deep(FRESH)
    prints = [made.fingerprint, trained_deep(FRESH, seed=1).fingerprint, trained_deep(toy.llm("llama")).fingerprint]
    changes: list[dict[str, Any]] = [
        {"entry_layer": 1},
        {"opening": (1, 2, 3)},
        {"opening": ()},
        {"selector": "information"},
        {"selector": "random"},
        {"unit_length": 120},
        {"pins": ("digits",)},
        {"segment_length": 12},
        {"lora_alpha": 4},
        {"read_alpha": 8},
        SETTINGS["write alone"],
        SETTINGS["read alone"],
        PROMPT,
        {**PROMPT, "prompt_alpha": 12},
        {"marked": True},
    ]
    prints += [trained_deep(FRESH, **change).fingerprint for change in changes]
    prints.append(untrained_deep(FRESH, information=information(FRESH)).fingerprint)
    prints.append(untrained_deep(FRESH, information=information(FRESH, 1)).fingerprint)
    assert len(set(prints)) == len(prints)
    assert trained_deep(FRESH).fingerprint == made.fingerprint


@pytest.mark.parametrize("tree", ["decoder", "upper"])
def test_each_lora_is_part_of_the_identity(tree: str) -> None:
    made = trained_deep(FRESH)
    before = made.fingerprint
    module = made.decoder if tree == "decoder" else made.halves.upper
    name, parameter = next((n, p) for n, p in module.named_parameters() if ".lora_B" in n)
    with torch.no_grad():
        parameter[0, 0] += 1.0
    assert made.fingerprint == before, name
    assert made.refresh_fingerprint() != before


def test_the_dtype_does_not_change_the_fingerprint_and_hardly_the_concepts(toy_folder: Path) -> None:
    llms = [TargetLLM.from_pretrained(toy_folder, dtype=dtype) for dtype in ("float32", "bfloat16")]
    made = [trained_deep(llm, entry_layer=1) for llm in llms]
    assert made[0].fingerprint == made[1].fingerprint
    fine, coarse = (torch.cat(each.compress(UNITS, [40, 5])) for each in made)
    scale = float(fine[:, :-1].square().mean().sqrt())
    assert float((fine - coarse)[:, :-1].abs().mean()) < 2e-2 * scale


# What does not belong


def test_each_kind_refuses_the_other_and_names_it(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ConfigurationError, match="Next step: use DeepCompressor"):
        Compressor.from_pretrained(saved, FRESH)
    other = trained(FRESH).save_pretrained(tmp_path / "input")
    with pytest.raises(ConfigurationError, match="Next step: use Compressor"):
        DeepCompressor.from_pretrained(other, FRESH)
    assert isinstance(load_compressor(other, FRESH), Compressor)


def test_another_llm_is_refused_by_all_who_read(saved: Path) -> None:
    other = toy.llm(layers=4, seed=1)
    for reading in (load_compressor, load_spec):
        with pytest.raises(FingerprintMismatchError, match="another LLM"):
            reading(saved, other)


def _first(state: dict[str, torch.Tensor], prefix: str) -> str:
    return next(name for name in state if name.startswith(prefix))


DAMAGE = {
    "no information": lambda s: s.pop("information"),
    "short information": lambda s: s.update(information=s["information"][:-1].clone()),
    "no write tensor": lambda s: s.pop(_first(s, "lora.")),
    "no read tensor": lambda s: s.pop(_first(s, "read.")),
    "another read shape": lambda s: s.update({_first(s, "read."): torch.zeros(3, 3).half()}),
    "a surplus tensor": lambda s: s.update({"read.more": torch.zeros(2).half()}),
    "a head": lambda s: s.update({"head.weight": torch.zeros(32, 32).half()}),
    "another dtype": lambda s: s.update(information=s["information"].float()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_missing_surplus_and_misshapen_tensors_are_refused(saved: Path, kind: str) -> None:
    state = load_file(saved / "compressor.safetensors")
    DAMAGE[kind](state)
    save_file(state, saved / "compressor.safetensors")
    with pytest.raises(UnsupportedFormatError, match="Next step"):
        load_compressor(saved, FRESH)


def test_weights_of_another_training_are_refused(saved: Path, tmp_path: Path) -> None:
    other = trained_deep(FRESH, seed=3).save_pretrained(tmp_path / "other")
    (other / "compressor.safetensors").replace(saved / "compressor.safetensors")
    with pytest.raises(FingerprintMismatchError, match="not those its configuration names"):
        load_compressor(saved, FRESH)


def edit(folder: Path, **change: Any) -> None:
    record = json.loads((folder / "config.json").read_text())
    record["config"] |= change
    (folder / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize("layer", [4, 99])
def test_an_entry_layer_beyond_the_llm_is_refused(saved: Path, layer: int) -> None:
    edit(saved, entry_layer=layer)
    with pytest.raises(ConfigurationError, match="no such entry layer"):
        load_compressor(saved, FRESH)
    with pytest.raises(ConfigurationError, match="no such entry layer"):
        load_reading(saved, FRESH, load_spec(saved, FRESH).config)


@pytest.mark.parametrize("change", [{"entry_layer": -1}, {"unit_length": 1}, {"opening": "x"}, {"selector": "mine"}])
def test_settings_that_make_no_sense_are_refused(saved: Path, change: dict[str, Any]) -> None:
    edit(saved, **change)
    for reading in (load_compressor, load_spec):
        with pytest.raises(UnsupportedFormatError):
            reading(saved, FRESH)


def test_a_deferred_one_must_be_what_its_spec_says() -> None:
    one, other = trained_deep(FRESH), trained_deep(FRESH, seed=1)
    deferred = DeferredCompressor(one.spec, FRESH, lambda: other, one.halves)
    assert not deferred.loaded
    with pytest.raises(FingerprintMismatchError, match="changed since"):
        deferred.get()


# By name


def test_deep_concepts_in_the_middle_are_what_a_name_gives(toy_folder: Path) -> None:
    made = load_compressor_for(str(toy_folder))
    assert isinstance(made, DeepCompressor)
    assert (made.config.entry_layer, made.config.lora_rank, made.config.read_rank) == (1, 0, 0)
    assert isinstance(load_compressor_for(str(toy_folder), codec="input"), Compressor)


def test_codecs_and_entry_layers_that_nothing_has_are_refused(toy_folder: Path, tmp_path: Path) -> None:
    name = str(toy_folder)
    with pytest.raises(ConfigurationError, match="unknown codec.*deep or input"):
        load_compressor_for(name, codec="shallow")
    with pytest.raises(ConfigurationError, match="another entry layer"):
        load_compressor_for(name, codec="input", entry_layer=1)
    for layer in (0, 2, 7, -1):
        with pytest.raises(ConfigurationError):
            load_compressor_for(name, entry_layer=layer)
    folder = trained_deep(TargetLLM.from_pretrained(toy_folder), entry_layer=1).save_pretrained(tmp_path)
    assert load_compressor_for(name, compressor=folder, entry_layer=1).config.lora_rank == DEEP["lora_rank"]
    with pytest.raises(ConfigurationError, match="another entry layer"):
        load_compressor_for(name, compressor=folder, entry_layer=5)


def test_the_spec_tells_what_a_passage_costs() -> None:
    spec = untrained_deep(FRESH, 1).spec
    assert isinstance(spec, ConceptSpec)
    assert (spec.prefill_cost(1), spec.prefill_cost(2), spec.prefill_cost(3)) == (0.75, 0.375, 0.25)
