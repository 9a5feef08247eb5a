"""Which prompt is read and which answers go on next: continuous batching in one thread.

Turn by turn, every answer that is being decoded gets one token, and then a part of one prompt is read. So a new prompt
joins a running batch as soon as it has been read, answers that run go on meanwhile, and one that has ended or that
nobody wants any more leaves its place to the next. Prompts are begun in the order in which they came. There is a thread
while there is something to do, and none at other times.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from compllm_rag.errors import ConfigurationError, DeviceMemoryError, OverloadedError
from compllm_rag.generation.batch_measures import BatchMeasures
from compllm_rag.generation.forward import Forward
from compllm_rag.generation.requests import Request
from compllm_rag.generation.rows import Steps, inner_of, steps_for

_PART = {"cpu": 256}  # slots of a prompt that are read between two tokens of the answers that run
_PART_ELSEWHERE = 2048
_KINDS = 4  # of prompts whose steps are kept: as text and with deep concepts, of as many halves as there are


class Scheduler:
    """Answers the prompts of one LLM, several at a time. Generators that share an LLM share one. Safe among threads.

    Args:
        rows: Most answers in work at a time: being decoded, or their prompts being read.
        waiting: Most prompts that may wait for one of these places.
        part: Most slots of a prompt that are read at once while other answers go on; None: 256 on a CPU, else 2048.
        measures: Counters to share with other schedulers; None makes some.

    Raises:
        ConfigurationError: A number is too small.
    """

    def __init__(
        self, rows: int = 8, waiting: int = 32, *, part: int | None = None, measures: BatchMeasures | None = None
    ) -> None:
        if rows < 1 or waiting < 0 or (part is not None and part < 1):
            raise ConfigurationError(
                "a scheduler has places and reads something",
                got=f"rows={rows}, waiting={waiting}, part={part}",
                expected="rows and part of at least 1, waiting of at least 0",
                next_step="leave them out to get the defaults",
            )
        self.rows, self.waiting, self.part = rows, waiting, part
        self.measures = measures or BatchMeasures()
        self._changed = threading.Condition()
        self._queue: deque[Request] = deque()
        self._active: list[Request] = []  # changed by the scheduler's thread alone, under the lock
        self._thread: threading.Thread | None = None
        self._closed, self._told = False, (0, 0, 0)
        self._steps: list[tuple[object, Steps]] = []  # by what KV caches belong to

    def submit(self, request: Request, *, wait: bool = False) -> None:
        """Queue a prompt; its pieces come by `request.pieces`.

        Args:
            request: The prompt.
            wait: Wait for a place in place of refusing.

        Raises:
            OverloadedError: There is no place, or this was closed.
        """
        with self._changed:
            while not self._closed and len(self._queue) + len(self._active) >= self.rows + self.waiting:
                if not wait:
                    self.measures.refused.inc()
                    raise OverloadedError(
                        "too many prompts wait for an answer",
                        got=f"{len(self._active)} in work, {len(self._queue)} waiting",
                        expected=f"at most {self.rows} and {self.waiting}",
                        next_step="try again later, or let more of them wait",
                    )
                self._changed.wait()
            if self._closed:
                raise _closed()
            request.times.asked = time.perf_counter()
            self._queue.append(request)
            self._tell()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="compllm-decoding")
                try:
                    thread.start()
                except RuntimeError:  # the system has no more threads, or Python is about to end
                    self._queue.remove(request)
                    self._tell()
                    raise
                self._thread = thread

    @functools.cached_property
    def workers(self) -> ThreadPoolExecutor:
        """As many threads as there are places, for those who ask asynchronously: each waits in one for its answer."""
        return ThreadPoolExecutor(self.rows, thread_name_prefix="compllm-asking")

    def close(self, timeout: float = 10.0) -> bool:
        """Take no more prompts, end all answers at their next token, wait for that; whether it took no longer."""
        with self._changed:
            self._closed = True
            for request in (*self._queue, *self._active):
                request.close(_closed())
            thread = self._thread
            self._changed.notify_all()
        if "workers" in vars(self):
            self.workers.shutdown(wait=False, cancel_futures=True)
        if thread is None:
            return True
        thread.join(timeout)
        return not thread.is_alive()

    # In the scheduler's thread

    def _run(self) -> None:
        try:
            while self._admit():
                self._decode()
                self._read()
        except BaseException as error:
            with self._changed:
                stranded, self._thread = [*self._active, *self._queue], None
                self._active, self._queue = [], deque()
                self._tell()
                self._changed.notify_all()
            for request in stranded:  # nobody is to wait for ever
                request.fail(error if isinstance(error, Exception) else _closed())
            raise

    def _admit(self) -> bool:
        """Give free places to those who wait; whether there is anything to do."""
        with self._changed:
            for request in [each for each in self._queue if each.cancelled]:
                self._queue.remove(request)
                request.end("cancelled")
            while self._queue and self._has_place(self._queue[0]):
                request = self._queue.popleft()
                if not request.times.begun:
                    self.measures.wait_s.observe(time.perf_counter() - request.times.asked)
                self._active.append(request)
            self._tell()
            self._changed.notify_all()
            if not self._active:
                self._thread = None
            return bool(self._active)

    def _has_place(self, request: Request) -> bool:
        if any(each.alone for each in self._active):
            return False
        return not self._active if request.alone else len(self._active) < self.rows

    def _decode(self) -> None:
        """One token for each answer that is being decoded."""
        for request in [each for each in self._active if each.cancelled]:
            self._leave(request)
            request.end("cancelled")
        groups: dict[int, tuple[Steps, list[Request]]] = {}
        for request in self._active:
            if request.steps is not None:
                groups.setdefault(id(request.steps), (request.steps, []))[1].append(request)
        for steps, requests in groups.values():
            size = len(requests) if steps.together else 1
            for first in range(0, len(requests), size):
                self._step(steps, requests[first : first + size])

    def _step(self, steps: Steps, requests: Sequence[Request]) -> None:
        """One token for each of some answers; where that fails, for each half of them, so that others do not suffer."""
        try:
            with requests[0].room():
                logits = steps.step([each.decoded for each in requests], [each.token for each in requests])
        except Exception as error:  # noqa: BLE001 - it is handed on
            if len(requests) == 1:
                self._leave(requests[0], error)
                return
            half = len(requests) // 2
            self._step(steps, requests[:half])
            self._step(steps, requests[half:])
            return
        self.measures.step_rows.observe(len(requests))
        for i, request in enumerate(requests):
            try:
                goes_on = request.add(logits[i : i + 1])
            except Exception as error:  # noqa: BLE001 - it is handed on
                self._leave(request, error)
                continue
            if not goes_on:
                self._leave(request)

    def _read(self) -> None:
        """A part of the prompt that came first of those that were not read yet."""
        request = next((each for each in self._active if each.steps is None), None)
        if request is None:
            return
        try:
            with request.room():
                if request.parts is None:
                    waited_for = any(each.steps is not None for each in self._active)
                    request.begin(
                        (self.part or _PART.get(request.device.type, _PART_ELSEWHERE)) if waited_for else None
                    )
                goes_on = request.read(self._steps_for)
        except Exception as error:  # noqa: BLE001 - it is handed on
            if isinstance(error, DeviceMemoryError) and len(self._active) > 1:
                self._put_back(request)
            else:
                self._leave(request, error)
            return
        if not goes_on:
            self._leave(request)

    def _put_back(self, request: Request) -> None:
        """There is no memory for a prompt beside others: it is the next, when these have left."""
        request.again()
        with self._changed:
            self._active.remove(request)
            self._queue.appendleft(request)

    def _leave(self, request: Request, error: Exception | None = None) -> None:
        with self._changed:
            self._active.remove(request)
        if error is not None:
            request.fail(error)

    def _steps_for(self, forward: Forward) -> Steps:
        owner = inner_of(forward).owner
        found = next((each for each in self._steps if each[0] is owner), None)
        if found is None:
            found = (owner, steps_for(forward))
        self._steps = [found, *(each for each in self._steps if each[0] is not owner)][:_KINDS]
        return found[1]

    def _tell(self) -> None:
        """Bring the gauges up to date; others may count there, too."""
        rows = sum(each.steps is not None for each in self._active)
        now = (rows, len(self._active) - rows, len(self._queue))
        for measure, before, after in zip(
            (self.measures.rows, self.measures.reading, self.measures.waiting), self._told, now, strict=True
        ):
            measure.inc(after - before)
        self._told = now


def _closed() -> OverloadedError:
    return OverloadedError(
        "no more prompts are answered here",
        got="a scheduler that was closed",
        next_step="make another generator, or ask again when the server is back",
    )
