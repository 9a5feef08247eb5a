"""What a training run is told, and what it trains."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

from compllm_rag.config import Frozen

if TYPE_CHECKING:
    from torch import nn

    from compllm_rag.training.objective import Loss

Progress = Callable[[str, float | None], None]


class RunConfig(Frozen):
    """How long, how fast and how carefully to train."""

    steps: int = Field(default=2000, ge=1, description="optimizer steps of the whole run")
    batch: int = Field(default=8, ge=1, description="examples of a step, on each process")
    micro_tokens: int = Field(
        default=2048, ge=64, description="positions of one forward: lower it if memory does not suffice"
    )
    lr: float = Field(default=4e-4, gt=0, allow_inf_nan=False, description="peak learning rate of LoRA")
    head_lr: float = Field(
        default=2.0, gt=0, allow_inf_nan=False, description="learning rate of the compressor's head, as a factor"
    )
    warmup: int = Field(default=50, ge=0, description="steps of warming up")
    decay: float = Field(
        default=0.25, ge=0, le=1, description="share of the steps, at the end, in which the learning rate falls"
    )
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    seed: int = Field(default=0, description="of examples and rates")
    validate_every: int = Field(default=50, ge=1, description="steps between two looks at held-out training data")
    patience: int = Field(default=0, ge=0, description="looks without a better score before it stops; 0: never")
    save_minutes: float = Field(default=2.0, ge=0, description="minutes between two checkpoints")
    minutes: float | None = Field(default=None, gt=0, description="stop after this long; the same command goes on")
    total_minutes: float | None = Field(
        default=None,
        gt=0,
        description="end the run after this long in all its calls, validation not counted, or after --steps if that is "
        "sooner; the learning rate follows the clock, so that a machine lent for minutes brings it down to the end",
    )
    workers: int = Field(
        default=0,
        ge=0,
        description="processes that draw examples ahead, for a GPU that would wait for them; the examples are the same",
    )

    def done(self, step: int, seconds: float = 0.0) -> float:
        """Steps of the run that lie behind it in front of a step, after that many seconds; `steps` when it is over."""
        if self.total_minutes is None:
            return step
        return max(step, self.steps * seconds / (60 * self.total_minutes))

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """Learning rate of a step, as a share of the peak; the seconds count with `total_minutes` alone."""
        left = (self.steps - self.done(step, seconds)) / max(1.0, self.decay * self.steps)
        return min(1.0, (step + 1) / max(1, self.warmup)) * max(0.02, min(1.0, left))


# A reader learns sooner than a compressor.
READER_RUN = RunConfig(steps=400, warmup=20, decay=0.5)
# Deep concepts start near text, so that few steps are enough.
DEEP_RUN = RunConfig(steps=600, batch=4, lr=5e-4, warmup=10, decay=1.0)


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

    def alike(self, item: Any) -> bool | str:
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
