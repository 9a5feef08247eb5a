"""Compressors on disk: exact, whole, and for the LLM they were made for."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.config import CompressorConfig
from compllm_rag.errors import FingerprintMismatchError, UnknownModelError, UnsupportedFormatError
from compllm_rag.models.llm import TargetLLM
from trained import LORA, information, randomise, trained

SEGMENTS, KS = [list(range(50, 70)), [80, 90, 100]], [10, 2]


def concepts(compressor: Compressor) -> torch.Tensor:
    return torch.cat(compressor.compress(SEGMENTS, KS))


@pytest.fixture
def saved(llm: TargetLLM, tmp_path: Path) -> Path:
    """A trained compressor's folder."""
    return trained(llm).save_pretrained(tmp_path / "compressor")


@pytest.mark.parametrize(
    "setting",
    [{}, {"layers": 1, "sink": True}, {"queries": "eos", "scale": 0.37}, {"anchor_positions": "source"}],
    ids=["default", "one layer", "eos queries", "source positions"],
)
def test_a_saved_compressor_makes_the_same_concepts_under_the_same_name(
    llm: TargetLLM, tmp_path: Path, setting: dict[str, Any]
) -> None:
    compressor = trained(llm, **setting)
    folder = compressor.save_pretrained(tmp_path / "new" / "folder")
    loaded = Compressor.from_pretrained(folder, llm)
    assert torch.equal(concepts(loaded), concepts(compressor))
    assert loaded.fingerprint == compressor.fingerprint
    assert loaded.config == compressor.config
    assert sorted(path.name for path in folder.iterdir()) == ["compressor.safetensors", "config.json"]


def test_an_untrained_compressor_can_be_saved(llm: TargetLLM, compressor: Compressor, tmp_path: Path) -> None:
    loaded = Compressor.from_pretrained(compressor.save_pretrained(tmp_path), llm)
    assert torch.equal(concepts(loaded), concepts(compressor))
    assert loaded.fingerprint == compressor.fingerprint


def test_weights_finer_than_the_file_come_back_rounded_under_the_same_name(llm: TargetLLM, tmp_path: Path) -> None:
    compressor = Compressor(llm, CompressorConfig(**LORA), information=torch.rand(400) * 9)
    torch.nn.init.normal_(compressor.head.weight, std=0.1)
    loaded = Compressor.from_pretrained(compressor.save_pretrained(tmp_path), llm)
    assert loaded.fingerprint == compressor.fingerprint
    torch.testing.assert_close(concepts(loaded), concepts(compressor), atol=5e-3, rtol=5e-3)


def test_weights_changed_after_the_first_look_are_saved_under_their_own_name(llm: TargetLLM, tmp_path: Path) -> None:
    compressor = trained(llm)
    before = compressor.fingerprint
    randomise(compressor, seed=5)
    loaded = Compressor.from_pretrained(compressor.save_pretrained(tmp_path), llm)
    assert loaded.fingerprint == compressor.fingerprint != before


def test_saving_again_replaces_what_was_there(llm: TargetLLM, saved: Path) -> None:
    second = trained(llm, seed=9)
    second.save_pretrained(saved)
    assert Compressor.from_pretrained(saved, llm).fingerprint == second.fingerprint


def test_the_llm_is_loaded_by_the_name_it_was_saved_with(toy_folder: Path, tmp_path: Path) -> None:
    compressor = trained(TargetLLM.from_pretrained(toy_folder))
    compressor.save_pretrained(tmp_path)
    loaded = Compressor.from_pretrained(tmp_path)
    assert loaded.fingerprint == compressor.fingerprint
    assert loaded.llm.source == str(toy_folder)


# Another LLM


def test_another_llm_is_refused_and_both_are_named(llm: TargetLLM, saved: Path) -> None:
    other = toy.llm(seed=1)
    with pytest.raises(FingerprintMismatchError) as caught:
        Compressor.from_pretrained(saved, other)
    assert llm.identity[:16] in str(caught.value)
    assert other.identity[:16] in str(caught.value)


# Damage


