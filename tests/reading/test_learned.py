"""Relevance as it was learned for a compressor: what it judges by, what it tells, and where it has nothing to go by."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from compllm_rag.errors import ConfigurationError
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.read_options import policy_of
from compllm_rag.reading.budget import ReadBudget
from compllm_rag.reading.budgeted import BudgetedReadPolicy, weights_for
from compllm_rag.reading.passages import PassageReading
from compllm_rag.reading.relevance import Weights
from compllm_rag.reading.sentences import sentence_bounds, word_shares
from compllm_rag.reading.signals import Judged, Learned, Words
from compllm_rag.reading.states import question_states
from tests.reading.read_samples import PARTS, QUESTION, decided, learned_library, library, retrieved
from tests.reading.test_maxsim import judged


def flat(found: list[Judged]) -> list[float]:
    return [share for one in found for share in one.sentences]


def scores(of: ConceptLibrary) -> np.ndarray:
    """Of the parts' sentences, by what was learned, straight from the library."""
    found = [of.fetch(text) for text in PARTS]
    reading = PassageReading(of, BudgetedReadPolicy(), ReadBudget(positions=9))
    cut = [reading.candidate(n, one).sentences for n, one in enumerate(retrieved())]
    bounds = [sentence_bounds(one.places, own) for one, own in zip(found, cut, strict=True) if one.places is not None]
    words = word_shares(QUESTION, [sentence.text for own in cut for sentence in own])
    assert not isinstance(of.interaction, str)
    states = [one.concepts for one in found if one.concepts is not None]
    return np.asarray(of.interaction(question_states(of, QUESTION), states, bounds, words))


def test_shares_are_probabilities_beside_the_likeliest() -> None:
    of = learned_library()
    found, told = judged(of, Learned())
    expected = np.exp(scores(of) - scores(of).max())
    np.testing.assert_allclose(flat(found), expected, rtol=1e-3)
    assert max(one.passage for one in found) == 1.0 and told["signal"] == "learned" and told["by_words"] == {}
    best = max(range(len(expected)), key=expected.__getitem__)
    assert [why for one in found for why in one.whys][best] == "1.00 as likely to answer as the likeliest"
    soft, _ = judged(of, Learned(temperature=4.0))
    np.testing.assert_allclose(flat(soft), expected ** (1 / 4), rtol=1e-3)
    with pytest.raises(ConfigurationError, match="temperature"):
        Learned(temperature=0.0)


def test_sentences_without_a_kept_token_are_told() -> None:
    found, _ = judged(learned_library(rate=20.0), Learned())
    pairs = [pair for one in found for pair in zip(one.sentences, one.whys, strict=True)]
    missing = [share for share, why in pairs if why == "no concept of it is kept"]
    assert missing and len(missing) < len(pairs) and all(math.isfinite(share) for share in missing)


def test_passages_without_concepts_are_judged_by_their_words() -> None:
    empty = learned_library(fill=False)
    found, told = judged(empty, Learned())
    words = judged(empty, Words())[0]
    assert flat(found) == [max(share, 1e-3) for share in flat(words)] and 0.0 in flat(words)
    assert [one.passage for one in found] == [one.passage for one in words]
    assert told["by_words"] == {f"n{i}": "its concepts are not stored" for i in range(len(PARTS))}
    found, told = judged(learned_library(), Learned(), queued={"n1"})
    assert found[1].whys == judged(learned_library(), Words())[0][1].whys and list(told["by_words"]) == ["n1"]
    assert found[0] != judged(learned_library(), Words())[0][0]


def other_compressors() -> Any:
    of = learned_library()
    of.compressor.interaction.compressor = "another"  # type: ignore[union-attr]
    return of


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (library, "no relevance is learned for this compressor"),
        (other_compressors, "learned for another one"),
    ],
)
def test_it_is_refused_where_nothing_was_learned(of: Any, said: str) -> None:
    made = of()
    with pytest.raises(ConfigurationError, match=f"{said}.*train relevance"):
        decided(made, BudgetedReadPolicy(relevance="learned"), {"prefill": 40})
    with pytest.raises(ConfigurationError, match=said):
        judged(made, Learned())  # a policy that does not say what it needs
    with pytest.raises(ConfigurationError, match="concepts at the input embeddings"):
        PassageReading(library("input"), BudgetedReadPolicy(relevance="learned"), ReadBudget(positions=90))


def test_probabilities_are_weighed_as_they_are() -> None:
    of = learned_library()
    assert BudgetedReadPolicy().weights == Weights() == weights_for(None) == weights_for("maxsim")
    assert BudgetedReadPolicy(relevance="learned").weights == weights_for(Learned(temperature=2.0))
    assert weights_for("learned", 0.3).least == 0.3 == weights_for("bm25", 0.3).least
    shares = np.exp(scores(of) - scores(of).max())
    least = float(np.sort(shares)[-2])
    for cutoff, read in ((least * 0.99, 2), (least * 1.01, 1), (1.0, 1)):
        policy = BudgetedReadPolicy(relevance="learned", weights=weights_for("learned", cutoff))
        found = decided(of, policy, {"prefill": 500})
        kept = [part for one in found.passages for part in one.reading.parts if part.used != "left out"]
        assert len(kept) == read
    missing = decided(
        learned_library(fill=False), BudgetedReadPolicy(relevance="learned"), {"prefill": 500}, missing="text"
    )
    assert {part.used for one in missing.passages for part in one.reading.parts} == {"text"}
    mine = policy_of(None, "learned", 0.3)
    assert isinstance(mine, BudgetedReadPolicy) and mine.weights == weights_for("learned", 0.3)
