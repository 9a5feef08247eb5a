"""The page section of `planner`."""

from __future__ import annotations

from typing import Any

from benchmarks.planner.contenders import PLANNERS, RIVALS


def tables(record: dict[str, Any]) -> list[str]:
    """Lines of Markdown: a table of values for each set, one of differences, and what they come to."""
    environment = record["environment"]
    lines = [
        "## Read policies at equal prefill cost",
        "",
        f"{record['llm']}; `{record['command']}`, commit {environment['commit'][:9]}, {environment['cpu']}, "
        f"torch {environment['versions']['torch']}. {record['top_k']} retrieved passages a question; *cost* is what "
        "they may take of the prefill that they take as text. *Recovered* as in "
        "[design, section 7](design.md#7-definitions).",
        "",
    ]
    for name, found in record["sets"].items():
        lines += _values(name, found)
        lines += _differences(found)
    return [*lines, *_verdict(record)]


def _values(name: str, found: dict[str, Any]) -> list[str]:
    lines = [
        f"### {found['title']}",
        "",
        f"{found['n']} questions; a passage that was found holds a gold answer for {found['recall']:.0f} % of them.",
        "",
        "| read as | cost | prefill of the prompt | F1 | EM | NLL | recovered |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        cost = "–" if row["cost"] is None else f"{row['cost']:g}"
        lines.append(
            f"| {row['contender']} | {cost} | {row['prefill_tokens']:.0f} | {_with(row, 'f1')} | {_cell(row['em'])} "
            f"| {_cell(row['nll'], 2)} | {_with(row, 'recovered')} |"
        )
    return [*lines, ""]


def _differences(found: dict[str, Any]) -> list[str]:
    lines = ["| planner − rival | cost | rival | ΔF1 | Δrecovered |", "|---|---|---|---|---|"]
    for row in found["rows"]:
        for rival, over in row.get("over", {}).items():
            cells = " | ".join(_difference(over[name]) for name in ("f1", "recovered"))
            lines.append(f"| {row['contender']} | {row['cost']:g} | {rival} | {cells} |")
    return [*lines, ""] if len(lines) > 2 else []


def _verdict(record: dict[str, Any]) -> list[str]:
    """Sets and costs at which a planner wins over the best of its rivals, or loses to it, by F1."""
    lines = []
    for planner in PLANNERS:
        won, lost, even = list[str](), list[str](), list[str]()
        for name, found in record["sets"].items():
            for row in found["rows"]:
                if row["contender"] != planner or not any(rival in row.get("over", {}) for rival in RIVALS):
                    continue
                f1 = {r["contender"]: r["f1"] for r in found["rows"] if r["cost"] == row["cost"]}
                best = max((rival for rival in RIVALS if rival in row["over"]), key=lambda rival: f1[rival] or 0.0)
                over = row["over"][best]["f1"]
                low, high = over["interval"] if over else (0.0, 0.0)
                (won if low > 0 else lost if high < 0 else even).append(f"{name} at {row['cost']:g}")
        if won or lost or even:
            told = [f"{len(each)} ({', '.join(each)})" if each else "0" for each in (won, lost, even)]
            lines.append(
                f"Against the best of {', '.join(RIVALS)} by F1, *{planner}* wins {told[0]}, loses {told[1]}, and of "
                f"{told[2]} the interval of the difference holds 0."
            )
    return [*lines, ""]


def _cell(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _with(row: dict[str, Any], name: str) -> str:
    ends = row["intervals"][name]
    return _cell(row[name]) + (f" [{ends[0]:.0f}, {ends[1]:.0f}]" if ends else "")


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    low, high = found["interval"]
    return f"{found['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
