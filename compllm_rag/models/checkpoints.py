"""From a folder to a model of transformers: in which dtype, on which device, and what a quantised one needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from compllm_rag.errors import ConfigurationError, UnsupportedDtypeError, UnsupportedModelError
from compllm_rag.models.quiet import quiet_transformers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What transformers asks for when it loads weights that are quantised so.
_PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed-tensors",
    "torchao": "torchao",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "mxfp4": "kernels",
    "aqlm": "aqlm",
    "eetq": "eetq",
}


def default_device() -> str:
    """`cuda` where there is one, else `mps` (Apple's GPUs), else `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_dtype(dtype: str) -> None:
    """Refuse a dtype by a name that is none of ours.

    Raises:
        UnsupportedDtypeError: With the names that are.
    """
    if dtype not in (*DTYPES, "auto"):
        raise UnsupportedDtypeError(
            "compute dtype is not supported",
            got=dtype,
            expected=f"{', '.join(DTYPES)} or auto (the checkpoint's own)",
            next_step="pass one of these, or leave it out",
        )


def check_device(device: str) -> None:
    """Refuse a device that torch cannot use here, before weights are fetched for it.

    Raises:
        ConfigurationError: In torch's words.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name; a torch that was made without it
        raise ConfigurationError(
            "device cannot be used here",
            got=f"{device} ({_first_line(error)})",
            expected=f"{default_device()}, or another device of torch that this machine has",
            next_step="name another one, or leave it out",
        ) from error


def quantisation_of(folder: Path) -> str | None:
    """The method by which the weights of a folder are quantised, None where they are not."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None
    return str(found.get("quant_method") or "bitsandbytes") if isinstance(found, dict) else None


def load_checkpoint(
    folder: Path, dtype: str, device: str, device_map: str | dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """Load a causal LM and its tokenizer.

    The weights are read in the checkpoint's own dtype unless they are wanted in float32: those of bfloat16 would take
    twice their size in memory if they were read in float32 first.

    Args:
        folder: With `config.json`, safetensors and a tokenizer.
        dtype: A name of `DTYPES`, or `auto`.
        device: Where quantised weights go; others stay on the CPU, for `placed`.
        device_map: As of transformers; all of it must come to lie on one device.

    Returns:
        Model and tokenizer.

    Raises:
        UnsupportedModelError: transformers cannot load it, a package that it needs is missing, or it lies on several
            devices.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    method = quantisation_of(folder)
    where = {"": device} if method and device_map is None else device_map
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32 if dtype == "float32" and not method else "auto",
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **({} if where is None else {"device_map": where}),
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except ImportError as error:
        raise _lacking(folder, method, error) from error
    except MemoryError:
        raise
    except Exception as error:  # tensors of other shapes, a tokenizer of a later release, a field of another type
        if method and "install" in str(error).lower():
            raise _lacking(folder, method, error) from error
        raise UnsupportedModelError(
            "transformers cannot load this model as a decoder LLM",
            got=f"{folder} ({type(error).__name__}: {_first_line(error)})",
            expected="a causal language model with safetensors weights and a fast tokenizer",
            next_step="name another model, or update transformers",
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        # transformers fills them with random numbers and a warning.
        raise UnsupportedModelError(
            "model's weights are not complete",
            got=f"{folder} without {', '.join(sorted(info['missing_keys'])[:2])}",
            expected="a tensor for each parameter",
            next_step="fetch or save the model again",
        )
    _on_one_device(model)
    return model, tokenizer


def placed(model: Any, dtype: str, device: str | None) -> Any:
    """A model on its device in its dtype; quantised weights stay as they are and where they are."""
    if getattr(model, "is_quantized", False):
        return model
    changes: dict[str, Any] = {} if dtype == "auto" else {"dtype": DTYPES[dtype]}
    if device is not None:
        changes["device"] = device
    return model.to(**changes) if changes else model


def _on_one_device(model: Any) -> None:
    devices = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if len(devices) > 1 or devices & {"disk", "meta"}:
        raise UnsupportedModelError(
            "this LLM lies on several devices",
            got=", ".join(sorted(devices)),
            expected="one device: its two halves run over the same tensors",
            next_step='take a device that holds it (device_map={"": "cuda:0"}), a smaller dtype, or quantised weights',
        )


def _lacking(folder: Path, method: str | None, error: Exception) -> UnsupportedModelError:
    package = _PACKAGES.get(method or "", "")
    return UnsupportedModelError(
        f"the weights are quantised by {method}, and a package for that is missing"
        if method
        else "a package that this model needs is missing",
        got=f"{folder} ({_first_line(error)})",
        expected=package or "the package that transformers names",
        next_step=f"pip install {package}" if package else "install it, or name another model",
    )


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
