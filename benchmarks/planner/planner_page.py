"""The page section and the picture of `planner`."""

from __future__ import annotations

from typing import Any

from benchmarks.cells import difference, number, source, table, with_interval
from benchmarks.planner.contenders import LEARNED, PLANNERS, RIVALS

_COLOURS = {
    "planner": "tab:blue", "planner, two rates": "tab:cyan", "planner, likeliest alone": "navy", LEARNED: "tab:purple",
    f"{LEARNED}, concepts alone": "violet",
    "BM25 sentences": "tab:orange", "concepts": "tab:green", "fewer text": "tab:red", "random": "tab:gray",
}  # fmt: skip


def tables(record: dict[str, Any]) -> list[str]:
    """Lines of Markdown: a table of values for each set, one of differences, and what they come to."""
    narrowing = record.get("narrowing")
    lines = [
        "## Read policies at equal prefill cost",
        "",
        f"{record['llm']} ({record['dtype']}), {record['top_k']} retrieved passages a question; *cost* is what they "
        "may take of the prefill that they take as text. *Recovered* as in "
        "[design, section 7](design.md#7-definitions)."
        + (f" Prompts with concepts are narrowed, `{narrowing}`, which is reckoned with." if narrowing else ""),
        "",
        f"{source(record)}.",
        "",
    ]
    for name, found in record["sets"].items():
        lines += _values(name, found)
        lines += _differences(found)
    return [*lines, *_verdict(record), "![F1 over prefill cost, read policies and their rivals](planner.png)", ""]


def plot(record: dict[str, Any]) -> Any:
    """F1 over the prefill of the whole prompt as a share of that as text, a panel a set."""
    from matplotlib.figure import Figure

    sets = record["sets"]
    figure = Figure(figsize=(8.5, 0.8 + 3.2 * ((len(sets) + 1) // 2)), layout="constrained")
    axes = figure.subplots((len(sets) + 1) // 2, 2, squeeze=False).ravel()
    for axis, found in zip(axes, sets.values(), strict=False):
        [text] = [row for row in found["rows"] if row["contender"] == "text"]
        axis.axhline(text["f1"], color="black", linestyle="--", linewidth=1, label="text")
        for contender, colour in _COLOURS.items():
            rows = sorted(
                (row for row in found["rows"] if row["contender"] == contender), key=lambda row: row["prefill_tokens"]
            )
            x = [row["prefill_tokens"] / text["prefill_tokens"] for row in rows]
            if rows:
                axis.plot(x, [row["f1"] for row in rows], color=colour, marker="o", linewidth=1, label=contender)
        axis.set_title(found["title"], fontsize="medium")
        axis.set_xlabel("prefill of the prompt (text = 1)")
        axis.set_ylabel("F1")
    for axis in axes[len(sets) :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def _values(name: str, found: dict[str, Any]) -> list[str]:
    head = ["read as", "cost", "positions", "prefill of the prompt", "F1", "EM", "NLL", "recovered"]
    rows = [
        [
            row["contender"],
            "–" if row["cost"] is None else f"{row['cost']:g}",
            number(row["positions"], 0),
            number(row["prefill_tokens"], 0),
            with_interval(row["f1"], row["intervals"]["f1"]),
            number(row["em"]),
            number(row["nll"], 2),
            with_interval(row["recovered"], row["intervals"]["recovered"]),
        ]
        for row in found["rows"]
    ]
    told = f"{found['n']} questions; a passage that was found holds a gold answer for {found['recall']:.0f} % of them."
    return [f"### {found['title']}", "", told, "", *table(head, rows)]


def _differences(found: dict[str, Any]) -> list[str]:
    rows = [
        [row["contender"], f"{row['cost']:g}", rival, difference(over["f1"]), difference(over["recovered"])]
        for row in found["rows"]
        for rival, over in row.get("over", {}).items()
    ]
    return table(["planner − rival", "cost", "rival", "ΔF1", "Δrecovered"], rows) if rows else []


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
