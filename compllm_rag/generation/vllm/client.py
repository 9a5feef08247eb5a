"""Requests to a vLLM server: one event loop in a thread of its own, tries again, and ends what nobody waits for.

The loop lets an answer be ended while its first token is still awaited: closing the connection is how vLLM is told to
stop. It also bounds how many requests run at a time, and reads answers as they come, whether or not somebody takes
them yet.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from compllm_rag.errors import (
    ConfigurationError,
    GeneratorRefusedError,
    GeneratorUnavailableError,
    MissingExtraError,
)
from compllm_rag.generation.vllm.responses import Retry, checked, said, too_large
from compllm_rag.generation.vllm.settings import VLLMSettings
from compllm_rag.generation.vllm.wire import Piece, pieces_of
from compllm_rag.handles import ProcessBound

_POLL_S = 0.05  # how soon a cancellation is noticed
_MAYBE_ANOTHER = (404, 502, 503)  # the name is gone, or what a proxy says of a server that is


@dataclass(frozen=True)
class Arrived:
    """A piece of an answer, and what had been spent by then.

    Attributes:
        piece: Of the answer; None once the request is made and goes out.
        at: `time.perf_counter()`.
    """

    piece: Piece | None
    at: float


class VLLMClient(ProcessBound):
    """Speaks HTTP with one vLLM server.

    Args:
        url: Such as `http://127.0.0.1:8001`.
        settings: How it is asked.

    Attributes:
        losses: How often the server was lost: a connection failed or broke, or it was not there behind a proxy. It may
            be another one from then on.
        heard: When it said something, last; `time.monotonic()`.

    Raises:
        MissingExtraError: tenacity is not installed.
    """

    _opened_by = "make one there, with the same address"

    def __init__(self, url: str, settings: VLLMSettings) -> None:
        self.url, self.settings = url.rstrip("/").removesuffix("/v1"), settings  # clients of OpenAI's API end with it
        _tenacity()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self.losses, self.heard = 0, 0.0

    def get(self, path: str) -> Any:
        """JSON of a path.

        Raises:
            GeneratorUnavailableError, GeneratorRefusedError: See `stream`.
        """
        return self._now(lambda: self._json("GET", path, None))

    def post(self, path: str, fields: dict[str, Any]) -> Any:
        """JSON that answers JSON.

        Raises:
            GeneratorUnavailableError, GeneratorRefusedError, PromptTooLongError: See `stream`.
        """
        return self._now(lambda: self._json("POST", path, self._body(fields)))

    def allow(self, requests: int) -> None:
        """Let so many requests run at a time, if that is more than `concurrency` in the settings."""
        with self._lock:
            more = requests - self.settings.concurrency
            if more <= 0:
                return
            self.settings = self.settings.model_copy(update={"concurrency": requests})
            if self._loop is not None and self._pid == os.getpid():
                for _ in range(more):
                    self._loop.call_soon_threadsafe(self._slots.release)

    def stream(
        self,
        fields: Callable[[], dict[str, Any]],
        failed: threading.Event | None = None,
        *,
        before: Callable[[], None] = lambda: None,
    ) -> Running:
        """Begin a completion; its pieces are then taken from what is returned.

        Args:
            fields: Makes the request when it is its turn; called in a thread.
            failed: Set when it fails.
            before: Called in a thread in front of every try, since the server may be another one by then; what it
                raises is what comes of the completion.

        Raises:
            GeneratorUnavailableError: (While pieces are taken.) No connection, or too busy, after all tries; or lost
                after the first token, where another try would begin the answer anew.
            GeneratorRefusedError: The server refuses the request, or answers what makes no sense.
            PromptTooLongError: The request is longer than may be sent.
        """
        return Running(self, fields, failed, before)

    def close(self) -> None:
        """End what runs, and the thread."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None and self._pid == os.getpid():
            with suppress(RuntimeError, TimeoutError):  # it has ended by itself
                asyncio.run_coroutine_threadsafe(self._end(), loop).result(5.0)
            _stop(loop)

    def submit(self, work: Callable[[], Any]) -> Any:
        """Run a coroutine in the loop; a future of it."""
        with self._lock:
            if self._loop is None or self._pid != os.getpid():  # a forked process has no thread but its own
                self._http, loop = self._connections(), asyncio.new_event_loop()
                self._slots = asyncio.Semaphore(self.settings.concurrency)
                self._looking = asyncio.Lock()
                threading.Thread(target=_run, args=(loop,), name="vllm-client", daemon=True).start()
                weakref.finalize(self, _stop, loop)  # a client that is forgotten leaves no thread
                self._loop, self._pid = loop, os.getpid()  # only now: nobody waits for a loop that does not run
            return asyncio.run_coroutine_threadsafe(work(), self._loop)

    async def pump(
        self, fields: Callable[[], dict[str, Any]], put: Callable[[object], None], before: Callable[[], None]
    ) -> None:
        """One request, its pieces given to `put`, then None; an error is given to it, too."""

        async def look() -> None:
            async with self._looking:  # one at a time: the others would wait in threads that connecting needs
                await asyncio.to_thread(before)

        try:
            async with self._slots:
                await look()
                body, tries = await asyncio.to_thread(lambda: self._body(fields())), itertools.count()
                put(Arrived(None, time.perf_counter()))

                async def once() -> None:
                    if next(tries):
                        await look()
                    await self._answer(body, put)

                await self._retrying(once)
            put(None)
        except Exception as error:  # noqa: BLE001 - raised again, in the thread that takes the pieces
            put(error)

    async def _answer(self, body: bytes, put: Callable[[object], None]) -> None:
        begun = False
        try:
            async with self._http.stream("POST", "/v1/completions", content=body) as response:
                await self._accepted(response)
                async for piece in pieces_of(response.aiter_bytes()):
                    begun, self.heard = True, time.monotonic()
                    put(Arrived(piece, time.perf_counter()))
        except httpx.TransportError as error:
            self.losses += 1
            if begun:
                raise GeneratorUnavailableError(
                    "the vLLM server was lost in the middle of an answer",
                    got=said(error),
                    next_step="ask again; its log may say why",
                ) from error
            raise self._transport(error) from error

    async def _json(self, method: str, path: str, body: bytes | None) -> Any:
        async def once() -> Any:
            try:
                response = await self._http.request(method, path, content=body)
            except httpx.TransportError as error:
                self.losses += 1
                raise self._transport(error) from error
            await self._accepted(response)
            try:
                return response.json()
            except ValueError as error:
                raise GeneratorRefusedError(
                    "this is no vLLM server",
                    got=f"no JSON at {self.url}{path}",
                    next_step="check the address",
                ) from error

        return await self._retrying(once)

    async def _accepted(self, response: httpx.Response) -> None:
        self.losses += response.status_code in _MAYBE_ANOTHER
        await checked(response)
        self.heard = time.monotonic()

    async def _retrying(self, once: Callable[[], Any]) -> Any:
        tenacity = _tenacity()
        waits = tenacity.wait_random_exponential(multiplier=0.5, max=self.settings.longest_wait_s)

        def wait(state: Any) -> float:
            asked: float | None = getattr(state.outcome.exception(), "after_s", None)
            return min(float(waits(state)) if asked is None else asked, self.settings.longest_wait_s)

        try:
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type(Retry),
                stop=tenacity.stop_after_attempt(self.settings.retries + 1),
                wait=wait,
                reraise=True,
            ):
                with attempt:
                    return await once()
        except Retry as error:
            tries = self.settings.retries + 1
            raise GeneratorUnavailableError(
                "the vLLM server does not answer",
                got=f"{error} at {self.url}, {tries} times" if tries > 1 else f"{error} at {self.url}",
                expected="a running `vllm serve MODEL --enable-prompt-embeds`",
                next_step="start it, or check the address; where it is only busy, ask again later",
            ) from error

    def _transport(self, error: httpx.TransportError) -> Exception:
        """What did not connect is tried again; what takes too long is not: the server may still be at it."""
        if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
            return GeneratorUnavailableError(
                "the vLLM server takes too long",
                got=f"nothing for {self.settings.timeout_s:g} s from {self.url}",
                next_step="ask with a shorter prompt, or raise timeout_s",
            )
        if isinstance(error, httpx.UnsupportedProtocol | httpx.ProxyError):
            return GeneratorUnavailableError("the vLLM server cannot be reached", got=said(error))
        return Retry(said(error))

    def _body(self, fields: dict[str, Any]) -> bytes:
        body = json.dumps(fields).encode()
        if len(body) > self.settings.max_payload_bytes:
            raise too_large(len(body), self.settings)
        return body

    def _connections(self) -> httpx.AsyncClient:
        key = self.settings.api_key
        try:
            return httpx.AsyncClient(
                base_url=self.url,
                headers={
                    "Content-Type": "application/json",
                    **({} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"}),
                },
                timeout=httpx.Timeout(self.settings.timeout_s, connect=self.settings.connect_s),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=self.settings.concurrency),
            )
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:  # a proxy of the environment, mostly
            raise ConfigurationError(
                "no connection to a vLLM server can be made with these settings",
                got=str(error)[:200],
                expected="a proxy that httpx knows, certificates that can be read, or none of them",
                next_step="see ALL_PROXY, HTTP_PROXY, HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE in the environment",
            ) from error

    def _now(self, work: Callable[[], Any]) -> Any:
        return self.submit(work).result()

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()


