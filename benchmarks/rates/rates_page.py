"""The section on rates that follow the text."""

from __future__ import annotations

from typing import Any

from benchmarks.cells import difference, number, source, table, with_interval

_KINDS = {
    "fixed": ("dimgray", "o"),
    "information": ("tab:blue", "s"),
    "learned": ("tab:orange", "^"),
    "budget": ("tab:green", "D"),
}


def tables(record: dict[str, Any]) -> list[str]:
    """Lines of the section."""
    lines = [
        "## Rates that follow the text",
        "",
        f"`{record['llm']}`, the first {record['limit']} questions of a seeded order in each set, their passages "
        "whole. *Prefill cost* is the mean over passage tokens, text = 1; brackets are bootstrap 95 % intervals over "
        "questions, Δ F1 is paired with text. A budget is shared out over all passages of a set, in shares of their "
        "tokens.",
        "",
        f"{source(record)}.",
        "",
    ]
    if not record["learned"]:
        lines += ["The compressor has no learned losses, so that there is no row `learned`.", ""]
    for name, made in record["sets"].items():
        lines += [f"### {name}, {made['n']} questions", "", *_table(made["rows"])]
    lines += ["![Recovered over prefill cost](rates.png)", "", "### The claim of the seed article", ""]
    lines += [_said(name, made["claim"]) for name, made in record["sets"].items()]
    return [*lines, ""]


def _table(rows: dict[str, dict[str, Any]]) -> list[str]:
    cells = []
    for name, row in rows.items():
        cost = row["prefill_cost"]
        cells.append(
            [
                name,
                "–" if cost is None else number(cost, 3),
                number(row["achieved_rate"], 2),
                with_interval(row["recovered"], row["recovered_interval"]),
                with_interval(row["f1"], row["f1_interval"]),
                difference(row["to_text"]["f1"] if name != "text" else None, 1),
                str(row["passages_as_text"]),
            ]
        )
    head = ["rates", "prefill cost", "achieved rate", "recovered (%)", "F1", "Δ F1 to text", "passages left as text"]
    return table(head, cells)


def _said(name: str, claim: dict[str, Any]) -> str:
    if claim["achieved_rate"] is None or claim["f1_lost_percent"] is None:
        return f"* {name}: nothing to tell."
    verdict = "holds" if claim["holds"] else "does not hold"
    return (
        f"* {name}: bands 1.5-2, 2-3 and 3-4 gave a mean rate of {claim['achieved_rate']:.2f} and lost "
        f"{claim['f1_lost_percent']:.1f} % of text's F1. The claim (2.5 at less than 1 %) {verdict}."
    )


def plot(record: dict[str, Any]) -> Any:
    """Recovered over mean prefill cost, a panel a set."""
    from matplotlib.figure import Figure

    sets = record["sets"]
    figure = Figure(figsize=(8.5, 0.8 + 3.2 * ((len(sets) + 1) // 2)), layout="constrained")
    axes = figure.subplots((len(sets) + 1) // 2, 2, squeeze=False).ravel()
    for axis, (name, made) in zip(axes, sets.items(), strict=False):
        for kind, (colour, marker) in _KINDS.items():
            rows = [
                row
                for label, row in made["rows"].items()
                if label.startswith(kind) and row["recovered"] is not None and "guard" not in label
            ]
            rows.sort(key=lambda row: row["prefill_cost"])
            if rows:
                x, y = [row["prefill_cost"] for row in rows], [row["recovered"] for row in rows]
                axis.plot(x, y, color=colour, marker=marker, label=kind, linewidth=1)
        axis.set_title(name, fontsize="medium")
        axis.set_xlabel("prefill cost (text = 1)")
        axis.set_ylabel("recovered (%)")
    for axis in axes[len(sets) :]:
        axis.set_axis_off()
    handles, names = axes[0].get_legend_handles_labels()
    if names:
        figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    return figure
