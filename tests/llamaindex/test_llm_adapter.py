"""The target LLM as a LlamaIndex LLM."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock

from compllm_rag import ConceptLLM, GenerationConfig, LocalGenerator, TargetLLM
from compllm_rag.errors import ConfigurationError

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


def test_settings_have_llamaindexs_names(llm: TargetLLM) -> None:
    generator = LocalGenerator(llm, GenerationConfig(max_new_tokens=12))
    made = ConceptLLM(generator)
    full = made.complete("Who?").text
    assert made.complete("Who?", max_tokens=3).raw["usage"]["completion_tokens"] == 3
    assert made.complete("Who?", max_tokens=3).raw["finish_reason"] == "length"
    assert made.complete("Who?", stop=full[2:4]).text == full[: full.index(full[2:4])]
    assert made.complete("Who?", stop=[full[2:4], "never"]).text == full[: full.index(full[2:4])]
    warm = {"temperature": 1.5, "top_p": 0.9, "seed": 4}
    drawn = made.complete("Who?", **warm).text
    assert drawn != full
    assert made.chat([ChatMessage(content="Who?")], **warm).message.content == drawn
    assert made.complete("Who?", temperature=0.0, top_p=0.9).text == full
    assert (
        ConceptLLM(generator, max_tokens=3, **warm).complete("Who?").text
        == made.complete("Who?", max_tokens=3, **warm).text
    )
    assert ConceptLLM(generator, max_tokens=3).metadata.num_output == 3
    usage = made.complete("Who?").raw["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 12


@pytest.mark.parametrize("options", [{"temprature": 1.0}, {"max_tokens": 0}, {"top_p": 0.5}, {"tools": []}])
async def test_options_that_are_none_are_refused_by_name(llm: TargetLLM, options: dict[str, Any]) -> None:
    made = ConceptLLM(LocalGenerator(llm))
    [name] = options
    calls = [
        lambda: made.complete("Who?", **options),
        lambda: list(made.stream_complete("Who?", **options)),
        lambda: made.chat(MESSAGES, **options),
        lambda: list(made.stream_chat(MESSAGES, **options)),
        lambda: ConceptLLM(LocalGenerator(llm), **options),
    ]
    for call in calls:
        with pytest.raises(ConfigurationError, match=name):
            call()
    with pytest.raises(ConfigurationError, match=name):
        await made.achat(MESSAGES, **options)


def test_images_are_refused(llm: TargetLLM) -> None:
    turn = ChatMessage(role="user", blocks=[TextBlock(text="What is this?"), ImageBlock(image=b"\x89PNG")])
    with pytest.raises(ConfigurationError, match="ImageBlock"):
        ConceptLLM(LocalGenerator(llm)).chat([turn])
