"""The loop that trains merged LoRA: by the clock, from micro-batches that other processes lay out.

Shorter than `loop`, since a GPU that is lent for minutes is neither resumed nor shared: nothing is validated but by
looks, and what was learned is written by them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from compllm_rag.training.laid_out import Arrays
from compllm_rag.training.merged import Tensors, Tree

LOOKS = 4

Log = Callable[[str], None]
# The micro-batches of step number i.
Draw = Callable[[int], list[Arrays]]


class Steps(Dataset[list[Arrays]]):
    """The micro-batches of each step."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, step: int) -> list[Arrays]:
        return self.draw(step)


def drawn(draw: Draw, workers: int) -> Iterator[list[Arrays]]:
    """The micro-batches of all steps, in order, laid out by other processes where there are workers."""
    options: dict[str, Any] = {"prefetch_factor": 6, "multiprocessing_context": "fork"} if workers else {}
    torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
    return iter(DataLoader(Steps(draw), batch_size=None, num_workers=workers, collate_fn=_as_it_is, **options))


def _as_it_is(batch: list[Arrays]) -> list[Arrays]:
    return batch


def on(device: torch.device, arrays: Arrays) -> dict[str, torch.Tensor]:
    """Arrays as tensors of a device."""
    return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}


def parts(items: Sequence[Any], size: Callable[[Any], int], limit: int) -> list[list[Any]]:
    """Items by size, cut so that the padded size of each part stays under the limit."""
    out: list[list[Any]] = []
    for item in sorted(items, key=size):
        if out and size(item) * (len(out[-1]) + 1) <= limit:
            out[-1].append(item)
        else:
            out.append([item])
    return out


def fit(
    trees: Sequence[Tree],
    more: Sequence[torch.Tensor],
    batches: Iterator[list[Arrays]],
    loss: Callable[[Tensors], tuple[torch.Tensor, torch.Tensor]],
    look: Callable[[int], None],
    *,
    seconds: float,
    lr: float,
    warmup: int,
    most: int,
    log: Log,
) -> None:
    """Train until the clock or the number of steps ends it; looks do not count.

    Args:
        trees: Whose LoRA is trained.
        more: Further parameters, at twice the learning rate.
        batches: See `drawn`.
        loss: Of a micro-batch, whose sum over a step counts, and what of it is logged.
        look: Called at the start, `LOOKS` times in between, and at the end.
        seconds: How long.
        lr: Peak learning rate.
        warmup: Steps until it is reached; from then on it falls.
        most: Steps at most.
        log: Where to say so.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    lora, device = [p for tree in trees for p in tree.parameters], trees[0].weights.device
    groups = [{"params": lora, "times": 1.0}, *([{"params": list(more), "times": 2.0}] if more else [])]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    look(0)
    begun, step, due = time.monotonic(), 0, seconds / LOOKS
    while (done := (time.monotonic() - begun) / seconds) < 1 and step < most:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["times"] * min(1.0, (step + 1) / warmup) * max(0.02, 1 - done)
        micro = next(batches)
        optimizer.zero_grad(set_to_none=True)
        for tree in trees:
            tree.merge()
        shown = torch.zeros(2, device=device)
        for arrays in micro:
            total, said = loss(on(device, arrays))
            total.backward()  # type: ignore[no-untyped-call]
            shown = shown + said
        for tree in trees:
            tree.unmerge_gradients()
        torch.nn.utils.clip_grad_norm_([*lora, *more], 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0 or step == 1:
            values = shown.tolist()
            log(f"step {step}, {time.monotonic() - begun:.0f} s: " + ", ".join(f"{value:.4f}" for value in values))
            if not math.isfinite(sum(values)):
                raise FloatingPointError(f"loss is not finite at step {step}: lower the learning rate")
        if time.monotonic() - begun > due:
            stopped = time.monotonic()
            for tree in trees:
                tree.merge()
            look(step)
            begun, due = begun + time.monotonic() - stopped, due + seconds / LOOKS
    for tree in trees:
        tree.merge()
    look(step)
    log(f"{step} steps in {time.monotonic() - begun:.0f} s")
