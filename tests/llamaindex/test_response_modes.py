"""What is read where passages exceed the window, in one prompt and in several, and what runs no LLM."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.response_synthesizers.type import ResponseMode
from llama_index.core.schema import NodeWithScore, TextNode

import toy
from compllm_rag import Compressor, ConceptSynthesizer, GenerationConfig, LocalGenerator, MemoryStore
from compllm_rag.errors import ConfigurationError, PromptTooLongError
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.planner import Planner
from compllm_rag.prompt import ConceptSpan, TextSpan

QUESTION = "Who built the lighthouse?"
SHORT = GenerationConfig(max_new_tokens=12)
PARAGRAPHS = toy.TEXT.split("\n\n")


def node(name: str, text: str, **metadata: Any) -> NodeWithScore:
    return NodeWithScore(node=TextNode(id_=name, text=text, metadata=metadata), score=1.0)


def nodes(n: int = 3) -> list[NodeWithScore]:
    return [node(f"n{i}", PARAGRAPHS[i % 3], title=f"T{i}") for i in range(n)]


def library(window: int = 2048) -> ConceptLibrary:
    made = Compressor(toy.llm(window=window))
    return ConceptLibrary(made, MemoryStore(made.hidden_size))


def synthesizer(window: int = 2048, **options: Any) -> ConceptSynthesizer:
    options.setdefault("generation", SHORT)
    return ConceptSynthesizer(library(window), **options)


async def every_way(nodes: list[NodeWithScore], window: int, **options: Any) -> list[tuple[str, Any]]:
    """The answer and the response: sync, async, streamed, streamed asynchronously."""
    out = []
    response: Any = synthesizer(window, **options).synthesize(QUESTION, nodes)
    out.append((str(response), response))
    response = await synthesizer(window, **options).asynthesize(QUESTION, nodes)
    out.append((str(response), response))
    response = synthesizer(window, streaming=True, **options).synthesize(QUESTION, nodes)
    out.append(("".join(response.response_gen), response))
    response = await synthesizer(window, streaming=True, **options).asynthesize(QUESTION, nodes)
    out.append(("".join([piece async for piece in response.async_response_gen()]), response))
    return out


def ids(response: Any) -> list[str]:
    return [found.node.node_id for found in response.source_nodes]


@pytest.mark.parametrize("mode", ["concepts", "text"])
async def test_a_passage_that_is_too_long_makes_room_for_those_behind_it(mode: str) -> None:
    found = [
        node("meta", "A dump.", raw="Fenwick Lane 12, " * 100),
        node("a", "The bakery sells buns."),
        node("long", toy.TEXT * 6),
        node("b", "It opens at nine."),
    ]
    for answer, response in await every_way(found, 400, mode=mode):
        account = response.metadata["compllm"]
        assert ids(response) == list(account["nodes"]) == ["a", "b"]
        assert account["dropped"] == ["meta", "long"]
        assert account["answer"] == answer
    plan = Planner(library(400), mode=mode).plan(QUESTION, found, 388).plan
    assert [span.passage for span in plan.spans if span.passage is not None] == [0, 1]
    # Numbers in the prompt have no gap, and are those of the sources.
    shown = toy.tokenizer().decode([i for s in plan.spans if isinstance(s, TextSpan) for i in s.ids])
    assert "[1]" in shown and "[2]" in shown and "[3]" not in shown


@pytest.mark.parametrize("options", [{}, {"response_mode": "compact"}, {"response_mode": "refine"}])
async def test_nothing_is_answered_from_no_passage(options: dict[str, Any]) -> None:
    found = [node("x", "A dump.", raw="Fenwick " * 200), node("y", "A dump.", raw="Lane " * 300)]
    for streaming in (False, True):
        made = synthesizer(300, streaming=streaming, **options)
        with pytest.raises(PromptTooLongError, match=r"none of the retrieved passages.*2 of 2.*x, y"):
            made.synthesize(QUESTION, found)
        with pytest.raises(PromptTooLongError, match="none of the retrieved passages"):
            await made.asynthesize(QUESTION, found)
    with pytest.raises(PromptTooLongError, match="question"):
        synthesizer(300, **options).synthesize(QUESTION * 40, found)


def test_what_cannot_fit_is_not_compressed() -> None:
    made = library(300)
    Planner(made).plan(QUESTION, [node("long", toy.TEXT * 20), node("a", "Buns.")], 288)
    assert made.metrics.work.segments == len(made.passage("Buns.").keys)


class Recorder(LocalGenerator):
    """Keeps the plans it is asked to answer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.plans: list[Any] = []

    def stream(self, plan: Any, *args: Any) -> Any:
        self.plans.append(plan)
        return super().stream(plan, *args)


def recorded(window: int, **options: Any) -> tuple[Recorder, ConceptSynthesizer]:
    own = library(window)
    generator = Recorder(own.llm, SHORT)
    return generator, ConceptSynthesizer(own, generator, generation=SHORT, **options)


def prompt_text(plan: Any) -> str:
    ids = [i for span in plan.spans if isinstance(span, TextSpan) for i in span.ids]
    return str(toy.tokenizer().decode(ids))


