"""What LlamaIndex's instrumentation and callbacks hear: a span for each call of the LLM, for fetching and compressing.

An answer is made by a generator that may be read slowly, in other threads, or be given up half way. So its span is
entered and left by hand, in a context of its own: it begins with the first piece that is wanted and ends with the
stream, and nothing of it leaks to whoever reads the pieces.
"""

from __future__ import annotations

import inspect
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.base.llms.types import CompletionResponse
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.llm import (
    LLMCompletionEndEvent,
    LLMCompletionInProgressEvent,
    LLMCompletionStartEvent,
)
from llama_index.core.llms.llm import LLM
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from llama_index_instrumentation.dispatcher import Dispatcher
from llama_index_instrumentation.event_handlers.null import NullEventHandler
from llama_index_instrumentation.events.span import SpanDropEvent
from llama_index_instrumentation.span import active_span_id
from llama_index_instrumentation.span_handlers import NullSpanHandler

from compllm_rag.config import GenerationConfig
from compllm_rag.generation.base import Generation
from compllm_rag.library import ConceptLibrary, EnsureReport

if TYPE_CHECKING:
    from llama_index.core.schema import NodeWithScore, QueryBundle

    from compllm_rag.llamaindex.planner import PlannedPrompt, Planner

dispatcher = get_dispatcher(__name__)

Occasion = Literal["query", "ingest"]


class _ConceptEvent(BaseEvent):
    """Base of the events below.

    `span_id` is empty and the span stands in `within_span` instead: tracers that sort events by span, such as
    OpenInference's, log a warning for every class that they do not know.
    """

    span_id: str | None = ""
    within_span: str | None = None


class ConceptsFetchedEvent(_ConceptEvent):
    """The passages of a prompt were read from the store.

    Attributes:
        passages: How many are in the prompt.
        hits: Units found in the store.
        misses: Units not found.
        prompt_positions: Positions of the whole prompt.
        seconds: Time spent on the store.
    """

    passages: int
    hits: int
    misses: int
    prompt_positions: int
    seconds: float

    @classmethod
    def class_name(cls) -> str:
        """Name of the event."""
        return "ConceptsFetchedEvent"


class ConceptsCompressedEvent(_ConceptEvent):
    """Text was compressed into concepts.

    Attributes:
        units: Segments, or chunks of deep concepts, that were compressed.
        seconds: Time it took; of an ingest, with the time to look up and to write.
        occasion: For a query that missed them, or for an ingest.
    """

    units: int
    seconds: float
    occasion: Occasion

    @classmethod
    def class_name(cls) -> str:
        """Name of the event."""
        return "ConceptsCompressedEvent"


def usage_of(made: Generation) -> dict[str, Any]:
    """What an answer took, by the names that TokenCountingHandler and tracers look for; a position is a token."""
    prompt, new = made.prompt_positions, len(made.token_ids)
    return {
        "prompt_tokens": prompt,
        "prompt_tokens_details": {"cached_tokens": made.reused_positions},
        "completion_tokens": new,
        "total_tokens": prompt + new,
    }


