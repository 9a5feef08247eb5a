"""Checkpoints of a training run: safetensors and JSON, replaced as a whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from compllm_rag.errors import UnsupportedFormatError

_STATE, _WEIGHTS, _OPTIMIZER = "state.json", "weights.safetensors", "optimizer.safetensors"


def save_checkpoint(
    folder: Path, weights: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write a checkpoint beside the former one, then put it in its place.

    Raises:
        OSError: It cannot be written (a full disk, say); the former checkpoint is untouched.
    """
    fresh, former = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        save_file(
            {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}, fresh / _WEIGHTS
        )
        save_file(_moments(optimizer), fresh / _OPTIMIZER)
        (fresh / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in fresh.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        # safetensors reports a full disk as an error of its own.
        raise error if isinstance(error, OSError) else OSError(f"checkpoint cannot be written: {error}") from error
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)
    fresh.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]] | None:
    """Weights, optimizer moments and state of the last checkpoint; None where there is none.

    Raises:
        UnsupportedFormatError: There is one and it cannot be read.
    """
    former = folder.with_name(folder.name + ".old")
    if not folder.exists() and former.exists():
        former.rename(folder)  # killed between the two renames
    if not folder.exists():
        return None
    try:
        state = dict(json.loads((folder / _STATE).read_text(encoding="utf-8")))
        return load_file(folder / _WEIGHTS), load_file(folder / _OPTIMIZER), state
    except (OSError, ValueError, SafetensorError) as error:
        raise UnsupportedFormatError(
            "checkpoint cannot be read",
            got=f"{folder} ({type(error).__name__})",
            expected=f"{_STATE}, {_WEIGHTS} and {_OPTIMIZER}",
            next_step="remove the folder to start anew, or start from the exported weights with --init",
        ) from error


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter number and name."""
    out: dict[str, torch.Tensor] = {}
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            out[f"{number}.{name}"] = torch.as_tensor(value).detach().float().cpu().contiguous()
    return out


def restore_moments(optimizer: torch.optim.Optimizer, moments: dict[str, torch.Tensor]) -> None:
    """Set AdamW's state; learning rates stay those of the optimizer."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in moments.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
