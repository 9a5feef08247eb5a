"""Several processes that train together, started by `torchrun`; each call is one that all of them make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Processes:
    """What the processes of a run share.

    Args:
        accelerator: Of accelerate.
        parameters: What is trained, in the same order everywhere.
    """

    def __init__(self, accelerator: Any, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.count, self._parameters = int(accelerator.num_processes), parameters

    def average_gradients(self) -> None:
        """One sum over all processes; LoRA is small, and which parts of it a batch reaches differs between them."""
        if self.count == 1:
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self._parameters])
        torch.distributed.all_reduce(flat)
        flat /= self.count
        taken = 0
        for parameter in self._parameters:
            parameter.grad = flat[taken : taken + parameter.numel()].view_as(parameter)
            taken += parameter.numel()

    def same_weights(self) -> None:
        """Every process takes the weights of the first."""
        if self.count > 1:
            for parameter in self._parameters:
                torch.distributed.broadcast(parameter.data, 0)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process: they must all leave the loop at the same step."""
        return self.mean(float(flag)) > 0

    def mean(self, value: float) -> float:
        """Mean over all processes."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], device=self._parameters[0].device)
        torch.distributed.all_reduce(shared)
        return float(shared) / self.count
