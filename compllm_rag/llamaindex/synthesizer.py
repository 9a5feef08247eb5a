"""The response synthesizer: answers from concepts where stock ones paste text."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from collections.abc import Generator as TextStream
from typing import Any

from llama_index.core.base.llms.types import CompletionResponse
from llama_index.core.base.response.schema import RESPONSE_TYPE, AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.llm import (
    LLMCompletionEndEvent,
    LLMCompletionInProgressEvent,
    LLMCompletionStartEvent,
)
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
from llama_index_instrumentation.dispatcher import Dispatcher
from llama_index_instrumentation.event_handlers.null import NullEventHandler

from compllm_rag.config import GenerationConfig, MissingPolicy, Mode, OverflowPolicy
from compllm_rag.generation.base import Generation, Generator, TokenStream
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.llm import ConceptLLM
from compllm_rag.llamaindex.planner import DEFAULT_TEMPLATE, Chooser, PlannedPrompt, Planner, Queued
from compllm_rag.llamaindex.streams import in_thread

dispatcher = get_dispatcher(__name__)


class ConceptSynthesizer(BaseSynthesizer):
    """Answers a query from retrieved nodes, read as concepts.

    `response.metadata` holds, beside the nodes' own metadata, the entry `compllm` with what each node was read as,
    prompt positions, store hits and the timings of docs/design.md section 7 (of a stream, once it has ended).

    Args:
        library: Compressor and store.
        generator: Runs the target LLM; None runs it in this process.
        text_qa_template: Any LlamaIndex template with `{context_str}` and `{query_str}`.
        mode: `concepts`, or `text` to read the passages as tokens in the identical layout.
        missing: What to do when concepts are not stored: `recompress`, `text` or `error`.
        overflow: What to do when passages do not fit the window: `drop` the last ones and report it, or `error`.
        choose: Decides text or concepts for each node by itself.
        queued: Tells which of some node ids have concepts in the making; those are read as text meanwhile.
        streaming: Give out a stream.
        generation: Limits of the answer; None takes the generator's.
        callback_manager: LlamaIndex's.
    """

    def __init__(
        self,
        library: ConceptLibrary,
        generator: Generator | None = None,
        *,
        text_qa_template: BasePromptTemplate | None = None,
        mode: Mode = "concepts",
        missing: MissingPolicy = "recompress",
        overflow: OverflowPolicy = "drop",
        choose: Chooser | None = None,
        queued: Queued | None = None,
        streaming: bool = False,
        generation: GenerationConfig | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self._generator = generator or LocalGenerator(library.llm, halves=library.halves)
        if isinstance(self._generator, LocalGenerator) and (mode == "concepts" or choose is not None):
            _ = self._generator.halves  # made ready now, so that the first answer does not wait for it
        super().__init__(llm=ConceptLLM(self._generator), callback_manager=callback_manager, streaming=streaming)
        self._planner = Planner(
            library,
            text_qa_template or DEFAULT_TEMPLATE,
            llm=self._llm,
            mode=mode,
            missing=missing,
            overflow=overflow,
            choose=choose,
            queued=queued,
        )
        self._generation = generation or self._generator.config

    def _get_prompts(self) -> dict[str, BasePromptTemplate]:
        return {"text_qa_template": self._planner.text_qa_template}

    def _update_prompts(self, prompts: dict[str, BasePromptTemplate]) -> None:
        self._planner.text_qa_template = prompts.get("text_qa_template", self._planner.text_qa_template)

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
        if not nodes:
            empty = (
                StreamingResponse(self._empty_response_generator())
                if self._streaming
                else Response(self._empty_response)
            )
            dispatcher.event(SynthesizeEndEvent(query=bundle, response=empty))
            return empty
        with self._callback_manager.event(
            CBEventType.SYNTHESIZE, payload={EventPayload.QUERY_STR: bundle.query_str}
        ) as event:
            planned = self._plan(bundle, nodes)
            response = self._respond(planned, additional_source_nodes or [])
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
            return await asyncio.to_thread(self.synthesize, query, nodes, additional_source_nodes, **response_kwargs)
        bundle = QueryBundle(query) if isinstance(query, str) else query
        dispatcher.event(SynthesizeStartEvent(query=bundle))
        if not nodes:
            empty = AsyncStreamingResponse(self._empty_response_agenerator())
            dispatcher.event(SynthesizeEndEvent(query=bundle, response=empty))
            return empty
        with self._callback_manager.event(
            CBEventType.SYNTHESIZE, payload={EventPayload.QUERY_STR: bundle.query_str}
        ) as event:
            planned = await asyncio.to_thread(self._plan, bundle, nodes)
            account = planned.account()
            response = self._output(self._astream(planned, account), planned, account, additional_source_nodes or [])
            event.on_end(payload={EventPayload.RESPONSE: response})
        dispatcher.event(SynthesizeEndEvent(query=bundle, response=response))
        return response

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """Answer from bare texts, for callers that have no nodes."""
        planned = self._plan(QueryBundle(query_str), [NodeWithScore(node=TextNode(text=text)) for text in text_chunks])
        account = planned.account()
        return self._stream(planned, account) if self._streaming else self._generate(planned, account)

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """`get_response` with the work in threads."""
        nodes = [NodeWithScore(node=TextNode(text=text)) for text in text_chunks]
        planned = await asyncio.to_thread(self._plan, QueryBundle(query_str), nodes)
        account = planned.account()
        if self._streaming:
            return self._astream(planned, account)
        return await asyncio.to_thread(self._generate, planned, account)

    def _plan(self, query: QueryBundle, nodes: Sequence[NodeWithScore]) -> PlannedPrompt:
        planned = self._planner.plan(query, nodes, self._generator.window - self._generation.max_new_tokens)
        texts = [node.node.get_content() for node in planned.nodes]
        dispatcher.event(GetResponseStartEvent(query_str=query.query_str, text_chunks=texts))
        return planned

    def _respond(self, planned: PlannedPrompt, additional: Sequence[NodeWithScore]) -> RESPONSE_TYPE:
        account = planned.account()
        text: RESPONSE_TEXT_TYPE = (
            self._stream(planned, account) if self._streaming else self._generate(planned, account)
        )
        return self._output(text, planned, account, additional)

    def _output(
        self,
        text: RESPONSE_TEXT_TYPE,
        planned: PlannedPrompt,
        account: dict[str, Any],
        additional: Sequence[NodeWithScore],
    ) -> RESPONSE_TYPE:
        response = self._prepare_response_output(text, [*planned.nodes, *additional])
        # The dictionary itself, not a copy: a stream fills in its timings when it ends.
        response.metadata = {**(response.metadata or {}), "compllm": account}
        return response

    def _generate(self, planned: PlannedPrompt, account: dict[str, Any]) -> str:
        for _ in (stream := self._pieces(planned, account)):
            pass
        stream.close()
        return str(account["answer"])

    def _stream(self, planned: PlannedPrompt, account: dict[str, Any]) -> TextStream[str, None, None]:
        yield from self._pieces(planned, account)

    async def _astream(self, planned: PlannedPrompt, account: dict[str, Any]) -> AsyncGenerator[str, None]:
        pieces = in_thread(self._pieces(planned, account))
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()

    def _pieces(self, planned: PlannedPrompt, account: dict[str, Any]) -> TextStream[str, None, None]:
        """Generate, telling LlamaIndex's instrumentation, and complete the account however it ends."""
        begun = time.perf_counter()
        # To spell a prompt out takes as long as to lay it out: only for those who listen.
        prompt = self._readable(planned) if self._callback_manager.handlers or _is_heard(dispatcher) else ""
        cancel = threading.Event()
        stream = self._generator.stream(planned.plan, self._generation, cancel)
        with self._callback_manager.event(CBEventType.LLM, payload={EventPayload.PROMPT: prompt}) as event:
            dispatcher.event(
                LLMCompletionStartEvent(prompt=prompt, additional_kwargs={}, model_dict=self._llm.to_dict())
            )
            waited_s = time.perf_counter() - begun
            try:
                yield from self._announced(prompt, iter(stream))
            finally:
                cancel.set()
                made = CompletionResponse(text=stream.result.text)
                _complete(account, planned, stream, waited_s)
                dispatcher.event(LLMCompletionEndEvent(prompt=prompt, response=made))
                event.on_end(payload={EventPayload.PROMPT: prompt, EventPayload.COMPLETION: made})

    def _announced(self, prompt: str, pieces: Iterator[str]) -> Iterator[str]:
        text = ""
        for piece in pieces:
            text += piece
            partial = CompletionResponse(text=text, delta=piece)
            dispatcher.event(LLMCompletionInProgressEvent(prompt=prompt, response=partial))
            yield piece

    def _readable(self, planned: PlannedPrompt) -> str:
        """What instrumentation shows: text as text, concepts as a note of their number."""
        decode = self._planner.template.tokenizer.decode
        ids = (getattr(span, "ids", None) for span in planned.plan.spans)
        return "".join(
            decode(list(i)) if i is not None else f"<{len(span)} concepts>"
            for i, span in zip(ids, planned.plan.spans, strict=True)
        )


def _is_heard(dispatcher: Dispatcher) -> bool:
    """Whether an event of a dispatcher reaches anybody."""
    at = dispatcher
    while all(isinstance(handler, NullEventHandler) for handler in at.event_handlers):
        if not at.propagate:
            return False
        at = at.parent
    return True


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
    account["layout_s"] = planned.layout_s + made.layout_s
    account["prefill_s"] = made.prefill_s
    account["decode_s"] = made.decode_s
    # Wall time of planning and of generating up to the first token; not what whoever reads a stream takes in between.
    account["ttft_s"] = planned.seconds + waited_s + made.layout_s + made.prefill_s