@pytest.mark.parametrize("mode", ["concepts", "text"])
async def test_compact_reads_everything_in_several_prompts(mode: str) -> None:
    window = 460 if mode == "text" else 340
    generator, made = recorded(window, response_mode="compact", mode=mode)
    response = made.synthesize(QUESTION, nodes(6))
    account = response.metadata["compllm"]
    assert sorted(ids(response)) == [f"n{i}" for i in range(6)] and account["dropped"] == []
    assert 1 < len(generator.plans) == account["prompts"] < 6
    assert {facts["used"] for facts in account["nodes"].values()} == {mode}
    if mode == "concepts":
        assert all(any(isinstance(span, ConceptSpan) for span in plan.spans) for plan in generator.plans)
    assert account["prompt_positions"] == sum(plan.positions for plan in generator.plans)
    assert account["ttft_s"] > account["prefill_s"] > 0
    # Each prompt but the first holds the answer so far, which is that of the prompt before it.
    before = generator.generate([generator.plans[0]])[0].text
    assert f"Answer from earlier passages: {before[:8]}" in prompt_text(generator.plans[1])
    assert "earlier passages" not in prompt_text(generator.plans[0])
    for answer, other in await every_way(nodes(6), window, mode=mode, response_mode="compact"):
        assert answer == str(response)
        assert ids(other) == ids(response)
        assert other.metadata["compllm"]["new_tokens"] == account["new_tokens"] > SHORT.max_new_tokens


def test_compact_is_one_prompt_where_all_fits() -> None:
    one, other = synthesizer().synthesize(QUESTION, nodes()), synthesizer(response_mode="compact")
    response = other.synthesize(QUESTION, nodes())
    assert str(response) == str(one)
    assert response.metadata["compllm"]["prompts"] == 1


def test_refine_takes_a_prompt_for_each_passage_and_the_users_template() -> None:
    template = PromptTemplate("So far: {existing_answer}. New: {context_msg} Asked: {query_str}")
    generator, made = recorded(2048, response_mode=ResponseMode.REFINE, refine_template=template)
    response = made.synthesize(QUESTION, nodes())
    assert len(generator.plans) == 3
    assert ids(response) == ["n0", "n1", "n2"]
    assert all("So far: " in prompt_text(plan) for plan in generator.plans[1:])
    assert "So far: " not in prompt_text(generator.plans[0])
    assert made.get_prompts()["refine_template"] == template
    made.update_prompts({"refine_template": PromptTemplate("{existing_answer} {context_msg} {query_str} NEW")})
    made.synthesize(QUESTION, nodes())
    assert "NEW" in prompt_text(generator.plans[-1])


def test_overflow_error_counts_what_fits_no_prompt() -> None:
    found = [*nodes(6), node("long", toy.TEXT * 20)]
    with pytest.raises(PromptTooLongError, match=r"1 of 7.*long"):
        synthesizer(340, response_mode="compact", overflow="error").synthesize(QUESTION, found)
    assert synthesizer(340, response_mode="compact", overflow="error").synthesize(QUESTION, nodes(6)).source_nodes
    assert synthesizer(340, response_mode="compact").synthesize(QUESTION, found).metadata["compllm"]["dropped"] == [
        "long"
    ]
    with pytest.raises(PromptTooLongError, match="passages"):
        synthesizer(340, overflow="error").synthesize(QUESTION, nodes(6))


@pytest.mark.parametrize("name", ["no_text", "context_only"])
async def test_modes_that_run_no_llm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalGenerator, "stream", lambda *args: pytest.fail("the LLM was run"))
    for answer, response in await every_way(nodes(), 340, response_mode=name):
        assert ids(response) == ["n0", "n1", "n2"]
        assert response.metadata["compllm"]["prompts"] == 0
        assert response.metadata["n1"] == {"title": "T1"}
        if name == "context_only":
            assert all(paragraph.strip() in answer for paragraph in PARAGRAPHS)
    given: Any = synthesizer(340, response_mode=name).get_response(QUESTION, ["one", "two"])
    assert given == ("" if name == "no_text" else "one\n\ntwo")


@pytest.mark.parametrize(
    "name", ["tree_summarize", "accumulate", "compact_accumulate", "generation", "compct", ResponseMode.ACCUMULATE]
)
def test_other_modes_are_refused_by_name(name: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"{getattr(name, 'value', name)}.*compact, refine, no_text"):
        synthesizer(response_mode=name)


@pytest.mark.parametrize("options", [{"mode": "tokens"}, {"missing": "skip"}, {"overflow": "cut"}])
def test_settings_that_are_none_are_refused(options: dict[str, Any]) -> None:
    [(name, value)] = options.items()
    with pytest.raises(ConfigurationError, match=f"{name}.*{value}"):
        synthesizer(**options)


async def test_an_empty_retrieval_has_an_account() -> None:
    for answer, response in await every_way([], 2048):
        assert answer == "Empty Response"
        account = response.metadata["compllm"]
        assert account["prompts"] == account["prompt_positions"] == account["new_tokens"] == account["kv_bytes"] == 0
        assert account["nodes"] == {} and account["dropped"] == []
        assert account["store"] == {"hits": 0, "misses": 0}
    full = set(synthesizer().synthesize(QUESTION, nodes()).metadata["compllm"])
    assert set(account) == full
