"""Means, recovered and intervals on numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compllm_rag.evaluation.statistics import Record, differences, statistics


def record(nll: float, n_tokens: int = 1, **more) -> Record:
    values = {"answer": "a", "em": 0.0, "f1": 50.0, "subspan_em": 100.0, "option": None, "correct": None}
    return Record(
        **{"id": "q", "question": "?", "golds": ("a",), "source_tokens": 30, "concepts": 10, "positions": 40}
        | values
        | {"nll": nll, "n_tokens": n_tokens}
        | more
    )


TEXT = [record(1.0, 2, answer="one", f1=80.0), record(2.0, 4, answer="The two.", f1=60.0)]
NONE = [record(5.0, 2, answer="x"), record(4.0, 4, answer="y")]


def test_by_hand() -> None:
    mine = [
        record(3.0, 2, answer="one", em=100.0, f1=100.0, correct=True),
        record(3.0, 4, answer="two\nor three", source_tokens=10, concepts=6, positions=20),
    ]
    found = statistics(mine, TEXT, NONE)
    text, none = (1 * 2 + 2 * 4) / 6, (5 * 2 + 4 * 4) / 6
    assert found.values == pytest.approx(
        {
            "em": 50,
            "f1": 75,
            "subspan_em": 100,
            "accuracy": 100,
            "nll": 3,
            "agreement": 100,
            "positions": 30,
            "achieved_rate": 40 / 16,
            "recovered": 100 * (none - 3) / (none - text),
        }
    )
    assert found.paired["f1"]["difference"] == pytest.approx(75 - 70)
    assert found.paired["nll"]["difference"] == pytest.approx(3 - text)
    # The text records have no options to compare with.
    assert found.paired["accuracy"] is None


def test_text_recovers_all_and_no_passages_nothing() -> None:
    assert statistics(TEXT, TEXT, NONE).values["recovered"] == 100
    assert statistics(NONE, TEXT, NONE).values["recovered"] == 0
    assert statistics(TEXT, TEXT, NONE).values["agreement"] == 100
    assert statistics(NONE, TEXT, NONE).values["agreement"] == 0


def test_nothing_to_recover() -> None:
    almost = [replace(r, nll=r.nll + 0.29) for r in TEXT]
    found = statistics(TEXT, TEXT, almost)
    assert found.values["recovered"] is None
    assert found.intervals["recovered"] is None
    enough = [replace(r, nll=r.nll + 0.31) for r in TEXT]
    assert statistics(TEXT, TEXT, enough).values["recovered"] == 100


def test_without_answers_or_concepts() -> None:
    silent = [replace(r, answer=None, em=None, f1=None, subspan_em=None, concepts=None) for r in TEXT]
    found = statistics(silent, TEXT, NONE)
    assert {name for name, value in found.values.items() if value is not None} == {"nll", "positions", "recovered"}
    assert found.paired["f1"] is None
    assert found.paired["nll"]["difference"] == 0


def test_intervals_are_seeded_and_hold_the_mean() -> None:
    n = 40
    mine = [record(2 + i / n, 1 + i % 3, f1=float(i), em=100.0 * (i % 2), correct=i % 3 == 0) for i in range(n)]
    text = [record(1 + i / n, 1 + i % 3, f1=float(i + 10)) for i in range(n)]
    none = [record(4 + i / n, 1 + i % 3) for i in range(n)]
    first, again, other = (statistics(mine, text, none, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.intervals != other.intervals
    for name in ("em", "f1", "nll", "recovered", "accuracy"):
        low, high = first.intervals[name]
        assert low <= first.values[name] <= high
        assert low < high or name == "recovered"
    # Each question differs from its text by as much: other questions would not move the difference.
    assert first.paired["f1"] == {"difference": pytest.approx(-10), "interval": pytest.approx([-10, -10])}
    assert first.intervals["recovered"] == pytest.approx([100 * 2 / 3, 100 * 2 / 3])
    # About 1.96 standard errors of the mean of 0 to 39 on each side.
    low, high = first.intervals["f1"]
    assert (high - low) / 2 == pytest.approx(1.96 * 11.54 / n**0.5, rel=0.1)


def test_differences_are_paired_and_hold_for_recovered_too() -> None:
    none, text = [record(4.0)] * 40, [record(1.0, f1=80.0)] * 40
    low = [record(3.0 - i / 40, f1=float(i)) for i in range(40)]
    high = [record(2.7 - i / 40, f1=i + 10.0) for i in range(40)]
    found = differences(high, low, text, none)
    assert found["f1"] == {"difference": pytest.approx(10), "interval": [pytest.approx(10)] * 2}
    assert found["recovered"]["difference"] == pytest.approx(10)
    assert found["recovered"]["interval"] == [pytest.approx(10)] * 2
    assert differences(low, low, text, none)["f1"] == {"difference": 0.0, "interval": [0.0, 0.0]}
    assert differences(high, low, none, none)["recovered"] is None
