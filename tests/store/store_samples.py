"""Keys and concepts for the tests of the store: made from numbers, the same on every run."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from tests.processes import DIES_WITH_ITS_PARENT

HIDDEN = 16
_ROOT = Path(__file__).resolve().parents[2]
_IMPORTS = "import sys; from compllm_rag.store import DiskStore; from tests.store.store_samples import *\n"


def python(script: str, *arguments: object) -> list[str]:
    """The command that runs a script, which has the store and this module at hand, in a process of its own."""
    path = f"{DIES_WITH_ITS_PARENT}\nimport sys; sys.path[:0] = [{str(_ROOT)!r}]\n"
    return [sys.executable, "-c", path + _IMPORTS + script, *map(str, arguments)]


def key(number: int) -> str:
    """The record key of a number."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def concepts(number: int, hidden: int = HIDDEN) -> torch.Tensor:
    """Concepts (1 to 5, hidden) fp32 that belong to a number; fp16 holds them exactly."""
    rows = 1 + number % 5
    generator = torch.Generator().manual_seed(number)
    return torch.randn(rows, hidden, generator=generator).half().float()


def records(numbers: Iterable[int], hidden: int = HIDDEN) -> list[tuple[str, torch.Tensor]]:
    """Pairs of key and concepts."""
    return [(key(number), concepts(number, hidden)) for number in numbers]


def same(found: torch.Tensor | None, number: int) -> bool:
    """Whether what a store gave is exactly what belongs to a number."""
    return found is not None and found.dtype == torch.float16 and torch.equal(found.float(), concepts(number))
