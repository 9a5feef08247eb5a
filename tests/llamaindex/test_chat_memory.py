"""Chat engines: what is remembered, and what of it a prompt holds."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer, ChatSummaryMemoryBuffer, Memory

from compllm_rag import ConceptIndex, ConceptLLM
from compllm_rag.errors import ConfigurationError, PromptTooLongError
from tests.llamaindex.chat_samples import TALK, Readings, deep_compressor, open_index


@pytest.fixture(scope="module")
def index() -> Iterator[ConceptIndex]:
    with open_index(deep_compressor()) as made:
        yield made


def text_of(response: Any) -> str:
    return "".join(response.response_gen)


async def atext_of(response: Any) -> str:
    return "".join([piece async for piece in response.async_response_gen()])


def said(engine: Any) -> list[tuple[str, str]]:
    return [(message.role.value, message.content) for message in engine.chat_history]


def memories(index: ConceptIndex) -> dict[str, Any]:
    llm = ConceptLLM(index.generator)
    return {
        "Memory": Memory.from_defaults(token_limit=2000),
        "ChatMemoryBuffer": ChatMemoryBuffer.from_defaults(token_limit=2000),
        "ChatSummaryMemoryBuffer": ChatSummaryMemoryBuffer.from_defaults(llm=llm, token_limit=40),
        "none": None,
    }


@pytest.mark.parametrize("name", ["Memory", "ChatMemoryBuffer", "ChatSummaryMemoryBuffer", "none"])
@pytest.mark.parametrize("mode", ["context", "best", "simple"])
def test_memories_of_llama_index(index: ConceptIndex, monkeypatch: pytest.MonkeyPatch, name: str, mode: str) -> None:
    readings = Readings(index, monkeypatch)
    options = {} if mode == "simple" else {"similarity_top_k": 1}
    engine = index.as_chat_engine(chat_mode=mode, memory=memories(index)[name], **options)
    responses = [engine.chat(message) for message in [*TALK, *TALK]]
    last = responses[-1].metadata["compllm"]
    if name == "ChatSummaryMemoryBuffer":
        assert readings.text().count("<|start|>system") == 1  # the summary stands in it
        assert 0 < last["turns"] < 5
    else:
        assert (last["turns"], last["turns_dropped"]) == (5, 0)
        assert len(engine.chat_history) == 12
    engine.reset()
    assert engine.chat_history == []
    assert engine.chat(TALK[0]).metadata["compllm"]["turns"] == 0


def test_a_history_that_is_given(index: ConceptIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = Readings(index, monkeypatch)
    history = [ChatMessage(role="user", content="Hi {you}."), ChatMessage(role="assistant", content="Hello.")]
    begun = index.as_chat_engine(chat_mode="context", chat_history=history)
    given = index.as_chat_engine(chat_mode="context", memory=ChatMemoryBuffer.from_defaults(), chat_history=history)
    late = index.as_chat_engine(chat_mode="context")
    for response in (begun.chat(TALK[0]), given.chat(TALK[0]), late.chat(TALK[0], chat_history=history)):
        assert response.metadata["compllm"]["turns"] == 1
        assert "Hi {you}.<|end|>\n<|start|>assistant\nHello.<|end|>" in readings.text()
    assert said(late)[:3] == [("user", "Hi {you}."), ("assistant", "Hello."), ("user", TALK[0])]
    asyncio.run(late.achat(TALK[1], chat_history=[]))
    assert len(late.chat_history) == 2


def test_an_answer_that_is_given_up_is_remembered_as_far_as_it_was_said(index: ConceptIndex) -> None:
    engine = index.as_chat_engine(chat_mode="context")
    whole = str(engine.chat(TALK[0]))
    engine.reset()
    pieces = engine.stream_chat(TALK[0]).response_gen
    part = next(pieces)
    assert engine.chat_history == []
    pieces.close()
    assert said(engine) == [("user", TALK[0]), ("assistant", part)]
    assert part != whole and whole.startswith(part)
    engine.reset()
    engine.stream_chat(TALK[0])  # nobody reads it
    gc.collect()
    assert engine.chat_history == []
    assert str(engine.chat(TALK[0])) == whole


async def test_an_asynchronous_answer_that_is_given_up(index: ConceptIndex) -> None:
    engine = index.as_chat_engine(chat_mode="context")
    response = await engine.astream_chat(TALK[0])
    pieces = response.async_response_gen()
    part = await anext(pieces)
    await pieces.aclose()
    assert said(engine) == [("user", TALK[0]), ("assistant", part)]
    assert response.metadata["compllm"]["finish_reason"] == "cancelled"
    with pytest.raises(ConfigurationError, match="read in the other way"):
        next(response.response_gen)


def test_an_answer_that_fails_is_not_remembered(index: ConceptIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = index.as_chat_engine(chat_mode="context")
    before = str(engine.chat(TALK[0]))

    def fail(*_: Any) -> Any:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patched:
        patched.setattr("compllm_rag.generation.halves.SplitForward.extend", fail)
        response = engine.stream_chat(TALK[1])
        with pytest.raises(RuntimeError, match="on purpose"):
            text_of(response)
        with pytest.raises(RuntimeError, match="on purpose"):
            engine.chat(TALK[1])
    assert said(engine) == [("user", TALK[0]), ("assistant", before)]


def test_a_history_that_is_refused_leaves_the_conversation_as_it_is(index: ConceptIndex) -> None:
    engine = index.as_chat_engine(chat_mode="context")
    engine.chat(TALK[0])
    before = said(engine)
    wrong = [ChatMessage(role="tool", content="z")]
    for ask in (engine.chat, engine.stream_chat):
        with pytest.raises(ConfigurationError, match="no such role"):
            ask("Who?", chat_history=wrong)
    for way in (engine.achat, engine.astream_chat):
        with pytest.raises(ConfigurationError, match="no such role"):
            asyncio.run(way("Who?", chat_history=wrong))
    assert said(engine) == before
    assert str(engine.chat(TALK[1])) and len(said(engine)) == len(before) + 2


# The window


@pytest.mark.parametrize("memory", [lambda: None, lambda: ChatMemoryBuffer.from_defaults(token_limit=10**6)])
@pytest.mark.parametrize("mode", ["context", "simple", "best", "condense_question"])
def test_a_conversation_longer_than_the_window(mode: str, memory: Any) -> None:
    """The oldest turns give way, and the account says how many."""
    with open_index(deep_compressor(window=420)) as index:
        options = {} if mode == "simple" else {"similarity_top_k": 2}
        engine = index.as_chat_engine(chat_mode=mode, memory=memory(), **options)
        accounts = [engine.chat(f"{TALK[n % 3]} {n}").metadata["compllm"] for n in range(12)]
        for n, account in enumerate(accounts):
            if mode == "condense_question":
                assert (account["turns"], account["turns_dropped"]) == (0, 0)
            else:
                assert account["turns"] + account["turns_dropped"] == n
        assert mode == "condense_question" or 0 < accounts[-1]["turns"] < 11
        if mode != "simple":
            assert accounts[-1]["dropped"] == [] and len(accounts[-1]["nodes"]) == 2
        assert len(engine.chat_history) == 24


def test_turns_are_given_up_some_together_so_that_the_rest_is_reused() -> None:
    with open_index(deep_compressor(window=420)) as index:
        engine = index.as_chat_engine(chat_mode="context", similarity_top_k=1)
        accounts = [engine.chat(f"{TALK[n % 3]} {n}").metadata["compllm"] for n in range(16)]
        given_up = [account["turns_dropped"] for account in accounts]
        assert {0, 4, 8} <= {*given_up} <= {0, 4, 8, 12} and given_up == sorted(given_up)
        for before, now in zip(accounts, accounts[1:], strict=False):
            kept = now["turns_dropped"] == before["turns_dropped"]
            more_than_the_opening = now["reused_positions"] > accounts[1]["reused_positions"] + 3
            assert more_than_the_opening == (kept and before["turns"] > 0)


def test_a_memory_of_llama_index_that_archives() -> None:
    with open_index(deep_compressor(window=420)) as index:
        memory = Memory.from_defaults(token_limit=200, token_flush_size=40)
        engine = index.as_chat_engine(chat_mode="context", memory=memory, similarity_top_k=2)
        accounts = [engine.chat(f"{TALK[n % 3]} {n}").metadata["compllm"] for n in range(12)]
        assert all(account["turns"] + account["turns_dropped"] == n for n, account in enumerate(accounts))
        assert accounts[-1]["turns_dropped"] > 0 and accounts[-1]["dropped"] == []


def test_what_was_just_said_is_worth_more_than_the_last_passages() -> None:
    with open_index(deep_compressor(window=420)) as index:
        for overflow, turns in [("drop", 1), ("error", 0)]:
            engine = index.as_chat_engine(chat_mode="context", similarity_top_k=3, overflow=overflow)
            engine.chat("Who? " * 40)
            account = engine.chat(TALK[0]).metadata["compllm"]
            assert account["turns"] == turns
            assert (len(account["dropped"]) > 0) == (overflow == "drop") and len(account["nodes"]) > 0


def test_a_message_that_does_not_fit_alone() -> None:
    with open_index(deep_compressor(window=420)) as index:
        for mode in ("context", "simple"):
            engine = index.as_chat_engine(chat_mode=mode)
            with pytest.raises(PromptTooLongError, match="do not fit the window"):
                engine.chat("Who? " * 400)
            assert engine.chat_history == []
            engine.chat(TALK[0])
