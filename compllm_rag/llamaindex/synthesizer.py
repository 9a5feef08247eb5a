"""The response synthesizer: answers from concepts where stock ones paste text."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from collections.abc import Generator as TextStream
from concurrent.futures import Executor
from typing import Any, Unpack

from llama_index.core.base.response.schema import RESPONSE_TYPE, AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.synthesis import (
    GetResponseStartEvent,
    SynthesizeEndEvent,
    SynthesizeStartEvent,
)
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.response_synthesizers.base import BaseSynthesizer, QueryTextType
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.types import RESPONSE_TEXT_TYPE
from llama_index_instrumentation import get_dispatcher
from pydantic import BaseModel

from compllm_rag.config import GenerationConfig, MissingChoice, Mode, OverflowPolicy
from compllm_rag.errors import ConfigurationError
from compllm_rag.generation.base import Generation, Generator, TokenStream
from compllm_rag.generation.batching import BatchingGenerator
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.account import PlannedPrompt, Reading, add_earlier, empty_account, joined_account
from compllm_rag.llamaindex.callbacks import FollowsSettings
from compllm_rag.llamaindex.decoding import generation_of
from compllm_rag.llamaindex.llm import ConceptLLM
from compllm_rag.llamaindex.planner import Chooser, Planner, Queued
from compllm_rag.llamaindex.read_options import ReadOptions, refuse_several_prompts, require_narrowing
from compllm_rag.llamaindex.response_modes import ResponseMode, StockMode, allot, checked_mode, silent_answer
from compllm_rag.llamaindex.streams import aiter_once, in_thread, in_worker, iter_once
from compllm_rag.llamaindex.structured import instructions_for, parsed, refuse_stream, schema_of
from compllm_rag.llamaindex.templates import DEFAULT_REFINE_TEMPLATE, DEFAULT_TEMPLATE, checked_templates
from compllm_rag.llamaindex.tracing import LLMCall
from compllm_rag.prompt import TextSpan

dispatcher = get_dispatcher(__name__)

_PROMPTS = ("text_qa_template", "refine_template")


class ConceptSynthesizer(FollowsSettings, BaseSynthesizer):
    """Answers a query from retrieved nodes, read as concepts.

    `response.metadata` holds, beside the nodes' own metadata, the entry `compllm` with what each node was read as,
    prompt positions, store hits and the timings of docs/design.md section 7 (of a stream, once it has ended).

    Args:
        library: Compressor and store.
        generator: Runs the target LLM; None runs it in this process.
        text_qa_template: Any LlamaIndex template with `{context_str}` and `{query_str}`.
        mode: `concepts`, or `text` to read the passages as tokens in the identical layout.
        missing: What to do when concepts are not stored: `recompress`, `text`, `error`, or `auto`: recompress or text,
            whichever is sooner, node by node.
        overflow: What to do when passages do not fit: `drop` those and report it, or `error`. When none fits it is an
            error always. In `compact` and `refine` only passages that do not fit a prompt by themselves count.
        choose: Decides text or concepts for each node by itself.
        queued: Tells which of some node ids have concepts in the making; those are read as text meanwhile.
        streaming: Give out a stream.
        generation: Limits of the answer; None takes the generator's.
        callback_manager: LlamaIndex's; None takes that of `Settings`, whichever it is at the time.
        response_mode: `simple_summarize` (the default): one prompt. `compact`: as many prompts as the passages fill,
            each making the answer of the one before it better. `refine`: a prompt for each passage. `no_text` and
            `context_only`: the nodes, or their text, without running the LLM.
        refine_template: Any LlamaIndex template with `{context_msg}`, `{query_str}` and `{existing_answer}`.
        output_cls: A pydantic model; the answer is an object of it (`PydanticResponse`). Tokens that its schema does
            not allow are never chosen (extra `structured`). Not with `streaming`.
        **reading: `rate`, `narrowing`, `read_policy`, `relevance`, `relevance_cutoff`, `position_budget`,
            `prefill_budget`, `ttft_budget_s`, `costs`: what passages are read as, and how much they may take; see
            `llamaindex.read_options.passage_reading` and `narrowing_of`.

    Raises:
        ConfigurationError: A setting is none that there is, a function of a template would have to see concepts, or a
            read policy is to decide for several prompts.
        NotCalibratedError: `ttft_budget_s`, and nobody has measured how fast this machine reads.
    """

    def __init__(
        self,
        library: ConceptLibrary,
        generator: Generator | None = None,
        *,
        text_qa_template: BasePromptTemplate | None = None,
        mode: Mode = "concepts",
        missing: MissingChoice = "recompress",
        overflow: OverflowPolicy = "drop",
        choose: Chooser | None = None,
        queued: Queued | None = None,
        streaming: bool = False,
        generation: GenerationConfig | None = None,
        callback_manager: CallbackManager | None = None,
        response_mode: str | StockMode | None = None,
        refine_template: BasePromptTemplate | None = None,
        output_cls: type[BaseModel] | None = None,
        **reading: Unpack[ReadOptions],
    ) -> None:
        if output_cls is not None and streaming:
            refuse_stream()
        if not isinstance(generation, GenerationConfig | None):
            raise ConfigurationError(
                "these are no settings of an answer",
                got=f"a {type(generation).__name__}",
                expected="GenerationConfig",
                next_step="pass generation=GenerationConfig(max_new_tokens=...)",
            )
        checked_templates({"text_qa_template": text_qa_template, "refine_template": refine_template}, _PROMPTS)
        self._mode: ResponseMode = checked_mode(response_mode)
        silent = silent_answer(self._mode, []) is not None
        self._generator = generator or LocalGenerator(library.llm, halves=library.halves)
        if isinstance(self._generator, LocalGenerator) and not silent and (mode == "concepts" or choose is not None):
            _ = self._generator.halves  # made ready now, so that the first answer does not wait for it
        super().__init__(
            llm=ConceptLLM(self._generator),
            callback_manager=callback_manager,
            streaming=streaming,
            output_cls=output_cls,
        )
        self._planner = Planner(
            library,
            text_qa_template or DEFAULT_TEMPLATE,
            llm=self._llm,
            mode=mode,
            missing=missing,
            overflow=overflow,
            choose=choose,
            queued=queued,
            refine_template=refine_template or DEFAULT_REFINE_TEMPLATE,
            instructions="" if output_cls is None else instructions_for(output_cls),
            reading=reading,
        )
        if self._planner.narrowing is not None:
            require_narrowing(self._generator, self._planner.narrowing)
        if self._planner.reading is not None and self._mode in ("compact", "refine"):
            refuse_several_prompts(self._mode)
        self._generation = generation or self._generator.config
        if output_cls is not None:
            self._generation = generation_of(self._generation, {"json_schema": schema_of(output_cls)})
        self._facts = {"compressor": "trained" if library.spec.config.trained else "untrained"}

    def _get_prompts(self) -> dict[str, BasePromptTemplate]:
        return {"text_qa_template": self._planner.text_qa_template, "refine_template": self._planner.refine_template}

    def _update_prompts(self, prompts: dict[str, BasePromptTemplate]) -> None:
        checked_templates(prompts, _PROMPTS)
        self._planner.text_qa_template = prompts.get("text_qa_template", self._planner.text_qa_template)
        self._planner.refine_template = prompts.get("refine_template", self._planner.refine_template)

    def synthesize(
        self,
        query: QueryTextType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer from nodes; the stock `synthesize` would hand on their texts only.

        Raises:
            PromptTooLongError, MissingConceptsError, CorruptRecordError: See `Planner.plan` and `ConceptLibrary`.
        """
        bundle = QueryBundle(query) if isinstance(query, str) else query
        dispatcher.event(SynthesizeStartEvent(query=bundle))
        silent = self._silent(nodes)
        if silent is not None:
            given = StreamingResponse(iter_once(silent)) if self._streaming else Response(silent)
            self._complete_silent(given, silent, bundle, nodes, additional_source_nodes)
            return given
        with self._callback_manager.event(
            CBEventType.SYNTHESIZE, payload={EventPayload.QUERY_STR: bundle.query_str}
        ) as event:
            reading = self._plan(bundle, nodes)
            response = self._respond(reading, additional_source_nodes or [])
            event.on_end(payload={EventPayload.RESPONSE: response})
        dispatcher.event(SynthesizeEndEvent(query=bundle, response=response))
        return response

    async def asynthesize(
        self,
        query: QueryTextType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """`synthesize` with the work in threads; a stream is an async generator."""
        if not self._streaming:
            job = functools.partial(self.synthesize, query, nodes, additional_source_nodes, **response_kwargs)
            return await in_worker(self._workers, job)
        bundle = QueryBundle(query) if isinstance(query, str) else query
        dispatcher.event(SynthesizeStartEvent(query=bundle))
        silent = self._silent(nodes)
        if silent is not None:
            given = AsyncStreamingResponse(aiter_once(silent))
            self._complete_silent(given, silent, bundle, nodes, additional_source_nodes)
            return given
        with self._callback_manager.event(
            CBEventType.SYNTHESIZE, payload={EventPayload.QUERY_STR: bundle.query_str}
        ) as event:
            reading = await in_worker(self._workers, lambda: self._plan(bundle, nodes))
            response = self._output(self._astream(reading), reading, additional_source_nodes or [])
            event.on_end(payload={EventPayload.RESPONSE: response})
        dispatcher.event(SynthesizeEndEvent(query=bundle, response=response))
        return response

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """Answer from bare texts, for callers that have no nodes."""
        nodes = [NodeWithScore(node=TextNode(text=text)) for text in text_chunks]
        if (silent := self._silent(nodes)) is not None:
            return iter_once(silent) if self._streaming else silent
        reading = self._plan(QueryBundle(query_str), nodes)
        return self._stream(reading) if self._streaming else self._answer(reading)

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """`get_response` with the work in threads."""
        if not self._streaming:
            job = functools.partial(self.get_response, query_str, text_chunks, **response_kwargs)
            return await in_worker(self._workers, job)
        nodes = [NodeWithScore(node=TextNode(text=text)) for text in text_chunks]
        if (silent := self._silent(nodes)) is not None:
            return aiter_once(silent)
        return self._astream(await in_worker(self._workers, lambda: self._plan(QueryBundle(query_str), nodes)))

    def _silent(self, nodes: Sequence[NodeWithScore]) -> str | None:
        """The answer where the LLM does not run; None where it does."""
        silent = silent_answer(self._mode, nodes)
        return self._empty_response if not nodes and self._mode != "no_text" else silent

    def _complete_silent(
        self,
        response: RESPONSE_TYPE,
        answer: str,
        query: QueryBundle,
        nodes: Sequence[NodeWithScore],
        additional: Sequence[NodeWithScore] | None,
    ) -> None:
        """Give a response that no LLM made its sources and its account, and tell of it."""
        response.source_nodes = [*nodes, *(additional or [])]
        shown = self._get_metadata_for_response([node.node for node in response.source_nodes]) or {}
        response.metadata = {**shown, "compllm": empty_account(answer) | self._facts}
        dispatcher.event(SynthesizeEndEvent(query=query, response=response))

    def _plan(self, query: QueryBundle, nodes: Sequence[NodeWithScore]) -> Reading:
        """Lay out the prompts of an answer, and answer all but the last of them."""
        room = self._generation.max_new_tokens
        budget = self._generator.window - room
        prompts, dropped = allot(self._planner, query, nodes, mode=self._mode, budget=budget, answer_room=room)
        texts = [node.node.get_content() for planned in prompts for node in planned.nodes]
        dispatcher.event(GetResponseStartEvent(query_str=query.query_str, text_chunks=texts))
        earlier: list[dict[str, Any]] = []
        for i in range(1, len(prompts)):
            own = prompts[i - 1].account()
            existing = self._planner.cut(self._generate(Reading(prompts[i - 1], [], own, [])), room)
            earlier.append(own)
            again = prompts[i]
            read = sum(len(planned.nodes) for planned in prompts[:i])
            prompts[i] = self._planner.plan(
                query, again.nodes, budget, existing=existing, bodies=again.bodies, overflow="drop", cited=read
            )
            dropped += prompts[i].dropped
        account = joined_account(prompts, dropped) | self._facts
        return Reading(prompts[-1], [node for planned in prompts for node in planned.nodes], account, earlier)

    def _respond(self, reading: Reading, additional: Sequence[NodeWithScore]) -> RESPONSE_TYPE:
        text = self._stream(reading) if self._streaming else self._answer(reading)
        return self._output(text, reading, additional)

    def _output(self, text: RESPONSE_TEXT_TYPE, reading: Reading, additional: Sequence[NodeWithScore]) -> RESPONSE_TYPE:
        response = self._prepare_response_output(text, [*reading.nodes, *additional])
        # The dictionary itself, not a copy: a stream fills in its timings when it ends.
        response.metadata = {**(response.metadata or {}), "compllm": reading.account}
        return response

    def _answer(self, reading: Reading) -> RESPONSE_TEXT_TYPE:
        text = self._generate(reading)
        if self._output_cls is None:
            return text
        reason, limit = reading.account["finish_reason"], self._generation.max_new_tokens
        return parsed(self._output_cls, text, finish_reason=reason, limit=limit)

    def _generate(self, reading: Reading) -> str:
        for _ in (stream := self._stream(reading)):
            pass
        stream.close()
        return str(reading.account["answer"])

    def _stream(self, reading: Reading) -> TextStream[str, None, None]:
        return self._pieces(reading, self._call())

    def _astream(self, reading: Reading) -> AsyncGenerator[str, None]:
        return in_thread(self._stream(reading), self._workers)

    @property
    def _workers(self) -> Executor | None:
        """Threads for async callers: as many as answers are decoded together; None takes those of asyncio."""
        generator = self._generator
        return generator.scheduler.workers if isinstance(generator, BatchingGenerator) else None

    def _call(self) -> LLMCall:
        """A call whose span belongs to the span of now, whenever its pieces are wanted."""
        return LLMCall(self._llm, self._callback_manager, self._generation)

    def _pieces(self, reading: Reading, call: LLMCall) -> TextStream[str, None, None]:
        """Generate, telling LlamaIndex's instrumentation, and complete the account however it ends."""
        begun = time.perf_counter()
        planned, account = reading.planned, reading.account
        prompt = self._readable(planned) if call.is_heard else ""
        cancel = threading.Event()
        stream = self._generator.stream(planned.plan, self._generation, cancel)
        call.start(prompt)
        waited_s = time.perf_counter() - begun
        error: BaseException | None = None
        try:
            yield from call.pieces(iter(stream))
        except BaseException as raised:
            error = raised
            raise
        finally:
            cancel.set()
            _complete(account, planned, stream, waited_s)
            add_earlier(account, reading.earlier)
            call.end(stream.result, account, error)

    def _readable(self, planned: PlannedPrompt) -> str:
        """What instrumentation shows: text as text, concepts as a note of their number."""
        decode = self._planner.template.tokenizer.decode
        return "".join(
            decode(list(span.ids)) if isinstance(span, TextSpan) else f"<{len(span)} concepts>"
            for span in planned.plan.spans
        )


def _complete(account: dict[str, Any], planned: PlannedPrompt, stream: TokenStream, waited_s: float) -> None:
    """Fill in what is known when the answer has ended.

    Args:
        account: Of the response.
        planned: The prompt.
        stream: The answer.
        waited_s: Seconds from the first wish for a token to the start of generation.
    """
    made: Generation = stream.result
    account["answer"] = made.text
    account["finish_reason"] = made.finish_reason
    account["new_tokens"] = len(made.token_ids)
    account["reused_positions"] = made.reused_positions
    account["queue_s"] = made.queue_s
    account["layout_s"] = planned.layout_s + made.layout_s
    account["prefill_s"] = made.prefill_s
    account["decode_s"] = made.decode_s
    # Wall time of planning and of generating up to the first token; not what whoever reads a stream takes in between,
    # nor what the prompt waited for its turn (`queue_s`).
    account["ttft_s"] = planned.seconds + waited_s + made.layout_s + made.prefill_s
