"""SQuAD metrics on cases worked out by hand."""

from __future__ import annotations

import pytest

from compllm_rag.evaluation.metrics import exact_match, f1, normalize


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
