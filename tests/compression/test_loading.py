"""From names to a compressor: LLM, reader and compressor that belong together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import toy
from compllm_rag.compression import loading
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import load_compressor_for, shipped_adapter, shipped_compressor
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import DEFAULT_LLM
from compllm_rag.errors import (
    ConfigurationError,
    FingerprintMismatchError,
    ModelFetchError,
    UnknownModelError,
    UnsupportedFormatError,
)
from compllm_rag.models.llm import TargetLLM
from trained import trained, trained_deep

MODULE = "model.layers.0.self_attn.q_proj"


def write_reader(folder: Path, *, seed: int = 0, rank: int = 2, width: int = 32) -> Path:
    """A plain LoRA of one module in PEFT's format."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.{MODULE}.lora_A.weight": torch.randn(rank, width, generator=generator),
        f"base_model.model.{MODULE}.lora_B.weight": torch.randn(width, rank, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    return write_reader(tmp_path / "reader")


@pytest.fixture
def shipped(tmp_path: Path, toy_folder: Path, reader: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an LLM for which a reader and a trained compressor ship."""
    name = str(toy_folder)
    made = trained(TargetLLM.from_pretrained(name, reader=reader)).save_pretrained(tmp_path / "trained")
    folders = {"reader": reader, "compressor": made}
    monkeypatch.setattr(loading, "shipped_adapter", lambda llm, kind: folders.get(kind) if llm == name else None)
    return name


def weight(compressor: ConceptCompressor) -> torch.Tensor:
    return compressor.llm.model.get_submodule(MODULE).weight.detach().clone()


def test_shipped_reader_of_the_embedded_llm() -> None:
    folder = shipped_adapter(DEFAULT_LLM, "reader")
    assert folder is not None
    assert (folder / "adapter_config.json").is_file()
    assert (folder / "adapter_model.safetensors").is_file()


def test_shipped_compressors_of_the_embedded_llm() -> None:
    for asked in (None, 15):
        folder = shipped_compressor(DEFAULT_LLM, "deep", asked)
        assert folder is not None
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
        assert (config["entry_layer"], config["selector"]) == (15, "learned")
        assert (folder / "compressor.safetensors").stat().st_size < 25_000_000
    assert shipped_compressor(DEFAULT_LLM, "deep", 18) is None
    assert shipped_compressor(DEFAULT_LLM, "input") is not None and shipped_compressor(DEFAULT_LLM, "input", 3) is None


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../adapters/smollm2-135m-instruct", "/", "/smollm2-135m-instruct", "./smollm2-135m-instruct"]
    + ["smollm2-135m-instruct/", "org/smollm2-135m-instruct", "no-such-model", "SMOLLM2-135m-instruct-x"],
)
def test_only_names_lead_to_what_ships(name: str) -> None:
    assert shipped_adapter(name, "reader") is None


def test_toy_llm_has_nothing_shipped(toy_folder: Path) -> None:
    made = load_compressor_for(str(toy_folder), codec="input")
    assert made.config.lora_rank == 0
    assert not [name for name in made.llm.digests if name.startswith("reader/")]
    assert not made.head.weight.any()


def test_reader_is_merged_in_full_precision(toy_folder: Path, reader: Path) -> None:
    from safetensors.torch import load_file

    base, merged = load_compressor_for(str(toy_folder)), load_compressor_for(str(toy_folder), reader=reader)
    state = load_file(reader / "adapter_model.safetensors")
    a, b = (state[f"base_model.model.{MODULE}.lora_{side}.weight"] for side in "AB")
    assert torch.allclose(weight(merged), weight(base) + 2.0 * (b @ a), atol=1e-6)


def test_reader_is_part_of_the_identity(toy_folder: Path, reader: Path, tmp_path: Path) -> None:
    name = str(toy_folder)
    other = write_reader(tmp_path / "other", seed=1)
    made = [load_compressor_for(name, reader=folder) for folder in (None, reader, other)]
    assert len({c.llm.identity for c in made}) == 3
    assert len({c.fingerprint for c in made}) == 3
    # By content, not by path.
    copied = Path(shutil.copytree(reader, tmp_path / "copy"))
    assert load_compressor_for(name, reader=str(copied)).fingerprint == made[1].fingerprint


def test_shipped_reader_and_compressor_are_taken_together(shipped: str) -> None:
    made = load_compressor_for(shipped, codec="input")
    assert "reader/adapter_model.safetensors" in made.llm.digests
    assert made.config.lora_rank == 4
    assert made.head.weight.any()


def test_a_shipped_compressor_of_deep_concepts_is_what_auto_takes(
    shipped: str, tmp_path: Path, reader: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = load_compressor_for(shipped)
    assert isinstance(bare, DeepCompressor)
    assert bare.config.lora_rank == 0  # none ships yet
    made = trained_deep(TargetLLM.from_pretrained(shipped, reader=reader), entry_layer=1)
    folders = {"reader": reader, "deep": made.save_pretrained(tmp_path / "deep")}
    monkeypatch.setattr(loading, "shipped_adapter", lambda llm, kind: folders.get(kind))
    assert load_compressor_for(shipped).fingerprint == made.fingerprint
    assert load_compressor_for(shipped, compressor=None).config.lora_rank == 0
    assert load_compressor_for(shipped, entry_layer=1).fingerprint == made.fingerprint
    assert load_compressor_for(shipped, entry_layer=1, compressor=None).config.lora_rank == 0
    assert load_compressor_for(shipped, reader=None).config.lora_rank == 0


def test_of_another_entry_layer_none_ships(tmp_path: Path, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = toy.save(tmp_path / "llm", layers=4)
    made = trained_deep(TargetLLM.from_pretrained(llm, reader=reader), entry_layer=2)
    folders = {"reader": reader, "deep": made.save_pretrained(tmp_path / "deep")}
    monkeypatch.setattr(loading, "shipped_adapter", lambda _, kind: folders.get(kind))
    assert load_compressor_for(str(llm), entry_layer=2).fingerprint == made.fingerprint
    untrained = load_compressor_for(str(llm), entry_layer=3).config
    assert (untrained.entry_layer, untrained.lora_rank) == (3, 0)
    with pytest.raises(ConfigurationError, match="another entry layer"):
        load_compressor_for(str(llm), codec="input", entry_layer=2)


def test_no_reader_means_the_model_as_it_is_and_an_untrained_compressor(shipped: str) -> None:
    made = load_compressor_for(shipped, reader=None)
    assert not [name for name in made.llm.digests if name.startswith("reader/")]
    assert made.config.lora_rank == 0
    assert made.llm.identity == TargetLLM.from_pretrained(shipped).identity


def test_reader_of_ones_own_means_an_untrained_compressor(shipped: str, tmp_path: Path) -> None:
    made = load_compressor_for(shipped, reader=write_reader(tmp_path / "own", seed=5))
    assert made.config.lora_rank == 0


def test_no_compressor_means_the_untrained_one(shipped: str) -> None:
    made = load_compressor_for(shipped, compressor=None)
    assert made.config.lora_rank == 0
    assert "reader/adapter_model.safetensors" in made.llm.digests


def test_named_compressor_is_the_one_that_was_saved(toy_folder: Path, tmp_path: Path) -> None:
    name = str(toy_folder)
    saved = trained(TargetLLM.from_pretrained(name))
    folder = saved.save_pretrained(tmp_path / "mine")
    made = load_compressor_for(name, compressor=folder)
    assert made.fingerprint == saved.fingerprint
    (ours,), (theirs,) = (c.compress([[10, 20, 30, 40]], [2]) for c in (made, saved))
    assert torch.equal(ours, theirs)


def test_compressor_of_another_reader_is_refused(shipped: str, toy_folder: Path, tmp_path: Path) -> None:
    folder = trained(TargetLLM.from_pretrained(toy_folder)).save_pretrained(tmp_path / "bare")
    load_compressor_for(shipped, reader=None, compressor=folder)
    with pytest.raises(FingerprintMismatchError, match="another LLM"):
        load_compressor_for(shipped, compressor=folder)


def test_compressor_of_another_llm_is_refused(toy_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(toy_folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.01}))
    folder = trained(TargetLLM.from_pretrained(other)).save_pretrained(tmp_path / "compressor")
    with pytest.raises(FingerprintMismatchError):
        load_compressor_for(str(toy_folder), compressor=folder)


def test_reader_of_another_model_is_refused(toy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="another model"):
        load_compressor_for(str(toy_folder), reader=write_reader(tmp_path / "wide", width=64))


def test_reader_that_is_not_there(toy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormatError, match="not complete"):
        load_compressor_for(str(toy_folder), reader=tmp_path / "none")


def test_names_are_resolved_as_everywhere() -> None:
    with pytest.raises(UnknownModelError, match="did you mean"):
        load_compressor_for("smollm2-135m-instrukt")
    with pytest.raises(ModelFetchError):
        load_compressor_for(offline=True)
