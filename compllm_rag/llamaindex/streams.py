"""Blocking iterators as async ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator


async def in_thread(pieces: Iterable[str]) -> AsyncGenerator[str, None]:
    """Iterate in worker threads, one step at a time, so that the event loop stays free.

    No thread outlives a step, so a consumer that walks away leaves nothing running: closing this generator closes the
    blocking one.
    """
    iterator = iter(pieces)
    done = object()
    try:
        while True:
            piece = await asyncio.to_thread(next, iterator, done)
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
