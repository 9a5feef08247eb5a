"""A bounded number of threads for blocking work, and a bounded number of jobs that wait for one.

The event loop never does such work itself. Who comes when all places are taken is refused at once, with a guess of when
to come again; who goes away gives the place back.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar

from compllm_rag.server.failures import Refusal

T = TypeVar("T")
_REMEMBERED = 32  # durations that the guess is made of
_END = object()


class Cancelled(Exception):
    """The client went away; whoever notices stops."""


class Ticket:
    """A place in the queue of a `Workers`; used once, by `run` or `stream`, or given back by `leave`.

    Attributes:
        cancel: Set when nobody waits for the result any more.
        ended: Called in the event loop when the job has ended, or was given up before it began.
        queue_s: How long it took until a thread was free.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers, self._begun = workers, time.perf_counter()
        self.cancel = threading.Event()
        self.ended: Callable[[], None] = lambda: None
        self.queue_s = 0.0
        self._open = True

    def leave(self) -> None:
        """Give the place back, from whatever thread; twice is harmless."""
        self._workers._leave(self)

    async def run(self, job: Callable[[], T]) -> T:
        """Run a job in a thread when it is its turn.

        Raises:
            Refusal: The server shuts down, and it had not begun.
            Cancelled: Nobody waits any more, and it had not begun.
        """
        future = self._submit(job)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if future.cancelled() and not (task and task.cancelling()):
                raise _shutting_down() from None  # it was `refuse_new` that did so
            self.cancel.set()
            future.cancel()
            raise

    def stream(self, job: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
        """The items of an iterator that runs in a thread when it is its turn; closing this stops it at its next item.

        The job is queued by this call, not by the first look at what it gives: nobody may ever look.

        Raises:
            Refusal: The server shuts down, and it had not begun.
        """
        loop, items = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def put(item: object) -> None:
            with suppress(RuntimeError):  # the loop has been closed: nobody reads
                loop.call_soon_threadsafe(items.put_nowait, item)

        def work() -> None:
            pieces: Any = job()
            try:
                for piece in pieces:
                    put(piece)
                    if self.cancel.is_set():
                        return
            finally:
                if hasattr(pieces, "close"):
                    pieces.close()

        future = self._submit(work)
        future.add_done_callback(lambda done: put(_END))
        return self._items(items, future)

    async def _items(self, items: asyncio.Queue[Any], future: Future[None]) -> AsyncGenerator[Any, None]:
        try:
            while (item := await items.get()) is not _END:
                yield item
            if future.cancelled():
                raise _shutting_down()
            if (error := future.exception()) is not None:
                raise error
        finally:
            self.cancel.set()
            future.cancel()

    def _submit(self, job: Callable[[], T]) -> Future[T]:
        try:
            future = self._workers._submit(self, job)
        except Refusal:
            self.ended()
            raise
        loop = asyncio.get_running_loop()

        def told(done: Future[T]) -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self.ended)

        future.add_done_callback(told)
        return future


class Workers:
    """Threads, and places to wait for one.

    Args:
        name: Of the threads.
        threads: How many.
        waiting: Jobs that may wait while all are busy.
        refusal: Code of the refusal of who finds no place.
    """

    def __init__(
        self, name: str, threads: int, waiting: int, *, status: int = 503, refusal: str = "overloaded"
    ) -> None:
        self.threads, self.limit = threads, waiting
        self._status, self._refusal, self._name = status, refusal, name
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"compllm-{name}")
        self._lock = threading.Lock()
        self._admitted = self._running = 0
        self._took: deque[float] = deque(maxlen=_REMEMBERED)
        self._closing = False
        self._futures: dict[Future[Any], Ticket] = {}

    @property
    def running(self) -> int:
        """Jobs that run now."""
        return self._running

    @property
    def waiting(self) -> int:
        """Jobs that wait now."""
        return max(0, self._admitted - self._running)

    @property
    def closing(self) -> bool:
        """Whether nothing new is taken."""
        return self._closing

    def admit(self) -> Ticket:
        """A place.

        Raises:
            Refusal: There is none, or the server shuts down.
        """
        with self._lock:
            if self._closing:
                raise _shutting_down()
            if self._admitted >= self.threads + self.limit:
                raise Refusal(
                    self._status,
                    self._refusal,
                    f"{self._admitted} {self._name} run or wait, which is the most. Next step: try again later",
                    retry_after_s=self._patience(),
                )
            self._admitted += 1
            return Ticket(self)

    def refuse_new(self) -> None:
        """Take nothing new, and refuse what waits; what runs goes on."""
        with self._lock:
            self._closing = True
            waiting = list(self._futures)
        for future in waiting:
            future.cancel()  # does nothing to those that run

    def close(self, timeout: float) -> bool:
        """Wait for what runs; after so many seconds it is told to stop. Tells whether it had ended by then."""
        self.refuse_new()
        with self._lock:
            running = dict(self._futures)
        left = wait(running, timeout).not_done
        for future in left:
            running[future].cancel.set()
        self._executor.shutdown(wait=False, cancel_futures=True)
        return not left

    def _patience(self) -> float:
        """Seconds until a place is free, about."""
        mean = sum(self._took) / len(self._took) if self._took else 1.0
        return min(120.0, max(1.0, mean * (self.limit + 1) / self.threads / 2))

    def _submit(self, ticket: Ticket, job: Callable[[], T]) -> Future[T]:
        def run() -> T:
            begun = time.perf_counter()
            ticket.queue_s = begun - ticket._begun
            with self._lock:
                self._running += 1
            try:
                if ticket.cancel.is_set():
                    raise Cancelled
                return job()
            finally:
                with self._lock:
                    self._running -= 1
                    self._took.append(time.perf_counter() - begun)
                ticket.leave()

        with self._lock:
            if self._closing:
                self._close_ticket(ticket)
                raise _shutting_down()
            future = self._executor.submit(run)
            self._futures[future] = ticket

        def done(future: Future[Any]) -> None:
            with self._lock:
                self._futures.pop(future, None)
            if future.cancelled():
                ticket.leave()

        future.add_done_callback(done)
        return future

    def _leave(self, ticket: Ticket) -> None:
        with self._lock:
            self._close_ticket(ticket)

    def _close_ticket(self, ticket: Ticket) -> None:
        if ticket._open:
            ticket._open = False
            self._admitted -= 1


def _shutting_down() -> Refusal:
    return Refusal(503, "shutting_down", "the server is shutting down. Next step: try again when it is back")
