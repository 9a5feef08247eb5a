"""The examples of each step, drawn in this process or ahead by others.

A GPU takes a step in less time than one core needs to draw its examples. Example i of a step is drawn by a generator of
its own, so whoever draws it draws the same.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from compllm_rag.errors import ConfigurationError
from compllm_rag.training.run_config import RunConfig, Task

# Steps that each worker is ahead.
_AHEAD = 4


class _Steps(Dataset[list[Any]]):
    """The examples of each step as a dataset, by the step's place in the run that is left."""

    def __init__(self, task: Task, config: RunConfig, steps: range, rank: int, world: int) -> None:
        self.task, self.config, self.steps, self.rank, self.world = task, config, steps, rank, world

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, place: int) -> list[Any]:
        if not 0 <= place < len(self.steps):
            raise IndexError(place)  # ends a plain iteration
        batch = self.config.batch
        first = (self.steps[place] * self.world + self.rank) * batch
        return [self.task.draw(random.Random(f"{self.config.seed}/{first + i}")) for i in range(batch)]


def drawn_ahead(task: Task, config: RunConfig, steps: range, rank: int = 0, world: int = 1) -> Iterator[list[Any]]:
    """The examples of each of these steps, in order; workers start with the first that is asked for.

    Args:
        task: Draws them.
        config: With `workers` above 0 that many processes draw ahead. They are forked, so that none of them reads the
            training data anew.
        steps: Which steps.
        rank: Number of this process among those that train together.
        world: How many train together.

    Raises:
        ConfigurationError: Workers are asked for where processes cannot be forked.
    """
    dataset = _Steps(task, config, steps, rank, world)
    if not config.workers or not steps:
        return iter(dataset[place] for place in range(len(steps)))
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ConfigurationError(
            "examples cannot be drawn by other processes here",
            got=f"{config.workers} workers, and no fork on this system",
            expected="0 workers",
            next_step="leave --workers out",
        )
    return _by_workers(dataset, config.workers)


def _by_workers(dataset: _Steps, workers: int) -> Iterator[list[Any]]:
    yield from DataLoader(
        dataset,
        batch_size=None,  # each entry is a batch already
        num_workers=workers,
        prefetch_factor=_AHEAD,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals,
        multiprocessing_context="fork",
    )


def _leave_signals(number: int) -> None:
    """What ends a run is heard by the process that trains; a terminal or a scheduler tells its workers, too.

    They end when it does not want them any more, and when it is gone.
    """
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


def _as_it_is(items: list[Any]) -> list[Any]:
    return items
