"""Read policies and budgets in engines: what is decided, kept, told, and refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from llama_index.core import Document, PromptTemplate
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.schema import NodeWithScore, QueryBundle

import toy
from compllm_rag import ConceptIndex, GenerationConfig, MemoryStore
from compllm_rag.errors import (
    ConfigurationError,
    NotCalibratedError,
    PromptTooLongError,
    RateOutOfReachError,
    ReadBudgetError,
)
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.planner import Planner
from compllm_rag.llamaindex.synthesizer import ConceptSynthesizer
from compllm_rag.prompt import ConceptSpan, TextSpan
from compllm_rag.reading.budgeted import BudgetedReadPolicy
from compllm_rag.reading.choice import Candidate, FixedReadPolicy, Reading, ReadSpec
from compllm_rag.reading.relevance import Weights
from tests.faults.fault_samples import documents
from tests.llamaindex.test_synthesizer import nodes
from tests.reading.read_samples import compressor
from toy_embedder import HashEmbedder
from trained import trained_deep

QUESTION = "When did Marsh die?"
SHORT = GenerationConfig(max_new_tokens=6)


@pytest.fixture(scope="module", params=["deep", "input"])
def library(request: pytest.FixtureRequest) -> ConceptLibrary:
    made = compressor(request.param)
    out = ConceptLibrary(made, MemoryStore(made.spec.width), rate=2.0, also_rates=(1.0,))
    out.ensure(n.node.get_content() for n in nodes())
    return out


@pytest.fixture(scope="module")
def index() -> ConceptIndex:
    made = ConceptIndex.create(
        None, compressor=compressor("deep"), embedder=HashEmbedder(), chunk_size=60, rate=1.0, generation=SHORT
    )
    made.ingest(documents())
    return made


def equal_spans(one: Any, other: Any) -> bool:
    if isinstance(one, TextSpan):
        return bool(one == other)
    places = one.places is other.places or torch.equal(one.places, other.places)
    return places and torch.equal(one.concepts, other.concepts) and one.extent == other.extent


@pytest.mark.parametrize("mode", ["concepts", "text"])
def test_the_fixed_policy_is_what_is_done_without_any(library: ConceptLibrary, mode: Any) -> None:
    plain = Planner(library, mode=mode).plan(QUESTION, nodes(), 2000)
    assert "read_policy" not in plain.account() and "parts" not in plain.account()["nodes"]["n0"]
    for policy in ("fixed", FixedReadPolicy(), FixedReadPolicy(mode)):
        chosen = Planner(library, mode=mode, reading={"read_policy": policy}).plan(QUESTION, nodes(), 2000)
        assert len(chosen.plan.spans) == len(plain.plan.spans)
        assert all(map(equal_spans, plain.plan.spans, chosen.plan.spans))
        assert chosen.cost == plain.cost
        for mine, theirs in zip(chosen.facts, plain.facts, strict=True):
            assert mine.account() | theirs.account() == mine.account()
    assert plain.plan.passages == chosen.plan.passages


def test_a_budget_is_kept_and_told(library: ConceptLibrary) -> None:
    whole = Planner(library, mode="text").plan(QUESTION, nodes(), 2000)
    limit = sum(facts.positions for facts in whole.facts) // 3
    planned = Planner(library, reading={"position_budget": limit}).plan(QUESTION, nodes(), 2000)
    account = planned.account()
    json.dumps(account)
    told = account["read_policy"]
    assert told["name"] == "budgeted" and told["budget"] == {"position_budget": limit}
    assert sum(f["positions"] for f in account["nodes"].values()) == told["taken"]["position_budget"] <= limit
    assert {*account["nodes"], *told["left_out"]} == {"n0", "n1", "n2"} and account["dropped"] == []
    for name, facts in account["nodes"].items():
        parts = facts["parts"]
        assert [p["start"] for p in parts] == [0, *(p["end"] for p in parts)][:-1]
        assert parts[-1]["end"] == facts["n_tokens"] and name not in told["left_out"]
        spans = [s for s in planned.plan.spans if s.passage == [*account["nodes"]].index(name)]
        assert facts["n_text"] == sum(len(s) for s in spans if isinstance(s, TextSpan))
        assert facts["n_concepts"] == sum(len(s) for s in spans if isinstance(s, ConceptSpan))
    for gone in told["left_out"].values():
        assert gone["why"] and {part["used"] for part in gone["parts"]} == {"left out"}


def test_the_cost_is_counted_beside_the_whole_text_of_what_is_read(library: ConceptLibrary) -> None:
    planned = Planner(library, reading={"prefill_budget": 60}).plan(QUESTION, nodes(), 2000)
    depth, upper = library.spec.depth, library.spec.depth - library.spec.config.entry_layer
    concepts = sum(f.n_concepts for f in planned.facts)
    tokens = planned.plan.positions - concepts
    assert planned.cost.passed == tokens * depth + concepts * upper
    text = tokens + sum(f.n_tokens - f.n_text for f in planned.facts)
    assert planned.cost.as_text == text * depth


def test_a_narrowed_prompt_is_counted_as_its_account_does() -> None:
    made = compressor("deep")
    of = ConceptLibrary(made, MemoryStore(made.spec.width))
    read = {}
    for narrowing in (None, "3:0.25"):
        planned = Planner(of, reading={"prefill_budget": 60, "narrowing": narrowing}).plan(QUESTION, nodes(), 2000)
        own = planned.plan.positions - sum(facts.positions for facts in planned.facts)
        taken = planned.read_policy["taken"]["prefill_budget"]
        assert taken == pytest.approx(planned.cost.passed / 4 - own) and taken <= 60
        read[narrowing] = sum(facts.n_concepts for facts in planned.facts)
    assert read[None] < read["3:0.25"]


async def test_asked_streamed_and_asynchronous_it_decides_the_same(index: ConceptIndex) -> None:
    options = {"similarity_top_k": 4, "prefill_budget": 60}
    plain = index.as_query_engine(**options).query(QUESTION)
    account = plain.metadata["compllm"]
    assert account["read_policy"]["taken"]["prefill_budget"] <= 60
    assert [n.node.node_id for n in plain.source_nodes] == [*account["nodes"]]
    streamed = index.as_query_engine(streaming=True, **options).query(QUESTION)
    assert "".join(streamed.response_gen) == str(plain)
    awaited = await index.as_query_engine(**options).aquery(QUESTION)
    astreamed = await index.as_query_engine(streaming=True, **options).aquery(QUESTION)
    assert "".join([piece async for piece in astreamed.async_response_gen()]) == str(plain) == str(awaited)
    for other in (streamed, awaited, astreamed):
        theirs = other.metadata["compllm"]
        assert theirs["nodes"] == account["nodes"] and theirs["read_policy"] == account["read_policy"]
    cited = index.as_citation_engine(**options).query(QUESTION).metadata["compllm"]
    assert cited["read_policy"]["taken"]["prefill_budget"] <= 60


def test_relevance_by_states_is_an_option_of_engines(index: ConceptIndex) -> None:
    options = {"similarity_top_k": 4, "prefill_budget": 60, "relevance": "maxsim"}
    account = index.as_query_engine(**options).query(QUESTION).metadata["compllm"]
    json.dumps(account)
    told = account["read_policy"]["relevance"]
    assert told["signal"] == "maxsim" and told["by_words"] == {} and told["question_s"] > 0
    named = BudgetedReadPolicy(relevance="maxsim")
    same = index.as_query_engine(similarity_top_k=4, prefill_budget=60, read_policy=named).query(QUESTION)
    assert same.metadata["compllm"]["nodes"] == account["nodes"]
    turn = index.as_chat_engine("context", **options).chat(QUESTION)
    assert turn.metadata["compllm"]["read_policy"]["relevance"]["signal"] == "maxsim"


def test_a_relevance_cutoff_is_an_option_of_engines(index: ConceptIndex) -> None:
    options = {"similarity_top_k": 4, "prefill_budget": 500}
    whole, cut = (
        index.as_query_engine(**options, **more).query(QUESTION).metadata["compllm"]
        for more in ({"relevance_cutoff": 0.0}, {"relevance_cutoff": 1.0})
    )
    assert not whole["read_policy"]["left_out"], "there is room for all"
    assert cut["read_policy"]["taken"]["prefill_budget"] < whole["read_policy"]["taken"]["prefill_budget"] / 2
    assert "too far behind the likeliest" in json.dumps(cut["read_policy"]["left_out"])
    named = BudgetedReadPolicy(weights=Weights(least=1.0))
    same = index.as_query_engine(**options, read_policy=named).query(QUESTION)
    assert same.metadata["compllm"]["nodes"] == cut["nodes"]


def test_relevance_by_states_wants_states(library: ConceptLibrary) -> None:
    reading = {"prefill_budget": 60, "relevance": "bm25+maxsim"}
    if library.spec.config.deep:
        account = Planner(library, reading=reading).plan(QUESTION, nodes(), 2000).account()
        assert account["read_policy"]["relevance"]["signal"] == "bm25+maxsim"
        return
    with pytest.raises(ConfigurationError, match="max-sim compares states.*concepts at the input embeddings"):
        Planner(library, reading=reading)


def test_a_policy_of_ones_own_decides(library: ConceptLibrary) -> None:
    class FirstAsText:
        name = "first as text"

        def choose(self, query: str, found: Sequence[Candidate], spec: ReadSpec) -> list[Reading]:
            assert (query, [n.id for n in found]) == (QUESTION, ["n0", "n1", "n2"])
            assert found[0].title == "T0" and found[0].around > 5 and found[1].score == 0.75
            uses = ["text", "left out", "concepts"]
            return [Reading.whole(node, use, why="because") for node, use in zip(found, uses, strict=True)]  # type: ignore[arg-type]

    response = ConceptSynthesizer(library, generation=SHORT, read_policy=FirstAsText()).synthesize(QUESTION, nodes())
    account = response.metadata["compllm"]
    assert {name: facts["used"] for name, facts in account["nodes"].items()} == {"n0": "text", "n2": "concepts"}
    assert account["read_policy"]["left_out"]["n1"]["why"] == "because"
    assert account["nodes"]["n0"]["why"] == "because" and account["read_policy"]["budget"] == {}


def test_nothing_is_answered_from_no_passage(library: ConceptLibrary) -> None:
    class Nothing:
        name = "nothing"

        def choose(self, query: str, found: Sequence[Candidate], spec: ReadSpec) -> list[Reading]:
            return [Reading.whole(node, "left out") for node in found]

    with pytest.raises(ReadBudgetError, match="nothing left all 3 passages out"):
        ConceptSynthesizer(library, generation=SHORT, read_policy=Nothing()).synthesize(QUESTION, nodes())


@pytest.mark.parametrize("rate", [1.0, 2.0, 3.0])
def test_another_rate_is_read_stored_or_not(library: ConceptLibrary, rate: float) -> None:
    planned = Planner(library, reading={"rate": rate}).plan(QUESTION, nodes(), 2000)
    alone = ConceptLibrary(library.compressor, MemoryStore(library.spec.width), rate=rate)
    alone.ensure(n.node.get_content() for n in nodes())
    theirs = Planner(alone).plan(QUESTION, nodes(), 2000)
    assert [f.n_concepts for f in planned.facts] == [f.n_concepts for f in theirs.facts]
    for mine, other in zip(planned.plan.spans, theirs.plan.spans, strict=True):
        if isinstance(mine, ConceptSpan):
            torch.testing.assert_close(mine.concepts, other.concepts, atol=2e-3, rtol=2e-3)
    before = library.store.stats().records
    assert library.store.stats().records == before  # a question writes nothing
    assert library.passage(nodes()[0].node.get_content()).rate == 2.0


def test_other_rates_follow_the_policy_of_missing_concepts() -> None:
    made = compressor("deep")
    library = ConceptLibrary(made, MemoryStore(made.spec.width), rate=1.0)
    library.ensure(n.node.get_content() for n in nodes())
    facts = Planner(library, missing="text", reading={"rate": 2.0}).plan(QUESTION, nodes(), 2000).facts
    assert {f.used for f in facts} == {"text"} and all(f.misses for f in facts)
    facts = Planner(library, reading={"rate": 2.0}).plan(QUESTION, nodes(), 2000).facts
    assert {f.used for f in facts} == {"concepts"} and all(f.misses for f in facts)
    again = Planner(library, missing="text", reading={"rate": 2.0}).plan(QUESTION, nodes(), 2000).facts
    assert {f.used for f in again} == {"concepts"} and not any(f.misses for f in again)  # they stayed in memory


def test_text_is_read_where_that_is_sooner_and_counted(library: ConceptLibrary) -> None:
    empty = ConceptLibrary(library.compressor, MemoryStore(library.spec.width), rate=1.0)
    empty.ensure([nodes()[0].node.get_content()])
    account = Planner(empty, missing="auto").plan(QUESTION, nodes(), 2000).account()
    assert [facts["used"] for facts in account["nodes"].values()] == ["concepts", "text", "text"]
    assert account["bypassed"] == 2 and account["compress_s"] == 0
    assert "making and reading them takes about" in account["nodes"]["n1"]["why"]
    assert "why" not in account["nodes"]["n0"]
    assert Planner(empty).plan(QUESTION, nodes(), 2000).account()["bypassed"] == 0


@pytest.mark.parametrize("policy", ["budgeted", "fixed"])
def test_nothing_is_bought_that_the_window_has_no_room_for(library: ConceptLibrary, policy: str) -> None:
    planner = Planner(library, reading={"position_budget": 150, "read_policy": policy})
    free = planner.plan(QUESTION, nodes(), 2000)
    assert len(free.nodes) > 1 and not free.dropped
    for less in (1, 15, 40):
        window = free.plan.extent - less  # what was bought would not fit: its last passage would be dropped
        planned = planner.plan(QUESTION, nodes(), window)
        assert planned.plan.extent <= window and not planned.dropped, "before, a passage was bought and dropped"
        left_out = planned.account()["read_policy"]["left_out"]
        assert {node.node.node_id for node in planned.nodes} | set(left_out) == {"n0", "n1", "n2"}
        if policy == "fixed":
            said = {gone["why"] for gone in left_out.values()}
            assert said == {"does not fit the window of the LLM beside the passages before it"}
    # Who asks for an error is not spared it.
    strict = Planner(library, overflow="error", reading={"position_budget": 150, "read_policy": policy})
    with pytest.raises(PromptTooLongError, match="do not fit the window"):
        strict.plan(QUESTION, nodes(), free.plan.extent - 1)
    with pytest.raises(ReadBudgetError, match="fits the window of the LLM: got 9 positions.*at least") as caught:
        planner.plan(QUESTION, nodes(), free.plan.extent - sum(s.extent for s in _passages(free)) + 9)
    if policy == "budgeted":
        least = int(str(caught.value).split("at least ")[1].split(":")[0])
        bare = free.plan.extent - sum(s.extent for s in _passages(free))
        assert planner.plan(QUESTION, nodes(), bare + least).nodes
        with pytest.raises(ReadBudgetError):
            planner.plan(QUESTION, nodes(), bare + least - 1)


def _passages(planned: Any) -> list[Any]:
    """Spans of all passages, their numbers and titles included: what stands between the first body and the last."""
    spans = list(planned.plan.spans)
    bodies = [i for i, span in enumerate(spans) if span.passage is not None]
    return spans[bodies[0] - 1 : bodies[-1] + 2]


def test_concepts_of_what_a_guard_kept_as_text_are_refused() -> None:
    class Pressing:
        name = "pressing"

        def choose(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Reading]:
            return [Reading.whole(node, "concepts") for node in nodes]

    compressor = trained_deep(toy.llm(layers=4))
    with ConceptIndex.create(None, compressor=compressor, embedder=HashEmbedder(), guard="exact") as index:
        index.ingest([Document(text="4711 0815 3.1415 2.7182 1.4142 " * 4)])
        with pytest.raises(ConfigurationError, match="concepts that are not there.*kept as text"):
            index.as_query_engine(read_policy=Pressing()).query("Which number?")
        assert index.as_query_engine().query("Which number?").metadata["compllm"]["nodes"]


def test_in_a_chat_a_budget_holds_for_the_passages_of_a_turn(index: ConceptIndex) -> None:
    engine = index.as_chat_engine("context", position_budget=70, similarity_top_k=4)
    for message in (QUESTION, "Who wrote?", "And why?"):
        account = engine.chat(message).metadata["compllm"]
        assert account["read_policy"]["taken"]["position_budget"] <= 70
        assert sum(f["positions"] for f in account["nodes"].values()) <= 70
    assert account["turns"] == 2
    # what is found and not read takes nothing from the conversation
    said = [(("user", f"Who {n}?"), ("assistant", "Ada.")) for n in range(8)]
    history = [ChatMessage(role=role, content=text) for turn in said for role, text in turn]
    for top_k in (2, 20):
        account = (
            index.as_chat_engine("context", position_budget=70, similarity_top_k=top_k, chat_history=list(history))
            .chat(QUESTION)
            .metadata["compllm"]
        )
        assert (account["turns"], account["turns_dropped"], account["dropped"]) == (8, 0, [])
        assert account["read_policy"]["taken"]["position_budget"] <= 70
    with pytest.raises(ReadBudgetError):
        index.as_chat_engine("context", position_budget=2).chat(QUESTION)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"read_policy": "clever"}, ConfigurationError, "no such read policy.*fixed, budgeted"),
        ({"read_policy": BudgetedReadPolicy}, ConfigurationError, "no such read policy"),
        ({"read_policy": 3}, ConfigurationError, "no such read policy"),
        ({"relevance": "colbert", "prefill_budget": 60}, ConfigurationError, "no such relevance"),
        ({"relevance": "maxsim", "read_policy": "fixed"}, ConfigurationError, "belongs to the budgeted"),
        ({"relevance_cutoff": 1.5, "prefill_budget": 60}, ConfigurationError, "a share, from 0 to 1"),
        ({"relevance_cutoff": 0.5, "read_policy": "fixed"}, ConfigurationError, "relevance_cutoff belongs to the"),
        ({"position_budget": 0}, ConfigurationError, "position_budget makes no sense"),
        ({"prefill_budget": 0.25}, ConfigurationError, "it is no share"),
        ({"ttft_budget_s": 0.5}, NotCalibratedError, "compllm-rag calibrate"),
        ({"position_budget": 50, "choose": lambda node: "text"}, ConfigurationError, "leave choose out"),
        ({"position_budget": 50, "response_mode": "compact"}, ConfigurationError, "decides for one prompt"),
        ({"read_policy": "fixed", "response_mode": "refine"}, ConfigurationError, "decides for one prompt"),
        ({"rate": 2, "mode": "text"}, ConfigurationError, "text has no compression rate"),
        ({"rate": 0.5}, ConfigurationError, "at least 1"),
        ({"rate": 500}, RateOutOfReachError, "at most"),
        ({"missing": "guess"}, ConfigurationError, "unknown missing.*auto"),
        ({"reading": {}}, ConfigurationError, "no such option.*position_budget"),
    ],
)
def test_what_makes_no_sense_is_refused(
    index: ConceptIndex, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        index.as_query_engine(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefil_budget": 60}, "no such option: got prefil_budget"), ({"similarity_top_k": 2}, "got similarity_top_k"),
        ({"rate": "auto"}, "a rate that is a number: got 'auto'"), ({"rate": True}, "got True"),
        ({"relevance_cutoff": "0.8"}, "relevance_cutoff is no number"),
        ({"generation": {"max_new_tokens": 5}}, "no settings of an answer: got a dict"),
        ({"mode": "text", "rate": "2"}, "got '2'"),
    ],
)  # fmt: skip
def test_a_synthesizer_refuses_what_it_would_not_heed(
    index: ConceptIndex, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        index.as_synthesizer(**options)


def test_a_number_of_numpy_is_a_rate(index: ConceptIndex) -> None:
    answers = [index.as_query_engine(rate=rate, similarity_top_k=1).query(QUESTION) for rate in (np.int64(2), 2.0)]
    one, other = ([*answer.metadata["compllm"]["nodes"].values()] for answer in answers)
    assert [facts["n_concepts"] for facts in one] == [facts["n_concepts"] for facts in other]
    assert all(0 < facts["n_concepts"] < facts["n_tokens"] for facts in one)


def test_what_two_passages_share_is_counted_once() -> None:
    """Two nodes of one text, whose concepts are missing: they are compressed once."""
    made = compressor("deep")
    out = ConceptLibrary(made, MemoryStore(made.spec.width), rate=1.0)
    node = nodes()[0].node
    twice = [NodeWithScore(node=node.model_copy(update={"id_": name}), score=1.0) for name in ("a", "b")]
    planned = Planner(out, reading={"position_budget": 900, "read_policy": "fixed"}).plan(QUESTION, twice, 2000)
    first, second = planned.facts
    assert first.misses == len(out.passage(node.get_content()).keys) and second.misses == second.hits == 0
    assert planned.layout_s >= 0 and planned.compress_s > 0


def test_what_is_found_out_with_the_question(index: ConceptIndex) -> None:
    with pytest.raises(ConfigurationError, match="nothing to spend"):
        index.as_query_engine(read_policy="budgeted").query(QUESTION)
    with pytest.raises(ConfigurationError, match="nothing to spend"):
        index.as_query_engine(relevance="maxsim").query(QUESTION)
    with pytest.raises(ReadBudgetError, match="position_budget of at least") as caught:
        index.as_query_engine(position_budget=3).query(QUESTION)
    assert isinstance(caught.value, PromptTooLongError)
    least = int(str(caught.value).split("at least ")[1].split(":")[0])
    assert index.as_query_engine(position_budget=least).query(QUESTION).source_nodes
    template = PromptTemplate("{context_str}{query_str}", function_mappings={"context_str": lambda **given: "x"})
    with pytest.raises(ConfigurationError, match="cannot see concepts"):
        index.as_query_engine(mode="text", position_budget=50, text_qa_template=template)


def test_a_measured_machine_keeps_a_time(index: ConceptIndex) -> None:
    costs = index.calibrate(seconds=0.1)
    engine = index.as_query_engine(similarity_top_k=4, ttft_budget_s=60)
    told = engine.query(QUESTION).metadata["compllm"]["read_policy"]
    assert told["budget"] == {"ttft_budget_s": 60} and not told["left_out"]
    with pytest.raises(ReadBudgetError, match="ttft_budget_s of at least"):
        index.as_query_engine(ttft_budget_s=1e-6).query(QUESTION)
    bundle = QueryBundle(QUESTION)
    given = index.as_synthesizer(ttft_budget_s=60, costs=costs).synthesize(bundle, engine.retriever.retrieve(QUESTION))
    assert given.metadata["compllm"]["read_policy"]["budget"] == {"ttft_budget_s": 60}
