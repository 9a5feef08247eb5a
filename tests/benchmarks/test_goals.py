"""Goals beside what was measured: which count as reached, which as open."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.quality import goals


def record(
    recovered: float | None, high: float, points: float, most: float, *, f1: float | None = 60.0
) -> dict[str, Any]:
    score = "accuracy" if f1 is None else "f1"
    row = {
        "mode": "concepts", "rate": 1.0, "narrowing": None, "n": 500, "prefill_cost": 0.5, "f1": f1,
        "recovered": recovered, "intervals": {"recovered": [90.0, high]},
        "paired": {score: {"difference": points, "interval": [-9.0, most]}},
    }  # fmt: skip
    text = row | {"mode": "text", "rate": None}
    return {"title": "A set", "results": [text, row], "compressor": {"unit_length": 240}}


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (record(99.0, 99.5, -1.0, 2.0), "yes"),
        (record(98.9, 99.5, 0.0, 2.0), "open"),
        (record(99.5, 99.9, -1.1, 2.0), "open"),
        (record(98.9, 98.95, 0.0, 2.0), "no"),
        (record(99.5, 99.9, -4.0, -1.5), "no"),
        (record(99.5, 99.9, -0.5, 2.0, f1=None), "yes"),
    ],
)
def test_a_goal_is_reached_by_what_was_measured_and_open_within_the_interval(
    measured: dict[str, Any], verdict: str
) -> None:
    lines = goals.tables({"quality_deep": {"squad": measured}})
    [row] = [line for line in lines if line.startswith("| 0.50 |")]
    assert row.split(" | ")[1:4] == ["rate 1", "A set", "500"] and row.endswith(f"| {verdict} |")
    assert "(99)" in row and "(-1)" in row


def test_what_was_not_measured_is_not_there() -> None:
    assert goals.tables({}) == []
    assert goals.tables({"quality_deep": {"squad": record(None, 99.0, 0.0, 1.0)}}) == []
