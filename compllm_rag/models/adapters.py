"""LoRA adapters in PEFT's format: merged into the target (reader) or kept live (compressor)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from compllm_rag.errors import ConfigurationError, UnsupportedFormatError
from compllm_rag.fingerprint import file_digest

_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"  # (rank, in_features) and (out_features, rank)
_NOT_PLAIN = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_qalora", "lora_bias")


def merge_adapter(model: Any, folder: Path) -> dict[str, str]:
    """Merge a LoRA adapter into a model's own weights, in fp32.

    Args:
        model: The causal LM; where it is not in float32, each weight is added up in float32 and rounded once.
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        SHA-256 of the adapter's files by name, for the fingerprint.

    Raises:
        UnsupportedFormatError: Files are missing or damaged, or the adapter is not plain LoRA.
        ConfigurationError: The adapter fits another model.
    """
    from peft import LoraConfig, LoraModel, set_peft_model_state_dict

    config, state = read_adapter(folder)
    state = {key.removeprefix("base_model.model."): tensor.float() for key, tensor in state.items()}
    names = sorted(key.removesuffix(_A) for key in state if key.endswith(_A))
    modules, tied = dict(model.named_modules()), model.get_input_embeddings().weight
    for name in names:
        module = modules.get(name)
        shape = (state[name + _B].shape[0], state[name + _A].shape[1])
        if not isinstance(module, nn.Linear) or module.weight.shape != shape:
            raise ConfigurationError(
                "reader adapter fits another model",
                got=f"{name} of shape {list(shape)}",
                expected="a linear layer of the target with this name and shape",
                next_step="use the reader made for this LLM, or reader=None",
            )
        if module.weight is tied:
            raise UnsupportedFormatError(
                "adapter changes the input embeddings, which concepts are made of",
                got=f"{name}, tied to them",
                expected="an adapter that leaves them as they are",
                next_step="train the reader without this module",
            )
    if any(modules[name].weight.dtype != torch.float32 for name in names):
        # PEFT would add up in the weights' own dtype; all of them in float32 at once would take twice their memory.
        for name in names:
            weight = modules[name].weight
            delta = state[name + _B] @ state[name + _A] * (config["lora_alpha"] / config["r"])
            weight.data = (weight.data.float() + delta.to(weight.device)).to(weight.dtype)
    else:
        plain = LoraConfig(r=config["r"], lora_alpha=config["lora_alpha"], target_modules=names)
        # Nothing is drawn for tensors that are replaced at once: the chance of a training run stays what it is.
        tuner = LoraModel(model, plain, "default", low_cpu_mem_usage=True)
        set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
        tuner.merge_and_unload()
    return {name: file_digest(folder / name) for name in (_CONFIG, ADAPTER_FILE)}


def adapter_digests(folder: Path) -> dict[str, str]:
    """What a merged adapter adds to the digests of its target."""
    return {f"reader/{name}": file_digest(folder / name) for name in (_CONFIG, ADAPTER_FILE)}


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a plain LoRA adapter folder.

    Raises:
        UnsupportedFormatError: Files are missing or damaged, or the adapter is of another kind.
    """
    try:
        config = dict(json.loads((folder / _CONFIG).read_text(encoding="utf-8")))
        state = load_file(folder / ADAPTER_FILE)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UnsupportedFormatError(
            "adapter folder is not complete",
            got=f"{folder} ({type(error).__name__})",
            expected=f"{_CONFIG} and {ADAPTER_FILE}",
            next_step="check the path, or save the adapter again",
        ) from error
    trouble = _not_plain(config, state)
    if trouble:
        raise UnsupportedFormatError(
            "adapter is not plain LoRA",
            got=trouble,
            expected="LORA of one rank and one alpha, with lora_A and lora_B weights only",
            next_step="train the reader as plain LoRA",
        )
    return config, state


