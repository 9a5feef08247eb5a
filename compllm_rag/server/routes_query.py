"""Routes that answer: `/v1/query`, `/v1/chat`."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter, Request, Response

from compllm_rag.server.answer_schemas import Answer, ChatRequest, Decoding, QueryRequest
from compllm_rag.server.answering import Asked, Conversation, Event, answer, converse, decoding
from compllm_rag.server.schemas import Deleted
from compllm_rag.server.service import asked_reading, index_of, service_of
from compllm_rag.server.streaming import stream, whole

router = APIRouter(tags=["answers"])
_DECODING = set(Decoding.model_fields)


@router.post("/v1/query", response_model=Answer)
async def query(body: QueryRequest, request: Request) -> Answer | Response:
    """Ask a question; with `stream` the response is a stream of events (docs/guide/server.md)."""
    service, index = service_of(request), await index_of(request)
    generation = decoding(index, service.settings.max_tokens, **body.model_dump(include=_DECODING))
    reading = await asked_reading(service, index, body.mode, body.reading)
    asked = Asked(body.query, body.mode, body.top_k, generation, body.retrieval, reading)
    ticket = service.generations.admit()

    def events() -> Iterator[Event]:
        return answer(index, asked, ticket)

    if body.stream:
        return stream(service, ticket, events)
    return await whole(service, request, ticket, events)


@router.post("/v1/chat", response_model=Answer)
async def chat(body: ChatRequest, request: Request) -> Answer | Response:
    """Say something in a conversation; with `stream` the response is a stream of events."""
    service, index = service_of(request), await index_of(request)
    generation = decoding(index, service.settings.max_tokens, **body.model_dump(include=_DECODING))
    reading = await asked_reading(service, index, body.mode, body.reading)
    asked = Asked(body.message, body.mode, body.top_k, generation, reading=reading)
    namespace, sessions = index.config.namespace, service.sessions
    ticket = service.generations.admit()
    try:
        session = sessions.begin(namespace) if body.session_id is None else sessions.go_on(body.session_id, namespace)
    except BaseException:
        ticket.leave()
        raise
    ticket.ended = lambda: sessions.end_turn(session)
    said = Conversation(session.memory, session_id=session.id)

    def events() -> Iterator[Event]:
        return converse(index, asked, said, ticket)

    if body.stream:
        return stream(service, ticket, events)
    return await whole(service, request, ticket, events)


@router.delete("/v1/chat/{session_id}")
async def forget(session_id: str, request: Request) -> Deleted:
    """Forget a conversation."""
    index = await index_of(request)
    service_of(request).sessions.forget(session_id, index.config.namespace)
    return Deleted(id=session_id)
