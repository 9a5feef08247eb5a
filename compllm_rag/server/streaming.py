"""Events of an answer as a response, as they come or at the end; and noticing that a client went away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, suppress
from typing import TypeVar

from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent

from compllm_rag.server.answer_schemas import Answer, Plan, Retrieved, Token
from compllm_rag.server.answering import Event
from compllm_rag.server.failures import Refusal, refusal_of
from compllm_rag.server.service import Service
from compllm_rag.server.work import Cancelled, Ticket

T = TypeVar("T")
_NAMES: dict[type, str] = {Retrieved: "retrieved", Plan: "plan", Token: "token", Answer: "done"}
_GONE = 499
_SEND_S = 60.0  # that a client may take to read a piece


async def whole(service: Service, request: Request, ticket: Ticket, events: Callable[[], Iterator[Event]]) -> Answer:
    """The last event, for whoever wants no stream.

    Raises:
        Refusal: The client has gone away.
    """

    def run() -> Answer:
        for event in events():
            if isinstance(event, Answer):
                return event
        raise Cancelled

    try:
        made = await while_connected(request, ticket, ticket.run(run))
    except Cancelled:
        service.telemetry.cancelled()
        raise Refusal(_GONE, "cancelled", "the client went away") from None
    service.telemetry.generated(made)
    return made


def stream(
    service: Service,
    ticket: Ticket,
    events: Callable[[], Iterator[Event]],
    written: Callable[[AsyncGenerator[Event, None]], AsyncGenerator[ServerSentEvent, None]] | None = None,
) -> EventSourceResponse:
    """All events, as they come.

    Args:
        service: Counts.
        ticket: A place in the queue.
        events: Makes them, in a thread.
        written: Writes them; None as docs/guide/server.md has it for `/v1/query`.
    """
    made = ticket.stream(events)

    async def counted() -> AsyncGenerator[Event, None]:
        done = False
        try:
            async with aclosing(made):
                async for event in made:
                    if isinstance(event, Answer):
                        done = True
                        service.telemetry.generated(event)
                    yield event
        except Exception as error:
            done = not isinstance(error, Cancelled)
            raise
        finally:
            if not done:
                service.telemetry.cancelled()

    async def gone(message: object) -> None:
        ticket.cancel.set()  # also where nobody has begun to read

    return EventSourceResponse(
        (written or named_events)(counted()), sep="\n", client_close_handler_callable=gone, send_timeout=_SEND_S
    )


async def named_events(events: AsyncGenerator[Event, None]) -> AsyncGenerator[ServerSentEvent, None]:
    """`retrieved`, `plan`, `token`, `done`; or `error` in place of what would follow."""
    try:
        async with aclosing(events):
            async for event in events:
                yield ServerSentEvent(event.model_dump_json(), event=_NAMES[type(event)], sep="\n")
    except Cancelled:
        return
    except Exception as error:  # noqa: BLE001 - the status has been sent; this is how the client learns of it
        yield ServerSentEvent(refusal_of(error).body.model_dump_json(), event="error", sep="\n")


async def while_connected(request: Request, ticket: Ticket, work: Awaitable[T]) -> T:
    """Wait for work; when the client goes away before, it is told to stop, and waited for."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            ticket.cancel.set()
        return await task
    finally:
        gone.cancel()
        if not task.done():
            ticket.cancel.set()
            task.cancel()
        with suppress(asyncio.CancelledError):
            await gone


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
