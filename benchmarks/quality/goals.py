"""The section on goals: what deep concepts were to reach at a cost, and what was measured of it.

Nothing is measured here; the records of the other sections are looked at. A way of reading is named in front of its
goal, so that no evaluation set chooses which of several ways counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.cells import number, table, with_interval

RECORDS = ("quality_deep", "quality_pressed", "quality_units", "quality_frozen")
_OTHERS = ("hotpotqa", "fairytaleqa", "narrativeqa", "quail")
_NARROWED = "24:0.1"


@dataclass(frozen=True)
class Goal:
    """What a way of reading passages was to reach.

    Attributes:
        cost: Of a passage at prefill, text = 1, as the goal names it.
        records: In which folders of results the way may stand, the first that has it counts.
        rate: Source tokens per concept.
        narrowing: How concepts are narrowed.
        sets: Names of evaluation sets.
        recovered: At least so many percent; None where none were named.
        points: F1 (accuracy, where there is no F1) may be so far below that of text; None where none were named.
    """

    cost: str
    records: tuple[str, ...]
    rate: float
    narrowing: str | None
    sets: tuple[str, ...]
    recovered: float | None
    points: float | None


GOALS = (
    Goal("0.50", ("quality_deep",), 1.0, None, ("squad",), 99, 1),
    Goal("0.50", ("quality_deep",), 1.0, None, _OTHERS, 97, 1),
    Goal("0.50", ("quality_units",), 1.0, None, _OTHERS, 97, 1),
    Goal("0.50", ("quality_deep",), 1.0, None, ("probes",), None, 3),
    Goal("0.50", ("quality_frozen",), 1.0, None, ("squad",), 97, None),
    Goal("0.25", ("quality_deep",), 2.0, None, ("squad",), 92, 5),
    Goal("0.25", ("quality_deep",), 2.0, None, _OTHERS, 88, 5),
    Goal("0.25", ("quality_units",), 2.0, None, _OTHERS, 88, 5),
    Goal("0.25", ("quality_deep",), 2.0, None, ("probes",), None, 12),
    Goal("0.25", ("quality_deep",), 1.3, _NARROWED, ("squad",), 92, 5),
    Goal("0.25", ("quality_deep",), 1.3, _NARROWED, _OTHERS, 88, 5),
    Goal("0.25", ("quality_pressed",), 1.3, _NARROWED, ("probes",), None, 12),
    Goal("0.125 to 0.17", ("quality_deep", "quality_pressed"), 4.0, None, ("squad", *_OTHERS), 75, None),
    Goal("0.125 to 0.17", ("quality_deep", "quality_pressed"), 2.0, _NARROWED, ("squad", *_OTHERS), 75, None),
)


def tables(found: dict[str, Any]) -> list[str]:
    """Lines of the page.

    Args:
        found: Of the folders in `RECORDS`, the record of each set by its name.
    """
    rows = [row for goal in GOALS for name in goal.sets if (row := _row(goal, name, found)) is not None]
    if not rows:
        return []
    return [
        "## Goals",
        "",
        "What deep concepts of the embedded LLM were to reach at a cost, set before they were trained, beside what the "
        "sections below measured. *Asked* is in brackets: at least so much is recovered, and F1 (accuracy on QuAIL) no "
        "further below that of text. A goal counts as reached by the measured value, and as open where it is missed, "
        "but lies within the 95 % interval. Where two ways have one cost, both are here. What was tried for what fell "
        "short, and what the curve over training time says, is told in [training](guide/train.md#what-falls-short).",
        "",
        *table(
            ["cost", "read as", "set", "n", "prefill cost", "recovered (asked)", "points to text (asked)", "reached"],
            rows,
        ),
    ]


def _row(goal: Goal, name: str, found: dict[str, Any]) -> list[str] | None:
    """Cells of one goal on one set; None where it was not measured."""
    for folder in goal.records:
        record = found.get(folder, {}).get(name)
        for row in record["results"] if record else ():
            asked = (row["mode"], row["rate"], row.get("narrowing")) == ("concepts", goal.rate, goal.narrowing)
            if asked and row["recovered"] is not None:  # where passages help little there is nothing to recover
                return _cells(goal, record, row, folder)
    return None


def _cells(goal: Goal, record: dict[str, Any], row: dict[str, Any], folder: str) -> list[str]:
    score = "accuracy" if row["f1"] is None else "f1"
    paired = row["paired"][score]
    verdicts = []
    if goal.recovered is not None:
        verdicts.append(_verdict(row["recovered"] - goal.recovered, row["intervals"]["recovered"][1] - goal.recovered))
    if goal.points is not None:
        verdicts.append(_verdict(paired["difference"] + goal.points, paired["interval"][1] + goal.points))
    recovered = with_interval(row["recovered"], row["intervals"]["recovered"])
    low, high = paired["interval"]
    points = f"{paired['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
    read = f"rate {goal.rate:g}" + (f", narrowed {goal.narrowing}" if goal.narrowing else "")
    read += ", upper half frozen" if folder == "quality_frozen" else ""
    read += f", units of {record['compressor']['unit_length']} tokens" if folder == "quality_units" else ""
    return [
        goal.cost,
        read,
        record["title"],
        str(row["n"]),
        number(row["prefill_cost"], 2),
        recovered + ("" if goal.recovered is None else f" ({goal.recovered:g})"),
        points + ("" if goal.points is None else f" ({-goal.points:g})"),
        next(word for word in ("no", "open", "yes") if word in verdicts),
    ]


def _verdict(value: float, high: float) -> str:
    """Whether a value at or above 0, with the upper end of its interval, is a goal that was reached."""
    return "yes" if value >= 0 else "open" if high >= 0 else "no"
