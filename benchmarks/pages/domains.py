"""The section on kinds of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.pages.cells import finished, number, source, with_interval


def section(results: Path, docs: Path) -> str | None:
    """Markdown of the section; draws the plot beside the page.

    Args:
        results: Folder with domains.json.
        docs: Folder of the page.
    """
    record = finished(results / "domains.json")
    if record is None:
        return None
    plot(record["domains"], docs / "domains.png")
    lines = [
        "## Kinds of text",
        "",
        f"The {record['length']} tokens behind a passage of up to {record['context']} tokens, scored directly after "
        f"it: perplexity, and what is recovered of what the passage as text gains. `{record['llm']}`; brackets are "
        "bootstrap 95 % intervals over passages. Answers to questions over encyclopedia and stories are in "
        "[quality.md](quality.md). Kinds marked with * come from files of training texts: of the texts that the "
        "trainer holds out, one in 40 (what the first part of the shipped reader saw of them is not known). A dash "
        "stands where the passage as text gains less than 0.3 nats a token: too little to recover.",
        "",
        f"{source(record)}.",
        "",
        "| kind of text | n | read as | rate | perplexity | recovered |",
        "|---|---|---|---|---|---|",
    ]
    for domain in record["domains"].values():
        title = domain["title"] + (" *" if domain["trained_on"] else "")
        for row in domain["rows"]:
            cells = [title, str(domain["n"]), row["mode"], number(row["achieved_rate"], 2)]
            cells.append(with_interval(row["perplexity"], row["perplexity_interval"]))
            cells.append(with_interval(row["recovered"], row["recovered_interval"]) if row["rate"] else "–")
            lines.append("| " + " | ".join(cells) + " |")
            title = ""
    return "\n".join([*lines, "", "![Recovered by kind of text](domains.png)", ""])


def plot(domains: dict[str, dict[str, Any]], path: Path) -> None:
    """Recovered by kind of text, concepts beside pruning at each rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.8), layout="constrained")
    panel = figure.subplots()
    keys = list(dict.fromkeys((r["mode"], r["rate"]) for d in domains.values() for r in d["rows"] if r["rate"]))
    width = 0.8 / max(1, len(keys))
    shades = {"concepts": ("tab:blue", "lightskyblue", "steelblue"), "pruned": ("dimgray", "silver", "gray")}
    named: set[tuple[str, float]] = set()
    for place, (mode, rate) in enumerate(keys):
        rates = sorted({r for m, r in keys if m == mode})
        colour = shades[mode][rates.index(rate) % 3]
        for number_, domain in enumerate(domains.values()):
            row = next(r for r in domain["rows"] if (r["mode"], r["rate"]) == (mode, rate))
            if row["recovered"] is None:
                continue
            low, high = row["recovered_interval"]
            x = number_ + (place - (len(keys) - 1) / 2) * width
            label = None if (mode, rate) in named else f"{mode}, rate {rate:g}"
            named.add((mode, rate))
            panel.bar(x, row["recovered"], width, color=colour, label=label)
            panel.plot([x, x], [low, high], color="black", linewidth=0.8)
    panel.set_xticks(range(len(domains)), [d["title"].replace(" (", "\n(") for d in domains.values()], fontsize="small")
    panel.set_ylabel("recovered (%)")
    panel.axhline(0, color="0.6", linewidth=0.8)
    if named:
        panel.legend(frameon=False, fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)
