"""The section on kinds of text."""

from __future__ import annotations

from typing import Any

from benchmarks.cells import difference, number, source, table, with_interval

_SHADES = {"concepts": ("tab:blue", "lightskyblue", "steelblue"), "pruned": ("dimgray", "silver", "gray")}
Domains = dict[str, dict[str, Any]]


def tables(record: dict[str, Any]) -> list[str]:
    """Lines of the section."""
    asked = _asked(record["domains"])
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
        *_table(record["domains"], "perplexity", 1),
    ]
    if asked:
        lines += [
            "The same for the gold answers of questions, behind whole passages of up to "
            f"{record['longest']} tokens in the default prompt, one question a passage:",
            "",
            *_table(asked, "nll", 2),
        ]
    lines += ["![Recovered by kind of text](domains.png)", ""]
    lines += ["No text scored here was trained on, as far as is known; of its kind the shipped adapters saw:", ""]
    for domain in record["domains"].values():
        mix = domain["in_training_mix"] or "nothing"
        lines.append(f"* {domain['title']}, {domain['texts']} texts: {mix}. Taken: {domain['held_out']}.")
    return [*lines, ""]


def _asked(domains: Domains) -> Domains:
    return {name: domain | domain["answers"] for name, domain in domains.items() if domain["answers"]}


def _table(domains: Domains, metric: str, digits: int) -> list[str]:
    head = ["kind of text", "n", "read as", "rate", metric if metric != "nll" else "NLL", "recovered (%)"]
    rows = []
    for domain in domains.values():
        title, n = domain["title"], str(domain["n"])
        for row in domain["rows"]:
            cells = [title, n, row["mode"], number(row["achieved_rate"], 2)]
            cells.append(with_interval(row[metric], row[f"{metric}_interval"], digits, digits))
            cells.append(with_interval(row["recovered"], row["recovered_interval"]) if row["rate"] else "–")
            cells.append(difference(row["to_text"] if row["mode"] != "text" else None, 2))
            rows.append([*cells, difference(row["to_pruned"], 2)])
            title = n = ""
    return table([*head, "to text", "to pruning"], rows)


def plot(record: dict[str, Any]) -> Any:
    """Recovered by kind of text, concepts beside pruning at each rate: of continuations, and of answers."""
    from matplotlib.figure import Figure

    panels = [("continuation of the passage", record["domains"]), ("answers to questions", _asked(record["domains"]))]
    panels = [panel for panel in panels if panel[1]]
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
    return figure


def _bars(axis: Any, domains: Domains) -> None:
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
