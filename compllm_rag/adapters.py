"""LoRA adapters in PEFT's format: merged into the target (reader) or kept live (compressor)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compllm_rag.errors import ConfigurationError, UnsupportedFormatError
from compllm_rag.fingerprint import file_digest

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def merge_adapter(model: Any, folder: Path) -> dict[str, str]:
    """Merge a LoRA adapter into a model's own weights, in fp32.

    Args:
        model: The causal LM, in float32.
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        SHA-256 of the adapter's files by name, for the fingerprint.

    Raises:
        UnsupportedFormatError: Files are missing, or the adapter is not plain LoRA.
        ConfigurationError: The adapter fits another model.
    """
    config, state = read_adapter(folder)
    factor = float(config["lora_alpha"]) / int(config["r"])
    names = {key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")}
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in sorted(names):
            module = modules.get(name.removeprefix("base_model.model."))
            delta = state[f"{name}.lora_B.weight"].float() @ state[f"{name}.lora_A.weight"].float()
            if module is None or module.weight.shape != delta.shape:
                raise ConfigurationError(
                    "reader adapter fits another model",
                    got=f"{name} of shape {list(delta.shape)}",
                    expected="a linear layer of the target with this name and shape",
                    next_step="use the reader made for this LLM, or reader=None",
                )
            module.weight += (delta * factor).to(module.weight)
    return {name: file_digest(folder / name) for name in (_CONFIG, _WEIGHTS)}


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a plain LoRA adapter folder.

    Raises:
        UnsupportedFormatError: Files are missing, or the adapter is of another kind.
    """
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        state = load_file(folder / _WEIGHTS)
    except FileNotFoundError as error:
        raise UnsupportedFormatError(
            "adapter folder is not complete",
            got=folder,
            expected=f"{_CONFIG} and {_WEIGHTS}",
            next_step="check the path",
        ) from error
    plain = config.get("peft_type") == "LORA" and not config.get("use_dora") and not config.get("use_rslora")
    if not plain or any(".lora_A." not in key and ".lora_B." not in key for key in state):
        raise UnsupportedFormatError(
            "adapter is not plain LoRA",
            got=config.get("peft_type"),
            expected="LORA with lora_A and lora_B weights only",
            next_step="train the reader as plain LoRA",
        )
    return config, state


def inject_lora(decoder: Any, *, rank: int, alpha: int, modules: tuple[str, ...], name: str = "default") -> None:
    """Add live LoRA layers to a module tree in place (PEFT); their effect starts at zero."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules)), decoder, name)


def lora_state(decoder: Any, name: str = "default") -> dict[str, torch.Tensor]:
    """The LoRA tensors of a module tree, under names that do not depend on the adapter's name."""
    marker = f".{name}.weight"
    return {
        key.replace(marker, ".weight"): tensor.detach()
        for key, tensor in decoder.state_dict().items()
        if ".lora_A." in key or ".lora_B." in key
    }


def load_lora_state(decoder: Any, state: dict[str, torch.Tensor], name: str = "default") -> None:
    """Set the LoRA tensors of a module tree; every one must be there (PEFT itself would only warn).

    Raises:
        UnsupportedFormatError: Tensors are missing, superfluous or of another shape.
    """
    own = {
        key.replace(f".{name}.weight", ".weight"): parameter
        for key, parameter in decoder.named_parameters()
        if ".lora_A." in key or ".lora_B." in key
    }
    wrong = sorted(set(own) ^ set(state)) or sorted(k for k in own if own[k].shape != state[k].shape)
    if wrong:
        raise UnsupportedFormatError(
            "LoRA weights do not fit the compressor",
            got=f"{len(state)} tensors, {len(wrong)} of them wrong, first {wrong[0]}",
            expected=f"{len(own)} tensors",
            next_step="use a compressor made for this LLM",
        )
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(state[key])
