"""Max-sim: its arithmetic, the question's states, and what it judges passages by where there is nothing to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from compllm_rag.compression.rate_policies.choosing import chooser_of
from compllm_rag.compression.rate_policies.measures import TextMeasures
from compllm_rag.config import IngestConfig
from compllm_rag.errors import ConfigurationError, ReadBudgetError
from compllm_rag.library import ConceptLibrary
from compllm_rag.reading.budget import ReadBudget
from compllm_rag.reading.budgeted import BudgetedReadPolicy
from compllm_rag.reading.choice import Candidate, Reading, ReadSpec
from compllm_rag.reading.maxsim import cosines, max_sim, of_sentences
from compllm_rag.reading.passages import PassageReading, Retrieved
from compllm_rag.reading.sentences import Sentence
from compllm_rag.reading.signals import SIGNALS, Fused, Judged, MaxSim, Words, signal_named
from compllm_rag.reading.states import question_states
from compllm_rag.store.encodings import deep_encoding
from compllm_rag.store.memory import MemoryStore
from tests.reading.read_samples import PARTS, QUESTION, compressor, decided, learned_library, library, retrieved
from tests.reading.test_budgeted import COSTS


@dataclass
class Noting:
    """A policy that notes what a signal says."""

    signal: Any
    judged: list[Judged] = field(default_factory=list)
    name: str = "noting"

    def choose(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Reading]:
        self.judged = self.signal.judge(query, nodes, spec)
        return [Reading.whole(node, "left out") for node in nodes]


def judged(of: ConceptLibrary, signal: Any, question: str = QUESTION, **options: Any) -> tuple[list[Judged], Any]:
    """What a signal says of the parts, and what it wants told."""
    policy = Noting(signal)
    queued = options.pop("queued", ())
    found = PassageReading(of, policy, ReadBudget(), **options).read(question, retrieved(), 30, queued)
    return policy.judged, found.told.get("relevance")


def test_a_common_mean_and_a_loud_dimension_decide_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    passages = [torch.randn(n, 16, generator=generator) for n in (30, 20)]
    asked = torch.stack([passages[0][7], passages[1][3]]) + 0.05 * torch.randn(2, 16, generator=generator)
    loud = torch.ones(16)
    loud[2] = 500.0
    away = 40 * torch.ones(16)
    near = cosines(asked * loud + away, [states * loud + away for states in passages])
    assert [tuple(each.shape) for each in near] == [(2, 30), (2, 20)]
    both = torch.cat(near, 1)
    assert both.argmax(1).tolist() == [7, 33] and bool((both.abs() <= 1 + 1e-5).all())
    torch.testing.assert_close(both, torch.cat(cosines(asked, passages), 1), atol=1e-3, rtol=1e-3)
    every = np.concatenate([states.numpy() for states in passages])
    mine, theirs = ((x - every.mean(0)) / every.std(0) for x in (asked.numpy(), every))
    expected = mine @ theirs.T / np.outer(np.linalg.norm(mine, axis=1), np.linalg.norm(theirs, axis=1))
    np.testing.assert_allclose(torch.cat(cosines(asked, passages), 1).numpy(), expected, atol=1e-5)


def test_a_single_state_and_dimensions_that_never_vary_are_no_trouble() -> None:
    assert not torch.cat(cosines(torch.ones(2, 4), [torch.ones(1, 4)])).isnan().any()
    dull = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    dull[:, 1] = 3.0
    assert not torch.cat(cosines(torch.randn(2, 4), [dull])).isnan().any()


def test_each_token_of_the_question_counts_its_closest_state() -> None:
    near = torch.tensor([[0.1, 0.9, 0.3, -0.2], [0.5, 0.0, 0.7, 0.6]])
    assert max_sim(near) == pytest.approx(0.8)
    assert max_sim(near[:, :0]) is None and max_sim(near[:0]) is None
    sentences = [Sentence(0, 4, "a"), Sentence(4, 9, "b"), Sentence(9, 12, "c")]
    found = of_sentences(near, torch.tensor([1, 3, 9, 11]), sentences)
    assert found == [pytest.approx(0.7), None, pytest.approx(0.5)]


def test_the_questions_states_are_those_of_the_llm_behind_the_opening() -> None:
    of = library()
    llm, config = of.llm, of.spec.config
    states = question_states(of, QUESTION)
    ids = [*config.opening, *llm.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]]
    with torch.inference_mode():
        whole = llm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[config.entry_layer]
    torch.testing.assert_close(states, whole[0, len(config.opening) :].float(), atol=1e-5, rtol=1e-4)
    assert question_states(of, "").shape == (0, llm.hidden_size)


def test_a_sentence_asked_word_by_word_is_the_closest() -> None:
    of = library()
    cut = PassageReading(of, Noting(Words()), ReadBudget()).candidate(1, retrieved()[1]).sentences
    for number, sentence in enumerate(cut[:2]):
        found, told = judged(of, MaxSim(), sentence.text)
        shares = {(p, s): share for p, one in enumerate(found) for s, share in enumerate(one.sentences)}
        assert max(shares, key=shares.__getitem__) == (1, number) and shares[1, number] == found[1].passage == 1.0
        assert all(0 <= share <= 1 for one in found for share in (one.passage, *one.sentences))
        assert told["signal"] == "maxsim" and told["question_tokens"] > 3 and told["by_words"] == {}
        assert found[1].whys[number] == "1.00 near to the question"


def test_sentences_without_a_kept_token_are_told() -> None:
    found, _ = judged(library(rate=20.0), MaxSim())
    pairs = [pair for one in found for pair in zip(one.sentences, one.whys, strict=True)]
    missing = [share for share, why in pairs if why == "no concept of it is kept"]
    assert missing and set(missing) == {0.0} and len(missing) < len(pairs)


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_coarse_storages_say_nearly_the_same(encoding: str) -> None:
    made, fine = compressor("deep"), judged(library(), MaxSim())[0]
    of = ConceptLibrary(made, MemoryStore(made.spec.width, encoding=deep_encoding(encoding)), rate=1.0)
    of.ensure(PARTS)
    coarse, told = judged(of, MaxSim())
    assert told["by_words"] == {}
    for mine, theirs in zip(coarse, fine, strict=True):
        assert mine.sentences == pytest.approx(theirs.sentences, abs=0.15)


def test_passages_without_concepts_are_judged_by_their_words_and_nothing_is_made() -> None:
    empty = library(fill=False)
    found, told = judged(empty, MaxSim())
    assert found == judged(empty, Words())[0]
    assert told["by_words"] == {f"n{i}": "its concepts are not stored" for i in range(len(PARTS))}
    assert not any(any(empty.at_hand(text)) for text in PARTS)
    found, told = judged(library(), MaxSim(), queued={"n1"})
    words = judged(library(), Words())[0]
    assert told["by_words"] == {"n1": "its concepts are in the making"}
    assert found[1] == words[1] and found[0] != words[0]
    assert judged(library(), MaxSim(), mode="text")[1]["by_words"] == {}, "what is stored can be compared all the same"


def test_what_a_guard_keeps_as_text_is_judged_by_its_words() -> None:
    made, numbers = compressor("deep"), "17 38 42 91 5 66 7 81 3 19 27 44 58 60 72 83 95 12 34 56."
    chooser = chooser_of(
        IngestConfig(rate=1.0, guard="exact"),
        measures=TextMeasures(lambda: made),
        longest_unit=made.config.longest_unit,
    )
    of = ConceptLibrary(made, MemoryStore(made.spec.width), rate=chooser)
    of.ensure([*PARTS, numbers])
    found = PassageReading(of, BudgetedReadPolicy(relevance="maxsim"), ReadBudget(positions=90)).read(
        QUESTION, [Retrieved("table", numbers), *retrieved()], 30
    )
    assert found.told["relevance"]["by_words"] == {"table": "kept as text by the guard"}


def test_a_question_without_tokens_compares_nothing() -> None:
    found, told = judged(library(), MaxSim(), "")
    assert set(told["by_words"].values()) == {"the question has no token"} and told["question_tokens"] == 0
    assert found == judged(library(), Words(), "")[0]


def test_fusion_goes_by_ranks() -> None:
    of = library()
    words, states, both = (judged(of, signal)[0] for signal in (Words(), MaxSim(), Fused()))
    flat = [[share for one in found for share in one.sentences] for found in (words, states, both)]
    ranks = [[1 + sum(y > x for y in row) + (row.count(x) - 1) / 2 for x in row] for row in flat]
    added = np.array([1 / (60 + a) + 1 / (60 + b) for a, b in zip(*ranks[:2], strict=True)])
    np.testing.assert_allclose(flat[2], (added - added.min()) / (added.max() - added.min()), atol=1e-9)
    best = max(range(len(flat[0])), key=flat[2].__getitem__)
    whys = [why for one in both for why in one.whys]
    assert "near to the question" in whys[best]
    assert judged(of, Fused())[1]["signal"] == "bm25+maxsim"


@pytest.mark.parametrize("name", list(SIGNALS))
def test_the_policy_judges_by_any_and_tells_it(name: str) -> None:
    of = learned_library() if name == "learned" else library()
    found = decided(of, BudgetedReadPolicy(relevance=name), {"prefill": 40})
    assert found.told["relevance"]["signal"] == name and found.taken["prefill_budget"] <= 40
    assert any(not one.reading.left_out for one in found.passages)
    default = decided(library(), BudgetedReadPolicy(), {"prefill": 40})
    assert default.told["relevance"] == {"signal": "bm25"}
    assert ([p.reading for p in found.passages] == [p.reading for p in default.passages]) == (name == "bm25")


def test_a_time_pays_for_the_question_as_well() -> None:
    limit = {"ttft_s": 0.12, "costs": COSTS}
    plain = decided(library(), BudgetedReadPolicy(text=False, relevance="bm25"), limit)
    found = decided(library(), BudgetedReadPolicy(text=False, relevance="maxsim"), limit)
    n = found.told["relevance"]["question_tokens"]  # the opening in front of it is kept
    concepts = sum(len(span) for one in found.passages for span in one.spans)
    around = 5 * sum(not one.reading.left_out for one in found.passages)
    expected = COSTS.lower(n) + 1.05 * COSTS.prefill_s(30 + around, concepts)
    assert found.taken["ttft_budget_s"] == pytest.approx(expected) and expected <= 0.12
    assert plain.taken["ttft_budget_s"] <= 0.12


def test_a_prefill_pays_for_the_question_as_well() -> None:
    spec, limit = library().spec, {"prefill": 40}
    found = decided(library(), BudgetedReadPolicy(text=False, relevance="maxsim"), limit)
    half = spec.config.entry_layer / spec.depth
    beside = half * found.told["relevance"]["question_tokens"]
    concepts = sum(len(span) for one in found.passages for span in one.spans)
    around = 5 * sum(not one.reading.left_out for one in found.passages)
    assert beside > 0 and found.taken["prefill_budget"] == pytest.approx(beside + around + (1 - half) * concepts)
    with pytest.raises(ReadBudgetError, match="at least 1[0-9]"):
        decided(library(), BudgetedReadPolicy(text=False, relevance="maxsim"), {"prefill": 1 + beside})


def test_what_cannot_be_compared_is_refused() -> None:
    for name in ("maxsim", "bm25+maxsim"):
        with pytest.raises(ConfigurationError, match="deep concepts, next step|deep concepts") as caught:
            PassageReading(library("input"), BudgetedReadPolicy(relevance=name), ReadBudget(positions=90))
        assert "concepts at the input embeddings" in str(caught.value) and "--codec deep" in str(caught.value)
    with pytest.raises(ConfigurationError, match="input embeddings"):
        judged(library("input"), MaxSim())  # a policy that does not say that it needs states
    for wrong in ("colbert", MaxSim, 3):
        with pytest.raises(ConfigurationError, match="no such relevance.*bm25, maxsim, bm25\\+maxsim"):
            BudgetedReadPolicy(relevance=wrong)  # type: ignore[arg-type]
    assert signal_named("maxsim") == MaxSim() and signal_named(Words()) == Words()
