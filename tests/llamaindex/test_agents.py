"""Agents of LlamaIndex with a query engine of concepts as a tool, as docs/guide/agents.md shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    CompletionResponse,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms import CustomLLM
from llama_index.core.tools import QueryEngineTool

from compllm_rag import ConceptIndex, ConceptLLM
from tests.llamaindex.chat_samples import deep_compressor, open_index

QUESTION = "Who built the lighthouse?"
STEPS = [
    f'Thought: I need a tool.\nAction: passages\nAction Input: {{"input": "{QUESTION}"}}',
    "Thought: I can answer without using any more tools.\nAnswer: Ada Marsh.",
]


class Scripted(CustomLLM):
    """An LLM that reasons as it was told to, and remembers what it was shown."""

    _left: list[str] = PrivateAttr(default_factory=lambda: list(STEPS))
    _seen: list[list[ChatMessage]] = PrivateAttr(default_factory=list)

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_chat_model=True)

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        raise AssertionError(prompt)

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        raise AssertionError(prompt)

    async def astream_chat(self, messages: list[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        self._seen.append(list(messages))
        said = ChatMessage(role="assistant", content=self._left.pop(0))

        async def pieces() -> ChatResponseAsyncGen:
            yield ChatResponse(message=said, delta=said.content)

        return pieces()


@pytest.fixture(scope="module")
def index() -> Iterator[ConceptIndex]:
    with open_index(deep_compressor(window=8192)) as made:
        yield made


def tool_of(index: ConceptIndex) -> QueryEngineTool:
    return QueryEngineTool.from_defaults(
        index.as_query_engine(similarity_top_k=2), name="passages", description="Answers questions about Gull Rock."
    )


@pytest.mark.parametrize("workflow", [False, True])
async def test_an_agent_asks_a_query_engine_of_concepts(index: ConceptIndex, workflow: bool) -> None:
    llm = Scripted()
    agent: Any = ReActAgent(name="reader", description="Reads.", tools=[tool_of(index)], llm=llm)
    if workflow:
        agent = AgentWorkflow(agents=[agent], root_agent="reader")
    result = await agent.run(user_msg="Ask about the lighthouse.")
    assert str(result) == "Ada Marsh."
    [call] = result.tool_calls
    answer = call.tool_output.raw_output
    account = answer.metadata["compllm"]
    assert {facts["used"] for facts in account["nodes"].values()} == {"concepts"}
    assert call.tool_output.content == str(answer) == str(index.as_query_engine(similarity_top_k=2).query(QUESTION))
    assert str(answer) in (llm._seen[-1][-1].content or "")  # what the tool said was read by the agent's LLM


async def test_the_storages_own_llm_may_drive(index: ConceptIndex) -> None:
    """A random one says nothing sensible, but it is asked, and its prompts go on with one another."""
    agent = ReActAgent(tools=[tool_of(index)], llm=ConceptLLM(index.generator))
    for _ in range(2):
        result = await agent.run(user_msg=QUESTION)
        assert str(result)
    index.generator.prefixes.clear()
    first, second = [index.generator.generate([ConceptLLM(index.generator)._user(QUESTION)])[0] for _ in range(2)]
    assert (first.reused_positions, second.reused_positions) == (0, first.prompt_positions - 1)


def test_function_calling_needs_another_llm(index: ConceptIndex) -> None:
    agent = FunctionAgent(tools=[tool_of(index)], llm=ConceptLLM(index.generator))
    assert not agent.llm.metadata.is_function_calling_model
