"""The chat engine: LlamaIndex's interface, passages read as concepts."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field, replace
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole
from llama_index.core.callbacks import CallbackManager, trace_method
from llama_index.core.chat_engine.types import AgentChatResponse, BaseChatEngine
from llama_index.core.instrumentation.events.chat_engine import (
    StreamChatDeltaReceivedEvent,
    StreamChatEndEvent,
    StreamChatErrorEvent,
    StreamChatStartEvent,
)
from llama_index.core.memory import BaseMemory
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.tools import ToolOutput
from llama_index_instrumentation import get_dispatcher

from compllm_rag.handles import ProcessBound
from compllm_rag.llamaindex.chat.condense import Condenser
from compllm_rag.llamaindex.chat.planner import Turn
from compllm_rag.llamaindex.chat.response import ConceptChatStream
from compllm_rag.llamaindex.chat.synthesizer import TurnSynthesizer
from compllm_rag.llamaindex.chat.turns import as_messages, checked_question, n_turns
from compllm_rag.prompt import Message

dispatcher = get_dispatcher(__name__)


@dataclass(frozen=True)
class ChatMode:
    """How a turn is answered.

    Attributes:
        reads_history: Earlier turns stand in the prompt.
        answers_condensed: The LLM answers the condensed question; else the message as it was.
        system: The system turn.
        head: Messages in front of all turns.
    """

    reads_history: bool = True
    answers_condensed: bool = False
    system: str = ""
    head: Sequence[Message] = field(default_factory=tuple)


class ConceptChatEngine(ProcessBound, BaseChatEngine):
    """Chats about passages that are read as concepts; `ConceptIndex.as_chat_engine` makes one.

    `metadata["compllm"]` of a response is the account of a query engine, with what became of the conversation and
    `reused_positions`: the positions of the prompt that the turn before had read already. Question and answer enter
    the memory together, when the answer has ended; of an answer that was given up, what was said until then.

    Args:
        synthesizer: Makes the synthesizer of a turn, given the turn and whether to stream.
        memory: The conversation.
        mode: How a turn is answered.
        retriever: Finds passages; None chats without any.
        condenser: Makes a question of its own out of a follow-up; None looks for the message as it is.
        node_postprocessors: LlamaIndex's.
        callback_manager: LlamaIndex's.
    """

    _opened_by = "make one there: index.as_chat_engine(); the memory may be taken along"

    def __init__(
        self,
        synthesizer: Callable[[Turn, bool], TurnSynthesizer],
        memory: BaseMemory,
        mode: ChatMode,
        *,
        retriever: BaseRetriever | None = None,
        condenser: Condenser | None = None,
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self._synthesizer, self._memory, self._mode = synthesizer, memory, mode
        self._retriever, self._condenser, self._postprocessors = retriever, condenser, list(node_postprocessors)
        self.callback_manager = callback_manager or CallbackManager([])
        for each in self._postprocessors:
            each.callback_manager = self.callback_manager

    @property
    def memory(self) -> BaseMemory:
        """The conversation, as LlamaIndex keeps it."""
        return self._memory

    @property
    def chat_history(self) -> list[ChatMessage]:
        """All that was said."""
        return self._memory.get_all()

    def reset(self) -> None:
        """Forget what was said."""
        self._memory.reset()

    @trace_method("chat")
    def chat(
        self,
        message: str,
        chat_history: list[ChatMessage] | None = None,
        prev_chunks: list[NodeWithScore] | None = None,
    ) -> AgentChatResponse:
        """Answer one message.

        Args:
            message: What the user says.
            chat_history: What was said before; None goes on with the memory.
            prev_chunks: Passages to read where nothing is found.

        Raises:
            ConfigurationError: The message is no text, or the history holds what is none.
            PromptTooLongError: The message alone does not fit the LLM's window.
        """
        turn, nodes = self._begin(message, chat_history, prev_chunks)
        response = self._synthesizer(turn, False).answer(nodes, retrieved=self._retriever is not None)
        if str(response):
            self._memory.put_messages(_said(message, str(response)))
        return AgentChatResponse(
            response=str(response),
            sources=self._sources(turn, nodes),
            source_nodes=response.source_nodes,
            metadata=response.metadata,
        )

    @trace_method("chat")
    def stream_chat(
        self,
        message: str,
        chat_history: list[ChatMessage] | None = None,
        prev_chunks: list[NodeWithScore] | None = None,
    ) -> ConceptChatStream:
        """`chat`, piece by piece: the answer is made as it is read."""
        turn, nodes = self._begin(message, chat_history, prev_chunks)
        response = self._synthesizer(turn, True).answer(nodes, retrieved=self._retriever is not None)
        made = self._streaming(turn, nodes, response)
        made.chat_stream = self._told(made, message, response.response_gen)
        return made

    @trace_method("chat")
    async def achat(
        self,
        message: str,
        chat_history: list[ChatMessage] | None = None,
        prev_chunks: list[NodeWithScore] | None = None,
    ) -> AgentChatResponse:
        """`chat` with the work in threads."""
        turn, nodes = await self._abegin(message, chat_history, prev_chunks)
        response = await self._synthesizer(turn, False).aanswer(nodes, retrieved=self._retriever is not None)
        if str(response):
            await self._memory.aput_messages(_said(message, str(response)))
        return AgentChatResponse(
            response=str(response),
            sources=self._sources(turn, nodes),
            source_nodes=response.source_nodes,
            metadata=response.metadata,
        )

    @trace_method("chat")
    async def astream_chat(
        self,
        message: str,
        chat_history: list[ChatMessage] | None = None,
        prev_chunks: list[NodeWithScore] | None = None,
    ) -> ConceptChatStream:
        """`stream_chat` with the work in threads."""
        turn, nodes = await self._abegin(message, chat_history, prev_chunks)
        response = await self._synthesizer(turn, True).aanswer(nodes, retrieved=self._retriever is not None)
        made = self._streaming(turn, nodes, response)
        made.achat_stream = self._atold(made, message, response.response_gen)
        return made

    def _begin(
        self, message: str, chat_history: list[ChatMessage] | None, prev_chunks: list[NodeWithScore] | None
    ) -> tuple[Turn, list[NodeWithScore]]:
        checked_question(message)
        if chat_history is not None:
            as_messages(chat_history)  # what is refused leaves the conversation as it is
            self._memory.set(list(chat_history))
        before = n_turns(self._memory.get_all())
        history = self._memory.get(input=message)
        begun = time.perf_counter()
        question = self._condenser.condense(history, message) if self._condenser else message
        turn = self._turn(message, question, history, before, time.perf_counter() - begun)
        if self._retriever is None:
            return turn, []
        nodes = self._retriever.retrieve(question)
        for each in self._postprocessors:
            nodes = each.postprocess_nodes(nodes, query_bundle=QueryBundle(question))
        return turn, nodes or prev_chunks or []

    async def _abegin(
        self, message: str, chat_history: list[ChatMessage] | None, prev_chunks: list[NodeWithScore] | None
    ) -> tuple[Turn, list[NodeWithScore]]:
        checked_question(message)
        if chat_history is not None:
            as_messages(chat_history)
            await self._memory.aset(list(chat_history))
        before = n_turns(await self._memory.aget_all())
        history = await self._memory.aget(input=message)
        begun = time.perf_counter()
        question = await self._condenser.acondense(history, message) if self._condenser else message
        turn = self._turn(message, question, history, before, time.perf_counter() - begun)
        if self._retriever is None:
            return turn, []
        nodes = await self._retriever.aretrieve(question)
        for each in self._postprocessors:
            nodes = await each.apostprocess_nodes(nodes, query_bundle=QueryBundle(question))
        return turn, nodes or prev_chunks or []

    def _turn(
        self, message: str, question: str, history: Sequence[ChatMessage], before: int, condense_s: float
    ) -> Turn:
        asked = question if self._mode.answers_condensed else message
        turn = Turn(message, question, asked, self._mode.system, self._mode.head, condense_s=condense_s)
        if not self._mode.reads_history:
            return turn
        told, turns = as_messages(history)
        system = "\n\n".join(text for text in (self._mode.system, *told) if text)
        return replace(turn, system=system, turns=turns, turns_before=max(before, len(turns)))

    def _sources(self, turn: Turn, nodes: list[NodeWithScore]) -> list[ToolOutput]:
        if self._retriever is None:
            return []
        raw = {"message": turn.message, "question": turn.question}
        return [ToolOutput(tool_name="retriever", content=str(nodes), raw_input=raw, raw_output=nodes)]

    def _streaming(self, turn: Turn, nodes: list[NodeWithScore], response: Any) -> ConceptChatStream:
        return ConceptChatStream(
            sources=self._sources(turn, nodes), source_nodes=response.source_nodes, metadata=response.metadata
        )

    def _told(
        self, made: ConceptChatStream, message: str, pieces: Generator[str, None, None]
    ) -> Generator[ChatResponse, None, None]:
        """The answer as LlamaIndex's chat responses, remembered in the end."""
        text, failed = "", False
        dispatcher.event(StreamChatStartEvent())
        try:
            with closing(pieces):
                for piece in pieces:
                    text += piece
                    dispatcher.event(StreamChatDeltaReceivedEvent(delta=piece))
                    yield _part(text, piece)
        except Exception as error:
            failed = True
            dispatcher.event(StreamChatErrorEvent(exception=error))
            raise
        finally:
            _end(made, text)
            if text and not failed:
                self._memory.put_messages(_said(message, text))
        dispatcher.event(StreamChatEndEvent())

    async def _atold(
        self, made: ConceptChatStream, message: str, pieces: AsyncGenerator[str, None]
    ) -> AsyncGenerator[ChatResponse, None]:
        text, failed = "", False
        dispatcher.event(StreamChatStartEvent())
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    text += piece
                    dispatcher.event(StreamChatDeltaReceivedEvent(delta=piece))
                    yield _part(text, piece)
        except Exception as error:
            failed = True
            dispatcher.event(StreamChatErrorEvent(exception=error))
            raise
        finally:
            _end(made, text)
            if text and not failed:
                await self._memory.aput_messages(_said(message, text))
        dispatcher.event(StreamChatEndEvent())


def head_of(messages: Sequence[ChatMessage]) -> tuple[str, list[Message]]:
    """Messages that stand in front of all turns, as the text of the system turn and the others."""
    system, turns = as_messages(messages)
    return "\n\n".join(system), [message for turn in turns for message in turn]


def _said(message: str, answer: str) -> list[ChatMessage]:
    return [
        ChatMessage(role=MessageRole.USER, content=message),
        ChatMessage(role=MessageRole.ASSISTANT, content=answer),
    ]


def _part(text: str, delta: str) -> ChatResponse:
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=delta)


def _end(made: ConceptChatStream, text: str) -> None:
    made.unformatted_response, made.response, made.is_done = text, text.strip(), True