def _not_plain(config: dict[str, Any], state: dict[str, torch.Tensor]) -> str:
    """What an adapter has that a sum of weights would silently leave out or scale wrongly."""
    if config.get("peft_type") != "LORA":
        return f"peft_type {config.get('peft_type')}"
    for field in _NOT_PLAIN:
        if config.get(field):
            return field
    if not isinstance(config.get("r"), int) or config["r"] < 1 or not isinstance(config.get("lora_alpha"), int | float):
        return f"r {config.get('r')}, lora_alpha {config.get('lora_alpha')}"
    pairs = {name.removesuffix(_A) for name in state if name.endswith(_A)}
    odd = sorted({pair + side for pair in pairs for side in (_A, _B)} ^ set(state)) or [
        name for name, tensor in state.items() if tensor.ndim != 2 or tensor.shape[name.endswith(_B)] != config["r"]
    ]
    return "" if pairs and not odd else f"weights {', '.join(odd[:2]) or 'missing'}"


def inject_lora(decoder: Any, *, rank: int, alpha: int, modules: tuple[str, ...], name: str = "default") -> None:
    """Add live LoRA layers to a module tree in place (PEFT); their effect starts at zero.

    The LoRA tensors are float32 whatever the tree computes in: rounded to it, they would no longer be the ones that
    the fingerprint names.

    Raises:
        ConfigurationError: No module of the tree has one of these names.
    """
    from peft import LoraConfig, inject_adapter_in_model

    try:
        with warnings.catch_warnings():
            # A second adapter on one tree is what a reader trained along with a compressor is.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules)), decoder, name)
    except ValueError as error:
        raise ConfigurationError(
            "LoRA fits no module of this LLM",
            got=f"lora_modules {', '.join(modules) or 'empty'}",
            expected="names of linear layers, such as q_proj and v_proj",
            next_step="set `lora_modules`",
        ) from error
    for key, parameter in decoder.named_parameters():
        if ".lora_A." in key or ".lora_B." in key:
            parameter.data = parameter.data.float()


def lora_state(decoder: Any, name: str = "default") -> dict[str, torch.Tensor]:
    """The LoRA tensors of a module tree, under names that do not depend on the adapter's name; none without LoRA."""
    if name not in getattr(decoder, "peft_config", ()):
        return {}
    from peft import get_peft_model_state_dict

    state: dict[str, torch.Tensor] = get_peft_model_state_dict(decoder, adapter_name=name, save_embedding_layers=False)
    return state


def load_lora_state(decoder: Any, state: dict[str, torch.Tensor], name: str = "default") -> None:
    """Set the LoRA tensors of a module tree; every one must be there (PEFT itself would only warn).

    Raises:
        UnsupportedFormatError: Tensors are missing, superfluous or of another shape.
    """
    own = lora_state(decoder, name)
    wrong = sorted(set(own) ^ set(state)) or sorted(k for k in own if own[k].shape != state[k].shape)
    if wrong:
        raise UnsupportedFormatError(
            "LoRA weights do not fit the compressor",
            got=f"{len(state)} tensors, {len(wrong)} of them wrong, first {wrong[0]}",
            expected=f"{len(own)} tensors",
            next_step="use a compressor made for this LLM",
        )
    if own:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(decoder, state, name)


def has_lora(tree: Any) -> bool:
    """Whether a module tree has LoRA layers."""
    from peft.tuners.lora import LoraLayer

    return any(isinstance(module, LoraLayer) for module in tree.modules())


def merge_lora(tree: Any) -> None:
    """Put plain linear layers with weights of their own in the place of a tree's LoRA layers.

    The weights underneath, which other trees share, are left alone. They are added up in float32.
    """
    from peft.tuners.lora import LoraLayer

    found: list[tuple[str, Any]] = [item for item in tree.named_modules() if isinstance(item[1], LoraLayer)]
    for name, module in found:
        base = module.get_base_layer()
        weight = base.weight.detach().float()  # (out_features, in_features)
        for adapter in module.active_adapters:
            weight = weight + module.get_delta_weight(adapter).float()
        plain = torch.nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        plain.weight = torch.nn.Parameter(weight.to(base.weight), requires_grad=False)
        plain.bias = base.bias
        parent, _, leaf = name.rpartition(".")
        setattr(tree.get_submodule(parent), leaf, plain)