def edit_config(folder: Path, **change: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def edit_settings(folder: Path, **change: Any) -> None:
    edit_config(folder, config=json.loads((folder / "config.json").read_text())["config"] | change)


@pytest.mark.parametrize("name", ["config.json", "compressor.safetensors"])
def test_a_missing_file_is_refused(llm: TargetLLM, saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(UnsupportedFormatError, match=name):
        Compressor.from_pretrained(saved, llm)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("name", ["config.json", "compressor.safetensors"])
def test_a_truncated_file_is_refused(llm: TargetLLM, saved: Path, name: str, share: float) -> None:
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UnsupportedFormatError):
        Compressor.from_pretrained(saved, llm)


@pytest.mark.parametrize("text", ["[]", "7", "null", "{}", '{"format_version": 1}', '"config"', "\ud7ff", "{{}"])
def test_a_config_of_another_kind_is_refused(llm: TargetLLM, saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(UnsupportedFormatError):
        Compressor.from_pretrained(saved, llm)


@pytest.mark.parametrize(
    "change",
    [
        {"llm": {}},
        {"llm": "toy"},
        {"llm": {"source": 3, "identity": "x"}},
        {"fingerprint": None},
        {"fingerprint": 5},
        {"config": {"layers": -1}},
        {"config": {"surprise": 1}},
        {"config": []},
    ],
)
def test_a_config_with_a_wrong_field_is_refused(llm: TargetLLM, saved: Path, change: dict[str, Any]) -> None:
    edit_config(saved, **change)
    with pytest.raises(UnsupportedFormatError):
        Compressor.from_pretrained(saved, llm)


def test_a_newer_format_is_refused_by_its_number(llm: TargetLLM, saved: Path) -> None:
    edit_config(saved, format_version=2, config={"settings": "of the future"})
    with pytest.raises(UnsupportedFormatError, match=r"format 2, expected format 1.*update"):
        Compressor.from_pretrained(saved, llm)


@pytest.mark.parametrize(
    "change",
    [{"segment_length": 16}, {"scale": 1.5}, {"sink": True}, {"queries": "eos"}, {"layers": 2}, {"lora_alpha": 9}],
)
def test_an_edited_setting_is_refused(llm: TargetLLM, saved: Path, change: dict[str, Any]) -> None:
    edit_settings(saved, **change)
    with pytest.raises(FingerprintMismatchError, match="weights are not those"):
        Compressor.from_pretrained(saved, llm)


@pytest.mark.parametrize("change", [{"lora_rank": 8}, {"lora_modules": ["q_proj"]}, {"layers": 1}, {"lora_rank": 0}])
def test_lora_weights_that_do_not_fit_the_settings_are_refused(
    llm: TargetLLM, saved: Path, change: dict[str, Any]
) -> None:
    edit_settings(saved, **change)
    with pytest.raises(UnsupportedFormatError, match="LoRA weights"):
        Compressor.from_pretrained(saved, llm)


def edit_weights(folder: Path, **change: torch.Tensor | None) -> None:
    path = folder / "compressor.safetensors"
    state = {name.replace(".", "_"): (name, tensor) for name, tensor in load_file(path).items()}
    for key, tensor in change.items():
        name = state[key][0] if key in state else key
        state[key] = (name, torch.empty(0)) if tensor is None else (name, tensor)
        if tensor is None:
            del state[key]
    save_file(dict(state.values()), path)


@pytest.mark.parametrize(
    "change",
    [
        {"head_weight": torch.zeros(32, 31).half()},
        {"head_weight": torch.zeros(32, 32, 1).half()},
        {"head_bias": torch.zeros(0).half()},
        {"head_bias": None},
        {"information": None},
        {"information": torch.zeros(0).half()},
        {"information": torch.zeros(399).half()},
        {"information": torch.zeros(400, 1).half()},
        {"information": torch.zeros(400, dtype=torch.int64)},
        {"head_weight": torch.zeros(32, 32)},
        {"unknown": torch.zeros(1).half()},
    ],
    ids=lambda change: next(f"{k} {None if v is None else (v.dtype, tuple(v.shape))}" for k, v in change.items()),
)
def test_missing_surplus_and_misshapen_tensors_are_refused(
    llm: TargetLLM, saved: Path, change: dict[str, torch.Tensor | None]
) -> None:
    edit_weights(saved, **change)
    with pytest.raises(UnsupportedFormatError):
        Compressor.from_pretrained(saved, llm)


def test_a_flipped_bit_of_the_weights_is_refused(llm: TargetLLM, saved: Path) -> None:
    path = saved / "compressor.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(FingerprintMismatchError, match="weights are not those"):
        Compressor.from_pretrained(saved, llm)


@pytest.mark.parametrize("name", ["config.json", "compressor.safetensors"])
def test_a_mixture_of_old_and_new_files_is_refused(llm: TargetLLM, saved: Path, tmp_path: Path, name: str) -> None:
    newer = trained(llm, seed=3).save_pretrained(tmp_path / "newer")
    shutil.copy(newer / name, saved / name)
    with pytest.raises(FingerprintMismatchError, match="weights are not those"):
        Compressor.from_pretrained(saved, llm)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.sentinel,))


def test_planted_pickles_are_never_opened(llm: TargetLLM, saved: Path, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    trap = pickle.dumps(Trap(sentinel))
    for name in ("compressor.pt", "compressor.bin", "pytorch_model.bin", "adapter_model.bin", "compressor.pkl"):
        (saved / name).write_bytes(trap)
    assert torch.isfinite(concepts(Compressor.from_pretrained(saved, llm))).all()
    (saved / "compressor.safetensors").write_bytes(trap)
    with pytest.raises(UnsupportedFormatError):
        Compressor.from_pretrained(saved, llm)
    (saved / "compressor.safetensors").unlink()
    with pytest.raises(UnsupportedFormatError):
        Compressor.from_pretrained(saved, llm)
    assert not sentinel.exists()
    pickle.loads(trap)
    assert sentinel.exists()  # the trap does work


@pytest.mark.parametrize("spec", ["no/such/folder", "nowhere", "org/name"])
def test_neither_a_folder_nor_a_hub_id_with_revision_is_refused(llm: TargetLLM, spec: str) -> None:
    with pytest.raises(UnknownModelError, match=spec):
        Compressor.from_pretrained(spec, llm)


def test_the_table_is_kept_as_its_file_keeps_it(llm: TargetLLM, tmp_path: Path) -> None:
    # Two tokens that fp16 cannot tell apart must be equals before saving too, or other anchors would win afterwards.
    table = information(llm)
    table[50], table[51] = 12.0, 12.0001
    compressor = Compressor(llm, information=table)
    assert compressor.anchors([50, 51], 1) == [0]
    assert Compressor.from_pretrained(compressor.save_pretrained(tmp_path), llm).anchors([50, 51], 1) == [0]
