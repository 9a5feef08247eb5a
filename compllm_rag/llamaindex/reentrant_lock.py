"""One writer at a time within a process.

A catalog has one transaction, so two threads that each add and commit would commit each other's halves. What belongs
together is told by context, not by thread: an async method of ours works in a thread of its own, for its caller.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_INSIDE: ContextVar[frozenset[int]] = ContextVar("compllm_rag_turns", default=frozenset())


class ReentrantLock:
    """Whoever comes second waits, and whoever is inside already goes on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def acquired(self) -> Iterator[bool]:
        """Wait for a turn.

        Yields:
            Whether this is the outermost one: the one that commits.
        """
        inside = _INSIDE.get()
        if id(self) in inside:
            yield False
            return
        with self._lock:
            token = _INSIDE.set(inside | {id(self)})
            try:
                yield True
            finally:
                _INSIDE.reset(token)