def raw_of(made: Generation, model: str, account: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`raw` of a LlamaIndex response.

    Args:
        made: The answer.
        model: Name of the LLM.
        account: That of the response, where concepts were read.
    """
    raw: dict[str, Any] = {"model": model, "finish_reason": made.finish_reason, "usage": usage_of(made)}
    return raw if account is None else raw | {"compllm": dict(account)}


class LLMCall:
    """One call of the LLM as a span, as events and as a callback; made where its parent span is active.

    Args:
        llm: Whose call it is.
        manager: LlamaIndex's callbacks.
        generation: Settings of the call.
    """

    def __init__(self, llm: LLM, manager: CallbackManager, generation: GenerationConfig) -> None:
        self._llm, self._manager, self._generation = llm, manager, generation
        self._id, self._event_id = f"{llm.class_name()}.answer-{uuid.uuid4()}", str(uuid.uuid4())
        self._context, self._prompt, self._arguments = copy_context(), "", _arguments()
        self._otel: Any = None

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens; to spell a prompt out takes as long as to lay it out."""
        return bool(self._manager.handlers) or is_heard(dispatcher)

    def start(self, prompt: str) -> None:
        """The LLM is about to read a prompt, spelt out."""
        self._prompt = prompt
        self._arguments = _arguments(prompt=prompt, **self._generation.model_dump())
        self._context.run(self._start)

    def _start(self) -> None:
        payload = {**self._llm.to_payload(), **self._generation.model_dump()}
        parent, before = active_span_id.get(), _otel_span()
        active_span_id.set(self._id)
        dispatcher.span_enter(id_=self._id, bound_args=self._arguments, instance=self._llm, parent_id=parent)
        current = _otel_span()
        self._otel = current if current is not before else None
        dispatcher.event(
            LLMCompletionStartEvent(prompt=self._prompt, additional_kwargs={}, model_dict=payload, span_id=self._id)
        )
        self._manager.on_event_start(
            CBEventType.LLM,
            payload={EventPayload.PROMPT: self._prompt, EventPayload.SERIALIZED: payload},
            event_id=self._event_id,
        )

    def pieces(self, pieces: Iterator[str]) -> Iterator[str]:
        """Hand pieces on, announcing each; they are made within the span."""
        text, done = "", object()
        while (piece := self._context.run(next, pieces, done)) is not done:
            text += str(piece)
            partial = CompletionResponse(text=text, delta=str(piece))
            self._context.run(
                dispatcher.event,
                LLMCompletionInProgressEvent(prompt=self._prompt, response=partial, span_id=self._id),
            )
            yield str(piece)

    def end(self, made: Generation, account: Mapping[str, Any], error: BaseException | None = None) -> None:
        """The answer has ended, by itself or because its reader went away; or an error ended it."""
        if isinstance(error, GeneratorExit):
            error = None  # a stream that is closed early has an answer, as far as it goes
        self._context.run(self._end, made, account, error)

    def _end(self, made: Generation, account: Mapping[str, Any], error: BaseException | None) -> None:
        if self._otel is not None:
            self._otel.set_attributes(attributes_of(account))
        if error is not None:
            dispatcher.event(SpanDropEvent(span_id=self._id, err_str=str(error)))
            dispatcher.span_drop(id_=self._id, bound_args=self._arguments, instance=self._llm, err=error)
            self._manager.on_event_end(CBEventType.LLM, {EventPayload.EXCEPTION: error}, self._event_id)
            return
        raw = raw_of(made, self._llm.metadata.model_name, account)
        response = CompletionResponse(text=made.text, raw=raw)
        dispatcher.event(LLMCompletionEndEvent(prompt=self._prompt, response=response, span_id=self._id))
        dispatcher.span_exit(id_=self._id, bound_args=self._arguments, instance=self._llm, result=response)
        self._manager.on_event_end(
            CBEventType.LLM,
            {EventPayload.PROMPT: self._prompt, EventPayload.COMPLETION: response},
            self._event_id,
        )


@contextmanager
def span(name: str, **inputs: object) -> Iterator[dict[str, Any]]:
    """A span around a step; whatever is put into the dictionary is its result.

    Args:
        name: Of the step, `Class.method`.
        **inputs: Plain values that tracers show.
    """
    id_, arguments, result = f"{name}-{uuid.uuid4()}", _arguments(**inputs), dict[str, Any]()
    token = active_span_id.set(id_)
    parent = None if token.old_value is token.MISSING else token.old_value
    dispatcher.span_enter(id_=id_, bound_args=arguments, parent_id=parent)
    try:
        yield result
    except BaseException as error:
        dispatcher.event(SpanDropEvent(span_id=id_, err_str=str(error)))
        dispatcher.span_drop(id_=id_, bound_args=arguments, err=error)
        raise
    else:
        dispatcher.span_exit(id_=id_, bound_args=arguments, result=result)
    finally:
        active_span_id.reset(token)


def traced_plan(
    planner: Planner, query: QueryBundle, nodes: Sequence[NodeWithScore], budget: int, **options: Any
) -> PlannedPrompt:
    """`Planner.plan` within a span, telling what came from the store and what had to be compressed."""
    with span("ConceptLibrary.fetch", query=query.query_str, node_ids=[n.node.node_id for n in nodes]) as result:
        planned = planner.plan(query, nodes, budget, **options)
        hits, misses = sum(f.hits for f in planned.facts), sum(f.misses for f in planned.facts)
        within, positions = active_span_id.get(), planned.plan.positions
        result |= {
            "hits": hits,
            "misses": misses,
            "prompt_positions": positions,
            "fetch_s": planned.fetch_s,
            "compress_s": planned.compress_s,
            "dropped": len(planned.dropped),
        }
        dispatcher.event(
            ConceptsFetchedEvent(
                passages=len(planned.facts),
                hits=hits,
                misses=misses,
                prompt_positions=positions,
                seconds=planned.fetch_s,
                within_span=within,
            )
        )
        if planned.compress_s:
            dispatcher.event(
                ConceptsCompressedEvent(units=misses, seconds=planned.compress_s, occasion="query", within_span=within)
            )
    return planned


def traced_ensure(library: ConceptLibrary, texts: Iterable[str]) -> EnsureReport:
    """`ConceptLibrary.ensure` within a span, telling what had to be compressed."""
    with span("ConceptLibrary.ensure") as result:
        report = library.ensure(texts)
        result |= {
            "units": report.segments,
            "compressed": report.compressed,
            "reused": report.reused,
            "source_tokens": report.source_tokens,
            "concepts": report.concepts,
            "seconds": report.seconds,
        }
        if report.compressed:
            dispatcher.event(
                ConceptsCompressedEvent(
                    units=report.compressed,
                    seconds=report.seconds,
                    occasion="ingest",
                    within_span=active_span_id.get(),
                )
            )
    return report


def attributes_of(account: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """The plain values of an account as attributes `compllm.*` of an OpenTelemetry span; its answer is there anyway."""
    out: dict[str, str | int | float | bool] = {
        f"compllm.{name}": value
        for name, value in account.items()
        if isinstance(value, str | int | float | bool) and name != "answer"
    }
    out |= {f"compllm.store.{name}": value for name, value in account.get("store", {}).items()}
    return out | {"compllm.dropped": len(account.get("dropped", ()))}


def is_heard(dispatcher: Dispatcher) -> bool:
    """Whether an event or a span of a dispatcher reaches anybody."""
    at = dispatcher
    while all(isinstance(handler, NullEventHandler) for handler in at.event_handlers) and all(
        isinstance(handler, NullSpanHandler) for handler in at.span_handlers
    ):
        if not at.propagate:
            return False
        at = at.parent
    return True


def _arguments(**inputs: object) -> inspect.BoundArguments:
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs]
    return inspect.Signature(parameters).bind(**inputs)


def _otel_span() -> Any:
    """OpenTelemetry's current span; None where the process does not use OpenTelemetry."""
    trace = sys.modules.get("opentelemetry.trace")
    return None if trace is None else trace.get_current_span()
