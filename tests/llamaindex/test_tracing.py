"""What tracers, callbacks and counters are told: spans that end with the stream, positions, and the account."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core import Settings
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.callbacks.schema import EventPayload
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import ChatMessage
from llama_index.core.schema import Document, MetadataMode
from openinference.instrumentation.llama_index import LlamaIndexInstrumentor
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import toy
from compllm_rag import Compressor, ConceptIndex, ConceptLLM, GenerationConfig
from compllm_rag.compression.loading import untrained_deep
from compllm_rag.generation.base import Generation
from toy_embedder import HashEmbedder

QUESTION = "Who built the lighthouse?"
SHORT = GenerationConfig(max_new_tokens=8)
MESSAGES = [ChatMessage(role="user", content=QUESTION)]


@pytest.fixture(params=["input", "deep"])
def index(request: pytest.FixtureRequest, compressor: Compressor) -> Iterator[ConceptIndex]:
    made = compressor if request.param == "input" else untrained_deep(compressor.llm)
    documents = [Document(id_="rock", text=toy.TEXT, metadata={"title": "Rock"})]
    with ConceptIndex.from_documents(
        documents, compressor=made, embedder=HashEmbedder(), generation=SHORT, chunk_size=60
    ) as index:
        yield index


async def ways(index: ConceptIndex, **options: Any) -> dict[str, Any]:
    """One response for each way to ask, streams read to their end."""
    plain, stream = index.as_query_engine(**options), index.as_query_engine(streaming=True, **options)
    found = {"sync": plain.query(QUESTION), "async": await plain.aquery(QUESTION)}
    found["stream"] = stream.query(QUESTION)
    for _ in found["stream"].response_gen:
        pass
    found["astream"] = await stream.aquery(QUESTION)
    async for _ in found["astream"].async_response_gen():
        pass
    return found


class Spans(SimpleSpanHandler):
    def named(self, part: str) -> list[Any]:
        return [span for span in self.completed_spans if part in span.id_]


class Heard(BaseEventHandler):
    events: list[Any] = []

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.events.append(event)

    def of(self, name: str) -> list[Any]:
        return [event for event in self.events if event.class_name() == name]


@pytest.fixture
def spans() -> Iterator[Spans]:
    root, made = get_dispatcher(), Spans()
    root.add_span_handler(made)
    yield made
    root.span_handlers.remove(made)
    assert not made.open_spans


@pytest.fixture
def heard() -> Iterator[Heard]:
    root, made = get_dispatcher(), Heard(events=[])
    root.add_event_handler(made)
    yield made
    root.event_handlers.remove(made)


async def test_every_way_has_a_span_below_its_synthesis(index: ConceptIndex, spans: Spans) -> None:
    await ways(index)
    answers = spans.named("ConceptLLM.answer")
    assert len(answers) == 4
    assert all("ConceptSynthesizer" in span.parent_id and "synthesize" in span.parent_id for span in answers)
    assert len(spans.named("ConceptLibrary.fetch")) == 4


def test_a_span_ends_with_its_stream(index: ConceptIndex, spans: Spans) -> None:
    engine = index.as_query_engine(streaming=True)
    response = engine.query(QUESTION)
    assert not spans.named("answer")
    pieces = response.response_gen
    next(pieces)
    assert any("answer" in name for name in spans.open_spans)
    pieces.close()
    [closed] = spans.named("answer")
    assert response.metadata["compllm"]["finish_reason"] == "cancelled"
    engine.query(QUESTION)  # a stream that nobody reads has no call of the LLM
    assert spans.named("answer") == [closed]


async def test_an_async_stream_that_is_closed_ends_its_span(index: ConceptIndex, spans: Spans) -> None:
    response = await index.as_query_engine(streaming=True).aquery(QUESTION)
    pieces = response.response_gen
    await anext(pieces)
    await pieces.aclose()
    assert len(spans.named("answer")) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_an_error_drops_its_span(
    index: ConceptIndex, spans: Spans, heard: Heard, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    class Broken:
        result = Generation("", [], "cancelled", 7, 0.0, 0.0, 0.0)

        def __iter__(self) -> Iterator[str]:
            yield "It"
            raise MemoryError("no more")

    monkeypatch.setattr(type(index.generator), "stream", lambda *args: Broken())
    debug = LlamaDebugHandler(print_trace_on_end=False)
    engine = index.as_query_engine(streaming=streaming, callback_manager=CallbackManager([debug]))
    with pytest.raises(MemoryError):
        for _ in getattr(engine.query(QUESTION), "response_gen", ()):
            pass
    assert any("ConceptLLM.answer" in span.id_ for span in spans.dropped_spans)
    assert not heard.of("LLMCompletionEndEvent")
    [(_, end)] = debug.get_event_pairs(CBEventType.LLM)
    assert isinstance(end.payload[EventPayload.EXCEPTION], MemoryError)


def test_events_tell_model_and_settings(index: ConceptIndex, heard: Heard) -> None:
    index.as_query_engine().query(QUESTION)
    ConceptLLM(index.generator).chat(MESSAGES)
    ConceptLLM(index.generator).complete(QUESTION)
    for name in ("LLMCompletionStartEvent", "LLMChatStartEvent"):
        for event in heard.of(name):
            assert event.model_dict["model_name"] == index.generator.name
            assert event.model_dict["max_new_tokens"] == SHORT.max_new_tokens
    assert len(heard.of("LLMCompletionStartEvent")) == 2
    fetched = heard.of("ConceptsFetchedEvent")
    assert [event.passages > 0 and event.hits > 0 and event.misses == 0 for event in fetched] == [True]
    assert "ConceptLibrary.fetch" in fetched[0].within_span


def test_compressing_is_told(compressor: Compressor, heard: Heard, spans: Spans) -> None:
    documents = [Document(id_="rock", text=toy.TEXT)]
    with ConceptIndex.from_documents(documents, compressor=compressor, embedder=HashEmbedder()) as index:
        [ingested] = heard.of("ConceptsCompressedEvent")
        assert (ingested.occasion, ingested.units) == ("ingest", index.stats()["segments"])
        assert ingested.within_span in [span.id_ for span in spans.named("ConceptLibrary.ensure")]
        changed = index.as_retriever(similarity_top_k=1).retrieve(QUESTION)
        changed[0].node.text = "Ada Marsh built it alone, they say."
        index.as_synthesizer(generation=SHORT).synthesize(QUESTION, changed)
    missed = heard.of("ConceptsCompressedEvent")[1]
    assert missed.occasion == "query" and missed.units >= 1 and missed.seconds > 0


# --- counting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["text", "concepts"])
async def test_positions_and_new_tokens_are_counted(index: ConceptIndex, mode: str) -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: [0] * 10_000)  # nothing is left to guess by text
    responses = await ways(index, mode=mode, callback_manager=CallbackManager([counter]))
    accounts = [response.metadata["compllm"] for response in responses.values()]
    assert [event.prompt_token_count for event in counter.llm_token_counts] == [
        account["prompt_positions"] for account in accounts
    ]
    assert [event.completion_token_count for event in counter.llm_token_counts] == [
        account["new_tokens"] for account in accounts
    ]
    assert all(account["new_tokens"] for account in accounts)


@pytest.mark.parametrize("streaming", [False, True])
def test_every_prompt_of_a_refined_answer_is_counted(index: ConceptIndex, spans: Spans, streaming: bool) -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: [0] * 10_000)
    engine = index.as_query_engine(
        response_mode="refine", streaming=streaming, callback_manager=CallbackManager([counter])
    )
    response = engine.query(QUESTION)
    for _ in getattr(response, "response_gen", ()):
        pass
    account = response.metadata["compllm"]
    assert account["prompts"] == len(counter.llm_token_counts) == len(spans.named("ConceptLLM.answer")) > 1
    assert counter.prompt_llm_token_count == account["prompt_positions"]
    assert counter.completion_llm_token_count == account["new_tokens"]


async def test_a_chat_is_counted_too(index: ConceptIndex) -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: [0] * 10_000)
    llm = ConceptLLM(index.generator, callback_manager=CallbackManager([counter]))
    llm.chat(MESSAGES)
    list(llm.stream_chat(MESSAGES))
    await llm.achat(MESSAGES)
    _ = [part async for part in await llm.astream_chat(MESSAGES)]
    llm.complete(QUESTION)
    list(llm.stream_complete(QUESTION))
    await llm.acomplete(QUESTION)
    _ = [part async for part in await llm.astream_complete(QUESTION)]
    counts = {(event.prompt_token_count, event.completion_token_count) for event in counter.llm_token_counts}
    assert len(counter.llm_token_counts) == 8
    assert len(counts) == 1  # the same prompt, the same answer
    [(prompt, new)] = counts
    assert prompt == llm._plan(MESSAGES).positions and 0 < new <= SHORT.max_new_tokens


# --- callback managers that come late -------------------------------------------------------------------------------


@pytest.fixture
def settings() -> Iterator[None]:
    kept = Settings._callback_manager
    yield
    Settings._callback_manager = kept


def kinds(debug: LlamaDebugHandler) -> set[CBEventType]:
    return {kind for kind in CBEventType if debug.get_event_pairs(kind)}


WHOLE = {CBEventType.QUERY, CBEventType.RETRIEVE, CBEventType.SYNTHESIZE, CBEventType.LLM}


def test_one_of_settings_set_later_is_heard(index: ConceptIndex, settings: None) -> None:
    engine = index.as_query_engine()
    engine.query(QUESTION)
    debug = LlamaDebugHandler(print_trace_on_end=False)
    Settings.callback_manager = CallbackManager([debug])
    engine.query(QUESTION)
    assert kinds(debug) >= WHOLE


def test_one_set_on_the_engine_later_is_heard(index: ConceptIndex) -> None:
    engine = index.as_query_engine()
    debug = LlamaDebugHandler(print_trace_on_end=False)
    engine.callback_manager = CallbackManager([debug])
    engine.query(QUESTION)
    assert kinds(debug) >= WHOLE
    assert engine.callback_manager.handlers == [debug]


def test_a_later_one_of_the_settings_takes_the_place_of_an_earlier(index: ConceptIndex, settings: None) -> None:
    engine = index.as_query_engine()
    first, second = (LlamaDebugHandler(print_trace_on_end=False) for _ in range(2))
    for debug in (first, second):
        Settings.callback_manager = CallbackManager([debug])
        before = len(first.get_event_pairs(CBEventType.RETRIEVE))
        engine.query(QUESTION)
    assert kinds(second) >= WHOLE and len(first.get_event_pairs(CBEventType.RETRIEVE)) == before == 1


def test_one_that_was_given_stays(index: ConceptIndex, settings: None) -> None:
    given, late = (LlamaDebugHandler(print_trace_on_end=False) for _ in range(2))
    engine = index.as_query_engine(callback_manager=CallbackManager([given]))
    Settings.callback_manager = CallbackManager([late])
    engine.query(QUESTION)
    assert kinds(given) >= WHOLE
    assert not kinds(late) & {CBEventType.LLM, CBEventType.SYNTHESIZE}


# --- OpenInference ------------------------------------------------------------------------------------------------


@pytest.fixture
def exported() -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrumentor = LlamaIndexInstrumentor()
    instrumentor.instrument(tracer_provider=provider, skip_dep_check=True)
    yield exporter
    instrumentor.uninstrument()


def llm_spans(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    return [s for s in exporter.get_finished_spans() if s.attributes["openinference.span.kind"] == "LLM"]


async def test_openinference_sees_model_tokens_output_and_account(
    index: ConceptIndex, exported: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        responses = await ways(index)
    assert not [record for record in caplog.records if "openinference" in record.name]
    found = llm_spans(exported)
    assert [span.name for span in found] == ["ConceptLLM.answer"] * 4
    by_id = {span.context.span_id: span for span in exported.get_finished_spans()}
    for span, response in zip(found, responses.values(), strict=True):
        account, seen = response.metadata["compllm"], span.attributes
        assert seen["llm.model_name"] == index.generator.name
        assert seen["llm.token_count.prompt"] == account["prompt_positions"]
        assert seen["llm.token_count.completion"] == account["new_tokens"]
        assert seen["llm.token_count.prompt_details.cache_read"] == account["reused_positions"]
        assert seen["output.value"] == account["answer"]
        assert seen["llm.finish_reason"] == account["finish_reason"]
        assert json.loads(seen["input.value"])["max_new_tokens"] == SHORT.max_new_tokens
        assert " concepts>" in seen["llm.prompts"][0]
        for name in ("ttft_s", "prefill_cost", "prompt_positions", "kv_bytes"):
            assert seen[f"compllm.{name}"] == account[name]
        assert seen["compllm.store.hits"] == account["store"]["hits"]
        assert "synthesize" in by_id[span.parent.span_id].name
        assert span.status.is_ok
    assert len({span.context.trace_id for span in found}) == 4
    assert not trace.get_current_span().is_recording()


def test_openinference_ends_a_span_that_is_closed_early(index: ConceptIndex, exported: InMemorySpanExporter) -> None:
    stream = index.as_query_engine(streaming=True).query(QUESTION).response_gen
    next(stream)
    assert not llm_spans(exported)
    assert trace.get_current_span().get_span_context().span_id == 0  # nothing leaks to the reader
    stream.close()
    [span] = llm_spans(exported)
    assert span.status.is_ok and span.attributes["llm.finish_reason"] == "cancelled"


def test_openinference_sees_an_error(
    index: ConceptIndex, exported: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        result = Generation("", [], "cancelled", 7, 0.0, 0.0, 0.0)

        def __iter__(self) -> Iterator[str]:
            raise MemoryError("no more")

    monkeypatch.setattr(type(index.generator), "stream", lambda *args: Broken())
    with pytest.raises(MemoryError):
        index.as_query_engine().query(QUESTION)
    [span] = llm_spans(exported)
    assert not span.status.is_ok and "no more" in span.status.description


def test_nobody_listens_nothing_is_spelt_out(index: ConceptIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = index.as_query_engine()
    monkeypatch.setattr(
        type(engine._response_synthesizer), "_readable", lambda *args: pytest.fail("spelt out for nobody")
    )
    assert engine.query(QUESTION).source_nodes[0].node.get_content(MetadataMode.NONE)
