"""Blocking iterators as async ones."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


async def in_worker(workers: Executor | None, job: Callable[[], T]) -> T:
    """Run blocking work in a thread, within the context of the caller, so that the event loop stays free.

    Args:
        workers: Threads; None takes those of asyncio, which are few where there are few cores.
        job: What to do.
    """
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(workers, lambda: context.run(job))


async def in_thread(pieces: Iterable[str], workers: Executor | None = None) -> AsyncGenerator[str, None]:
    """Iterate in worker threads, one step at a time, so that the event loop stays free.

    No thread outlives a step, so a consumer that walks away leaves nothing running: closing this generator closes the
    blocking one.

    Args:
        pieces: What blocks.
        workers: See `in_worker`.
    """
    iterator = iter(pieces)
    done = object()
    try:
        while True:
            piece = await in_worker(workers, lambda: next(iterator, done))
            if piece is done:
                return
            yield str(piece)
    finally:
        _close(iterator)


def iter_once(text: str) -> Generator[str, None, None]:
    """A text that is there already, as a stream."""
    yield text


async def aiter_once(text: str) -> AsyncGenerator[str, None]:
    """The same as an asynchronous one."""
    yield text


def _close(iterator: Iterator[str]) -> None:
    close = getattr(iterator, "close", None)
    if close is not None:
        try:
            close()
        except ValueError:
            # A step is still running in its thread (the task was cancelled): it ends with that step.
            return
