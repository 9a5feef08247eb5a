"""The target LLM as a LlamaIndex LLM."""

from __future__ import annotations

from llama_index.core.llms import ChatMessage

from compllm_rag import ConceptLLM, GenerationConfig, LocalGenerator, TargetLLM

MESSAGES = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Who built it?")]


async def test_every_way_to_ask_gives_the_same_answer(llm: TargetLLM) -> None:
    made = ConceptLLM(LocalGenerator(llm, GenerationConfig(max_new_tokens=10)))
    chat = made.chat(MESSAGES).message.content
    assert chat
    streamed = list(made.stream_chat(MESSAGES))
    assert streamed[-1].message.content == chat == "".join(r.delta for r in streamed)
    assert (await made.achat(MESSAGES)).message.content == chat
    assert "".join([r.delta async for r in await made.astream_chat(MESSAGES)]) == chat
    text = made.complete("Who?").text
    assert "".join(r.delta for r in made.stream_complete("Who?")) == text
    assert (await made.acomplete("Who?")).text == text
    assert "".join([r.delta async for r in await made.astream_complete("Who?")]) == text
    assert len(made.complete("Who?", max_new_tokens=3).text) < len(text)


def test_metadata(llm: TargetLLM) -> None:
    made = ConceptLLM(LocalGenerator(llm, GenerationConfig(max_new_tokens=10)))
    assert (made.metadata.context_window, made.metadata.num_output) == (2048, 10)
    assert made.metadata.is_chat_model
