"""SQuAD metrics on cases worked out by hand."""

from __future__ import annotations

import random

import pytest
from torchmetrics.text import SQuAD

from compllm_rag.evaluation.metrics import exact_match, f1, normalize, same_answer, subspan_match


def test_normalize() -> None:
    assert normalize("  The  Cat, sat on a Mat! ") == "cat sat on mat"


@pytest.mark.parametrize(
    ("answer", "golds", "em", "overlap"),
    [
        ("The Broncos", ["Denver Broncos", "broncos"], 100, 100),
        ("Denver", ["Denver Broncos"], 0, 100 * 2 * 1 / 3),
        ("It was in 1871, in March.", ["March 1871"], 0, 100 * 2 * 2 / 8),
        ("1871\nbecause the log says so", ["1871"], 100, 100),
        ("", ["1871"], 0, 0),
        ("the", ["a"], 100, 100),
        ("yes yes", ["yes"], 0, 100 * 2 / 3),
        ("anything", [], 0, 0),
    ],
)
def test_scores(answer: str, golds: list[str], em: float, overlap: float) -> None:
    assert exact_match(answer, golds) == em
    assert f1(answer, golds) == pytest.approx(overlap)


@pytest.mark.parametrize(
    ("answer", "golds", "contained"),
    [
        ("It was built in 1871, they say.", ["1871"], 100),
        ("the Denver  Broncos!", ["denver broncos"], 100),
        ("Denver", ["Denver Broncos"], 0),
        ("nothing\nin 1871", ["1871"], 0),
        ("whatever", ["the"], 0),
        ("a", ["the"], 100),
        ("", ["1871"], 0),
    ],
)
def test_containment(answer: str, golds: list[str], contained: float) -> None:
    assert subspan_match(answer, golds) == contained


def test_same_answer() -> None:
    assert same_answer("The boat.", "a boat\nor two")
    assert not same_answer("boat", "boats")
    assert same_answer("", "\n")


def test_scores_are_those_of_torchmetrics() -> None:
    rng = random.Random(0)
    words = ["the", "a", "Marsh,", "marsh", "lamp", "Lamp!", "1871", "boat", "in", "(burns)"]
    for _ in range(200):
        answer = " ".join(rng.choices(words, k=rng.randrange(1, 6)))
        golds = [" ".join(rng.choices(words, k=rng.randrange(1, 4))) for _ in range(rng.randrange(1, 4))]
        theirs = SQuAD()(
            [{"prediction_text": answer, "id": "q"}],
            [{"answers": {"answer_start": [0] * len(golds), "text": golds}, "id": "q"}],
        )
        assert exact_match(answer, golds) == pytest.approx(float(theirs["exact_match"]))
        assert f1(answer, golds) == pytest.approx(float(theirs["f1"]), abs=1e-3)