class Running:
    """A completion on its way.

    Args:
        client: Of the server.
        fields: Makes the request.
        failed: Set when it fails, whether or not somebody takes its pieces.
        before: Called in front of every try.

    Attributes:
        error: What it failed with, whether or not somebody takes its pieces.
    """

    def __init__(
        self,
        client: VLLMClient,
        fields: Callable[[], dict[str, Any]],
        failed: threading.Event | None,
        before: Callable[[], None],
    ) -> None:
        self._arrived: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._failed = failed
        self.error: Exception | None = None
        self._future = client.submit(lambda: client.pump(fields, self._put, before))

    def pieces(self, cancel: threading.Event | None = None) -> Iterator[Arrived]:
        """What arrives, until the answer ends or `cancel` is set; leaving off early ends the request."""
        try:
            while True:
                try:
                    item = self._arrived.get(timeout=_POLL_S)
                except queue.Empty:
                    if cancel is not None and cancel.is_set():
                        return
                    if self._future.cancelled():
                        raise GeneratorUnavailableError(
                            "the generator was closed", next_step="make another one, with the same address"
                        ) from None
                    continue
                if isinstance(item, Arrived):
                    yield item
                elif isinstance(item, Exception):
                    raise item
                else:
                    return
        finally:
            self.end()

    def _put(self, item: object) -> None:
        if isinstance(item, Exception):
            self.error = item
        self._arrived.put(item)
        if self._failed is not None and isinstance(item, Exception):
            self._failed.set()

    def end(self) -> None:
        """Close the connection, which ends the answer at the server."""
        self._future.cancel()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped."""
    try:
        loop.run_forever()
    finally:
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    with suppress(RuntimeError):  # it is closed already
        loop.call_soon_threadsafe(loop.stop)


def _tenacity() -> Any:
    try:
        import tenacity
    except ImportError as error:
        raise MissingExtraError(
            "asking a vLLM server needs a package that is not installed",
            got="no tenacity",
            expected="the extra `vllm`",
            next_step="pip install 'compllm-rag[vllm]'",
        ) from error
    return tenacity
