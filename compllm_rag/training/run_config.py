"""What a training run is told, and what it trains."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field
from torch import nn

from compllm_rag.config import Frozen
from compllm_rag.training.objective import Loss

Progress = Callable[[str, float | None], None]


class RunConfig(Frozen):
    """How long, how fast and how carefully to train.

    Attributes:
        steps: Optimizer steps of the whole run.
        batch: Examples of one step, on each process.
        micro_tokens: Positions of one forward; a batch is cut into as many as it takes.
        lr: Peak learning rate of LoRA.
        head_lr: Factor of the learning rate of the compressor's head.
        warmup: Steps of warming up.
        decay: Share of the steps, at the end, in which the learning rate falls to nothing.
        clip: Largest norm of the gradient.
        seed: Of examples and rates.
        validate_every: Steps between two looks at the held-out part of the training data.
        patience: Looks without a better score before the run ends; 0 never.
        save_minutes: Minutes between two checkpoints.
        minutes: Stop (to be resumed) after this long; None runs to the end.
    """

    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=8, ge=1)
    micro_tokens: int = Field(default=1024, ge=1)
    lr: float = Field(default=4e-4, gt=0, allow_inf_nan=False)
    head_lr: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    warmup: int = Field(default=50, ge=0)
    decay: float = Field(default=0.25, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0)
    seed: int = 0
    validate_every: int = Field(default=50, ge=1)
    patience: int = Field(default=0, ge=0)
    save_minutes: float = Field(default=2.0, ge=0)
    minutes: float | None = Field(default=None, gt=0)

    def rate(self, step: int) -> float:
        """Learning rate of a step, as a share of the peak."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, (step + 1) / max(1, self.warmup)) * max(0.02, min(1.0, left))


class Task(Protocol):
    """What is trained."""

    name: str
    module: nn.Module

    def parameter_groups(self, config: RunConfig) -> list[dict[str, Any]]:
        """Parameters with `times`, the factor of their learning rate."""
        ...

    def draw(self, rng: random.Random) -> Any:
        """One example, with whatever chance decides about it."""
        ...

    def size(self, item: Any) -> int:
        """Positions that the item takes."""
        ...

    def weight(self, item: Any) -> float:
        """How much of a batch the item is."""
        ...

    def alike(self, item: Any) -> bool:
        """Items may share a forward if this is the same for both."""
        ...

    def loss(self, module: nn.Module, items: Sequence[Any]) -> Loss:
        """Loss of one forward."""
        ...

    def validate(self, progress: Progress) -> dict[str, float]:
        """Numbers on the held-out part; `score`, higher is better, decides which weights are best."""
        ...

    def export(self, folder: Path) -> None:
        """Write what a user loads."""
        ...
