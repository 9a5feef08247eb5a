"""Many who ask an index's synthesizer at once, asynchronously: the answers that each would get alone."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.schema import NodeWithScore, TextNode

from compllm_rag import BatchingGenerator, ConceptSynthesizer, GenerationConfig, LocalGenerator, Scheduler
from tests.generation.test_reuse import PARAGRAPHS, library_of

QUESTIONS = ("Who built the lighthouse?", "When did she die?", "Who rowed out?", "What keeps the lens?")


async def test_answers_to_those_who_ask_at_once() -> None:
    library, limit = library_of("llama"), GenerationConfig(max_new_tokens=6)
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(i)), score=1.0) for i, text in enumerate(PARAGRAPHS)]
    local = LocalGenerator(library.llm, limit, halves=library.halves)
    batching = BatchingGenerator.over(local, Scheduler(4))
    wanted = [
        str(ConceptSynthesizer(library, local).synthesize(question, nodes[i % 3 :]))
        for i, question in enumerate(QUESTIONS)
    ]

    async def ask(number: int, *, streaming: bool) -> tuple[str, dict[str, Any]]:
        synthesizer = ConceptSynthesizer(library, batching, streaming=streaming)
        response: Any = await synthesizer.asynthesize(QUESTIONS[number], nodes[number % 3 :])
        said = "".join([piece async for piece in response.response_gen]) if streaming else str(response)
        return said, response.metadata["compllm"]

    for streaming in (False, True):
        made = await asyncio.gather(*(ask(number, streaming=streaming) for number in range(4)))
        assert [said for said, _ in made] == wanted
        for _, account in made:
            assert account["new_tokens"] == 6 and account["ttft_s"] > 0 <= account["queue_s"]
    assert batching.scheduler.close()
