"""Answers one turn of a conversation, with the full account that query engines give."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.schema import NodeWithScore, QueryBundle

from compllm_rag.generation.base import Generator
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.chat.planner import ChatPlanner, Turn
from compllm_rag.llamaindex.synthesizer import ConceptSynthesizer


class TurnSynthesizer(ConceptSynthesizer):
    """A synthesizer for one turn.

    Args:
        library: Compressor and store.
        generator: Runs the target LLM.
        turn: The turn.
        context_prompt: See `ChatPlanner`.
        **options: Of `ConceptSynthesizer`.
    """

    def __init__(
        self,
        library: ConceptLibrary,
        generator: Generator,
        turn: Turn,
        context_prompt: BasePromptTemplate | None,
        **options: Any,
    ) -> None:
        super().__init__(library, generator, **options)
        self._planner = ChatPlanner(self._planner, turn, context_prompt)
        self._turn, self._query = turn, QueryBundle(turn.asked)

    def answer(self, nodes: list[NodeWithScore], *, retrieved: bool) -> Any:
        """Answer from nodes, or without any where nothing was to be retrieved.

        Args:
            nodes: Best first.
            retrieved: Whether there should be nodes; none then give LlamaIndex's empty response, not an invented one.
        """
        if not nodes and not retrieved:
            return self._respond(self._plan(self._query, []), [])
        response = self.synthesize(self._query, nodes)
        return response if nodes else self._accounted(response)

    async def aanswer(self, nodes: list[NodeWithScore], *, retrieved: bool) -> Any:
        """`answer` with the work in threads; a stream is an async generator."""
        if nodes or retrieved:
            response = await self.asynthesize(self._query, nodes)
            return response if nodes else self._accounted(response)
        if not self._streaming:
            return await asyncio.to_thread(self.answer, nodes, retrieved=False)
        reading = await asyncio.to_thread(self._plan, self._query, [])
        return self._output(self._astream(reading), reading, [])

    def _accounted(self, response: Any) -> Any:
        """An empty response with an account: nothing was read."""
        metadata = response.metadata or {}
        nothing = {"prompt_positions": 0, "reused_positions": 0, "nodes": {}, "dropped": []}
        told = {
            "answer": self._empty_response,
            "finish_reason": "stop",
            "store": {"hits": 0, "misses": 0},
            "question": self._turn.question,
            "condense_s": self._turn.condense_s,
            "turns": 0,
            "turns_dropped": 0,
        }
        response.metadata = {**metadata, "compllm": {**nothing, **told, **metadata.get("compllm", {})}}
        return response
