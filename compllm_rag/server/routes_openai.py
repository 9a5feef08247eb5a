"""OpenAI's chat completions, answered from the index: `/v1/chat/completions`, `/v1/models`."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from pydantic import ValidationError
from sse_starlette import ServerSentEvent

from compllm_rag.config import Mode
from compllm_rag.server.answer_schemas import Answer, Token
from compllm_rag.server.answering import Asked, Conversation, Event, converse, decoding
from compllm_rag.server.failures import Refusal, refusal_of
from compllm_rag.server.openai_schemas import (
    MODELS,
    NEUTRAL,
    CachedTokens,
    Choice,
    ChunkChoice,
    Completion,
    CompletionChunk,
    CompletionRequest,
    Delta,
    InMessage,
    Model,
    ModelList,
    OutMessage,
    Sources,
    Usage,
)
from compllm_rag.server.service import asked_reading, index_of, service_of
from compllm_rag.server.sessions import memory_of
from compllm_rag.server.streaming import stream, whole
from compllm_rag.server.work import Cancelled

router = APIRouter(tags=["OpenAI"])
_TOP_K = 4
_STARTED = int(time.time())
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/CompletionRequest"}}},
    }
}


@router.post("/v1/chat/completions", response_model=Completion, openapi_extra=_BODY)
async def complete(request: Request) -> Completion | Response:
    """Answer the last message from the index; the messages before it are the conversation."""
    body = _heeded(await request.body())
    service, index = service_of(request), await index_of(request)
    generation = decoding(
        index,
        service.settings.max_tokens,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        temperature=body.temperature,
        top_p=None if body.top_p == 1.0 else body.top_p,
        seed=body.seed,
        stop=body.stop,
    )
    mode: Mode = "text" if MODELS[body.model] == "text" else "concepts"
    reading = await asked_reading(service, index, mode, body.reading)
    asked = Asked(body.messages[-1].text, mode, _TOP_K, generation, reading=reading)
    said = _conversation(body.messages[:-1])
    ticket = service.generations.admit()
    reply = _Reply(body.model, usage=body.stream_options is not None and body.stream_options.include_usage)

    def events() -> Iterator[Event]:
        return converse(index, asked, said, ticket)

    if body.stream:
        return stream(service, ticket, events, reply.lines)
    return reply.whole(await whole(service, request, ticket, events))


@router.get("/v1/models")
async def list_models() -> ModelList:
    """The ways in which the index can be asked."""
    return ModelList(data=[Model(id=name, created=_STARTED) for name in MODELS])


@router.get("/v1/models/{model}")
async def get_model(model: str) -> Model:
    """One of them."""
    _check_model(model)
    return Model(id=model, created=_STARTED)


class _Reply:
    """Answers in OpenAI's shapes.

    Args:
        model: As the client named it.
        usage: A stream ends with a chunk that tells what it took.
    """

    def __init__(self, model: str, *, usage: bool) -> None:
        self._facts: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model,
        }  # fmt: skip
        self._usage = usage

    def whole(self, answer: Answer) -> Completion:
        """The response where nothing is streamed."""
        choice = Choice(message=OutMessage(content=answer.answer), finish_reason=_reason(answer))
        return Completion(choices=[choice], usage=_usage(answer), compllm=_sources(answer), **self._facts)

    async def lines(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[ServerSentEvent, None]:
        """The lines of a stream."""
        try:
            yield self._chunk(Delta(role="assistant", content=""))
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Token):
                        yield self._chunk(Delta(content=event.text))
                    elif isinstance(event, Answer):
                        yield self._chunk(Delta(), _reason(event), compllm=_sources(event))
                        if self._usage:
                            yield self._line(CompletionChunk(choices=[], usage=_usage(event), **self._facts))
            yield ServerSentEvent("[DONE]", sep="\n")
        except Cancelled:
            return
        except Exception as error:  # noqa: BLE001 - the status has been sent; OpenAI's clients look for this
            yield ServerSentEvent(refusal_of(error).body.model_dump_json(), sep="\n")

    def _chunk(
        self, delta: Delta, reason: Literal["stop", "length"] | None = None, compllm: Sources | None = None
    ) -> ServerSentEvent:
        choice = ChunkChoice(delta=delta, finish_reason=reason)
        return self._line(CompletionChunk(choices=[choice], compllm=compllm, **self._facts))

    def _line(self, chunk: CompletionChunk) -> ServerSentEvent:
        fields = chunk.model_dump(exclude_none=True)
        for choice in fields["choices"]:
            choice.setdefault("finish_reason", None)
        return ServerSentEvent(json.dumps(fields, ensure_ascii=False), sep="\n")


def _heeded(body: bytes) -> CompletionRequest:
    """The request, with nothing in it that would not be heeded.

    Raises:
        Refusal: It is no such request, or asks for what is not done here.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "invalid_request", "the body is no JSON") from None
    if not isinstance(given, dict):
        raise Refusal(400, "invalid_request", "the body is no JSON object")
    known = CompletionRequest.model_fields
    for name in sorted(set(given) - set(known)):
        if given[name] is not None and not _asks_nothing(name, given[name]):
            expected = f", unless it is {NEUTRAL[name][0]!r}" if name in NEUTRAL else ""
            raise Refusal(
                400, "unsupported_parameter", f"{name[:100]} is not heeded here{expected}. Next step: leave it out",
                param=name[:100],
            )  # fmt: skip
    try:
        made = CompletionRequest.model_validate({name: value for name, value in given.items() if name in known})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Refusal(400, "invalid_request", f"{where}: {first['msg']}", param=where) from None
    _check_model(made.model)
    if made.max_tokens is not None and made.max_completion_tokens is not None:
        raise Refusal(400, "invalid_request", "max_tokens and max_completion_tokens are two names of one option")
    if made.stream_options is not None and not made.stream:
        raise Refusal(400, "invalid_request", "stream_options need stream", param="stream_options")
    return made


def _asks_nothing(name: str, value: object) -> bool:
    # By type as well: 1 == True.
    return any(type(value) is type(one) and value == one for one in NEUTRAL.get(name, ())) or (
        name in ("presence_penalty", "frequency_penalty") and type(value) is float and value == 0.0
    )


def _check_model(name: str) -> None:
    if name not in MODELS:
        raise Refusal(
            404, "model_not_found", f"there is no such model. Next step: name one of {', '.join(MODELS)}", param="model"
        )


def _conversation(messages: list[InMessage]) -> Conversation:
    system = [message.text for message in messages if message.role in ("system", "developer")]
    turns = [message for message in messages if message.role in ("user", "assistant")]
    said = [ChatMessage(role=MessageRole(message.role), content=message.text) for message in turns]
    return Conversation(memory_of(said), "\n\n".join(system) if system else None)


def _reason(answer: Answer) -> Literal["stop", "length"]:
    return "length" if answer.finish_reason == "length" else "stop"


def _usage(answer: Answer) -> Usage:
    return Usage(
        prompt_tokens=answer.positions,
        completion_tokens=answer.new_tokens,
        total_tokens=answer.positions + answer.new_tokens,
        prompt_tokens_details=CachedTokens(cached_tokens=answer.reused_positions),
    )


def _sources(answer: Answer) -> Sources:
    return Sources(**answer.model_dump(include=set(Sources.model_fields)))


def schemas() -> Mapping[str, Any]:
    """What the route reads by itself, for /openapi.json."""
    return CompletionRequest.model_json_schema(ref_template="#/components/schemas/{model}")
