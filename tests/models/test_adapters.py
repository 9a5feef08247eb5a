"""Reader adapters: merged as PEFT merges them, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import toy
from compllm_rag.errors import ConfigurationError, UnsupportedFormatError
from compllm_rag.fingerprint import file_digest
from compllm_rag.models.adapters import load_lora_state, lora_state, merge_adapter, read_adapter
from compllm_rag.models.llm import TargetLLM
from trained import trained

# PEFT warns of the very adapters that are refused here.
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

IDS = torch.tensor([[5, 50, 60, 70, 80, 90]])
MODULES = ["q_proj", "v_proj", "gate_proj"]


def adapted(architecture: str = "llama", **options: Any) -> PeftModel:
    """A toy model with a random adapter made by PEFT."""
    config: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": MODULES, "init_lora_weights": False} | options
    torch.manual_seed(0)
    model = get_peft_model(toy.model(architecture), LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter's folder as PEFT writes it."""
    adapted().save_pretrained(tmp_path / "reader")
    return tmp_path / "reader"


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_a_merged_adapter_reads_as_pefts_own_merge(architecture: str, tmp_path: Path) -> None:
    peft_model = adapted(architecture)
    peft_model.save_pretrained(tmp_path)
    model = toy.model(architecture)
    plain = logits(model)
    digests = merge_adapter(model, tmp_path)
    merged = logits(peft_model.merge_and_unload())
    torch.testing.assert_close(logits(model), merged, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(model), plain, atol=1e-2)
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert digests == {name: file_digest(tmp_path / name) for name in names}


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_merge_is_the_sum_of_weights_to_the_bit_and_leaves_no_trace(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    adapted(architecture, r=3, lora_alpha=7).save_pretrained(tmp_path)  # 7 / 3 is no power of two
    path = tmp_path / "adapter_model.safetensors"
    state = {name.removeprefix("base_model.model."): t.to(dtype) for name, t in load_file(path).items()}
    save_file({f"base_model.model.{name}": t for name, t in state.items()}, path)
    model, chance = toy.model(architecture), torch.random.get_rng_state()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in (name for name in state if ".lora_A." in name):
        a, b = state[name].float(), state[name.replace(".lora_A.", ".lora_B.")].float()
        expected[name.replace(".lora_A.", ".")] += b @ a * (7 / 3)
    merge_adapter(model, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), chance)
    assert list(model.state_dict()) == list(expected)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name
    assert not hasattr(model, "peft_config")


def test_a_reader_is_merged_before_the_dtype_is_changed(folder: Path, toy_folder: Path) -> None:
    model = toy.model()
    merge_adapter(model, folder)
    llm = TargetLLM.from_pretrained(toy_folder, reader=folder, dtype="bfloat16")
    for (name, expected), (_, got) in zip(model.named_parameters(), llm.model.named_parameters(), strict=True):
        assert torch.equal(got, expected.bfloat16()), name
    assert {"reader/adapter_config.json", "reader/adapter_model.safetensors"} <= set(llm.digests)


def test_an_adapter_of_another_width_is_refused(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    wide = {k: torch.zeros(v.shape[0], 48) if "q_proj.lora_A" in k else v for k, v in state.items()}
    save_file(wide, path)
    with pytest.raises(ConfigurationError, match=r"q_proj of shape \[32, 48\]"):
        merge_adapter(toy.model(), folder)


def test_an_adapter_of_a_deeper_model_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="layers.1"):
        merge_adapter(toy.model(layers=1), folder)


@pytest.mark.parametrize("name", ["model.layers.0", "model.layers.0.input_layernorm"])
def test_an_adapter_of_what_is_no_linear_layer_is_refused(folder: Path, name: str) -> None:
    path = folder / "adapter_model.safetensors"
    extra = {f"base_model.model.{name}.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    save_file(load_file(path) | extra, path)
    with pytest.raises(ConfigurationError, match=f"{name} of shape"):
        merge_adapter(toy.model(), folder)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 60}},
        {"rank_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"lora_bias": True, "init_lora_weights": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_adapters_that_a_sum_of_weights_would_get_wrong_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    adapted(**options).save_pretrained(tmp_path)
    model = toy.model()
    before = logits(model)
    with pytest.raises(UnsupportedFormatError, match="not plain LoRA"):
        merge_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


def test_an_adapter_of_the_tied_head_is_refused(tmp_path: Path) -> None:
    adapted(target_modules=["lm_head"]).save_pretrained(tmp_path)
    state = {k: v for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_" in k}
    save_file(state, tmp_path / "adapter_model.safetensors")
    model = toy.model()
    before = logits(model)
    with pytest.raises(UnsupportedFormatError, match="lm_head"):
        merge_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "change", [{"peft_type": "LOHA"}, {"peft_type": None}, {"r": 0}, {"r": "4"}, {"lora_alpha": None}]
)
def test_settings_that_are_not_lora_are_refused(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UnsupportedFormatError, match="not plain LoRA"):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "noise"])
def test_missing_and_damaged_files_are_refused(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "noise": bytes(range(256)) * 4}[damage])
    with pytest.raises(UnsupportedFormatError, match="adapter folder is not complete"):
        read_adapter(folder)


@pytest.mark.parametrize("keep", ["lora_A", "none"])
def test_weights_without_their_counterpart_are_refused(folder: Path, keep: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if keep in k}, path)
    with pytest.raises(UnsupportedFormatError, match="not plain LoRA"):
        merge_adapter(toy.model(), folder)


def test_weights_of_another_rank_than_the_settings_tell_are_refused(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))
    with pytest.raises(UnsupportedFormatError, match="not plain LoRA"):
        merge_adapter(toy.model(), folder)


def test_live_lora_tensors_come_back_as_they_were_saved(llm: TargetLLM) -> None:
    source, target = trained(llm, seed=1), trained(llm, seed=2)
    state = {name: tensor.clone() for name, tensor in lora_state(source.decoder).items()}
    assert all("default" not in name for name in state)
    load_lora_state(target.decoder, state)
    for name, tensor in lora_state(target.decoder).items():
        assert torch.equal(tensor, state[name])


def test_a_merge_into_half_precision_is_the_float32_sum_rounded_once(folder: Path) -> None:
    half, exact = toy.model().to(torch.bfloat16), toy.model().to(torch.bfloat16).float()
    assert merge_adapter(half, folder) == merge_adapter(exact, folder)
    before = toy.model().to(torch.bfloat16).state_dict()
    state, expected = half.state_dict(), exact.state_dict()
    assert list(state) == list(expected)
    assert any(not torch.equal(state[name], before[name]) for name in state)
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name
    assert not hasattr(half, "peft_config")


@pytest.mark.parametrize("damage", ["missing", "surplus", "shape"])
def test_live_lora_tensors_that_do_not_fit_are_refused(llm: TargetLLM, damage: str) -> None:
    compressor = trained(llm)
    state = {name: tensor.clone() for name, tensor in lora_state(compressor.decoder).items()}
    first = min(state)
    if damage == "missing":
        del state[first]
    else:
        state[first + "x" if damage == "surplus" else first] = torch.zeros(3, 3)
    with pytest.raises(UnsupportedFormatError, match=first):
        load_lora_state(compressor.decoder, state)
