"""The section on kinds of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages.cells import finished, number, source, with_interval

_SHADES = {"concepts": ("tab:blue", "lightskyblue", "steelblue"), "pruned": ("dimgray", "silver", "gray")}


def section(results: Path, docs: Path) -> str | None:
    """Markdown of the section; draws the plot beside the page.

    Args:
        results: Folder with domains.json.
        docs: Folder of the page.
    """
    record = finished(results / "domains.json")
    if record is None:
        return None
    domains = record["domains"]
    asked = {name: domain | domain["answers"] for name, domain in domains.items() if domain["answers"]}
    plot(domains, asked, docs / "domains.png")
    lines = [
        "## Kinds of text",
        "",
        f"The {record['length']} tokens behind a passage of up to {record['context']} tokens, scored directly after "
        f"it: perplexity, and what is recovered of what the passage as text gains in NLL. `{record['llm']}`; brackets "
        "are bootstrap 95 % intervals over passages, differences are paired (nats per token; below 0 it is better "
        "than text, or than pruning at the same rate). A dash stands where the passage as text gains less than 0.3 "
        "nats per token: too little to recover.",
        "",
        f"{source(record)}.",
        "",
        *_table(domains, "perplexity"),
    ]
    if asked:
        lines += [
            "The same for the gold answers of questions, behind whole passages of up to "
            f"{record['longest']} tokens in the default prompt, one question a passage:",
            "",
            *_table(asked, "nll"),
        ]
    return "\n".join([*lines, "![Recovered by kind of text](domains.png)", "", *_training(domains)])


def _table(domains: dict[str, dict[str, Any]], metric: str) -> list[str]:
    head = ["kind of text", "n", "read as", "rate", metric if metric != "nll" else "NLL", "recovered (%)"]
    head += ["to text", "to pruning"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for domain in domains.values():
        title, n = domain["title"], str(domain["n"])
        for row in domain["rows"]:
            cells = [title, n, row["mode"], number(row["achieved_rate"], 2)]
            cells.append(_value(row[metric], row[f"{metric}_interval"], 1 if metric == "perplexity" else 2))
            cells.append(with_interval(row["recovered"], row["recovered_interval"]) if row["rate"] else "–")
            cells.append(_difference(row["to_text"]) if row["mode"] != "text" else "–")
            cells.append(_difference(row["to_pruned"]))
            lines.append("| " + " | ".join(cells) + " |")
            title = n = ""
    return [*lines, ""]


def _value(value: float, ends: Sequence[float], digits: int) -> str:
    return f"{value:.{digits}f} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def _difference(paired: dict[str, Any] | None) -> str:
    if not paired:
        return "–"
    low, high = paired["interval"]
    return f"{paired['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"


def _training(domains: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["No text scored here was trained on, as far as is known; of its kind the shipped adapters saw:", ""]
    for domain in domains.values():
        mix = domain["in_training_mix"] or "nothing"
        lines.append(f"* {domain['title']}, {domain['texts']} texts: {mix}. Taken: {domain['held_out']}.")
    return [*lines, ""]


def plot(domains: dict[str, dict[str, Any]], asked: dict[str, dict[str, Any]], path: Path) -> None:
    """Recovered by kind of text, concepts beside pruning at each rate: of continuations, and of answers."""
    from matplotlib.figure import Figure

    panels = [("continuation of the passage", domains), *([("answers to questions", asked)] if asked else [])]
    figure = Figure(figsize=(8.5, 1.0 + 3.0 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axis, (title, shown) in zip(axes, panels, strict=True):
        _bars(axis, shown)
        axis.set_title(title, fontsize="medium")
        axis.set_ylabel("recovered (%)")
        axis.axhline(0, color="0.6", linewidth=0.8)
    found = [handles for axis in axes for handles in zip(*axis.get_legend_handles_labels(), strict=True)]
    unique = {label: handle for handle, label in reversed(found)}
    if unique:
        names = list(reversed(unique))
        figure.legend([unique[n] for n in names], names, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=120)


def _bars(axis: Any, domains: dict[str, dict[str, Any]]) -> None:
    keys = list(dict.fromkeys((r["mode"], r["rate"]) for d in domains.values() for r in d["rows"] if r["rate"]))
    width = 0.8 / max(1, len(keys))
    for place, (mode, rate) in enumerate(keys):
        colour = _SHADES[mode][sorted({r for m, r in keys if m == mode}).index(rate) % 3]
        for at, domain in enumerate(domains.values()):
            row = next(r for r in domain["rows"] if (r["mode"], r["rate"]) == (mode, rate))
            x = at + (place - (len(keys) - 1) / 2) * width
            if row["recovered"] is None:
                axis.annotate("–", (x, 0), ha="center", va="bottom", color="0.4")
                continue
            axis.bar(x, row["recovered"], width, color=colour, label=f"{mode}, rate {rate:g}")
            axis.plot([x, x], row["recovered_interval"], color="black", linewidth=0.8)
    axis.set_xlim(-0.6, len(domains) - 0.4)
    titles = [d["title"].replace(" (", "\n(") for d in domains.values()]
    axis.set_xticks(range(len(domains)), titles, fontsize="small")
