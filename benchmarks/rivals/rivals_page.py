"""The section on rivals: our measurements, and in a table of its own what others published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.cells import apart, difference, measured, number, table, with_interval

ALIKE = "Rivals trained alike"  # the section of `alike_page`
PUBLISHED = Path(__file__).parent / "published.json"
_COLOURS = ("tab:blue", "tab:orange", "tab:green")
# A rival can be far worse than no passages at all; below this the plot gives the number alone.
_LOWEST = -50.0
_HEAD = ("", "rate", "prefill cost", "KV", "prefilled", "F1", "EM", "NLL", "recovered", "F1 to text", "F1 to concepts")


def tables(record: dict[str, Any]) -> list[str]:
    """Lines of the section."""
    deep = record.get("entry_layer", 0)
    lines = [
        "## Rivals of deep concepts" if deep else "## Rivals",
        "",
        f"{record['n']} questions over {record['passages']} passages of `{record['data']}`: the same passages, prompt, "
        f"target LLM (`{record['llm']}`) and reader for all, and for each passage as many positions as its concepts "
        "take. LLMLingua is asked again until the tokens it leaves match; KV pruning keeps as many positions of the "
        "prompt in front of the question as a prompt with concepts has there. *KV* is the positions that an answer "
        "attends to, *prefilled* those that were computed for it: KV pruning saves memory, not prefill. Brackets are "
        "bootstrap 95 % intervals over questions; differences are paired. All in percent, but for NLL (nats per token) "
        "and positions.",
        "",
        f"{measured(record)}.",
        "",
    ]
    if deep:
        lines += [
            "A deep concept passes only the layers from its entry layer on: *prefill cost* is what a token of a "
            "passage costs, text = 1. BM25 reads the question before it chooses.",
            "",
        ]
    elif not record["trained"]:
        lines += ["The compressor is untrained here: its concepts are what pruning gives.", ""]
    for rate in record["rates"]:
        rows = [_cells(row) for among in (None, rate) for row in record["rivals"] if row["rate"] == among]
        costs = any("prefill_cost" in row for row in record["rivals"])
        shown = [row if costs else [*row[:2], *row[3:]] for row in rows]
        lines += [f"### Rate {rate:g}", "", *table(_HEAD if costs else [*_HEAD[:2], *_HEAD[3:]], shown)]
    lines += _equal_prefill(record) if deep else []
    picture = f"![F1 and recovered of each rival](rivals{'_deep' if deep else ''}.png)"
    return [*lines, picture, "", *_notes(record), *([] if deep else _published())]


def _equal_prefill(record: dict[str, Any]) -> list[str]:
    """Deep concepts against rivals whose passages cost as much to prefill."""
    head = ["prefill cost", "concepts, rate", "F1", "rival", "its rate", "its F1", "concepts over rival"]
    rows = []
    for pair in record["equal_prefill"]:
        cells = [number(pair["prefill_cost"], 2), f"{pair['concepts_rate']:g}", number(pair["f1_concepts"])]
        cells += [pair["title"], f"{pair['rate']:g}", number(pair["f1"]), difference(pair["concepts_to_rival"], 1, 0)]
        rows.append(cells)
    return ["### At equal prefill cost", "", *table(head, rows)] if rows else []


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["title"], number(row["achieved_rate"], 2), number(row.get("prefill_cost"), 2)]
    cells.append(number(row["kv_positions"], 0))
    cells += [number(row["prefilled_positions"], 0), with_interval(row["f1"], apart(row["intervals"].get("f1")))]
    cells += [number(row["em"]), number(row["nll"], 2)]
    cells.append(with_interval(row["recovered"], apart(row["intervals"].get("recovered"))))
    for found in ((row[to] or {}).get("f1") for to in ("to_text", "to_concepts")):
        cells.append(difference(found if found and apart(found["interval"]) else None, 1, 0))
    return cells


def _notes(record: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for row in record["rivals"]:
        notes, said = row["notes"], []
        if "versions" in notes:
            said.append(", ".join(f"{name} {version}" for name, version in notes["versions"].items()))
        if "asked_rate" in notes:
            asked, calls = 100 * notes["asked_rate"], notes["calls_per_passage"]
            within, off = 100 * notes["passages_within_tolerance"], 100 * notes["farthest_off"]
            said.append(f"asked to keep {asked:.0f} % (median) after {calls:.1f} calls a passage")
            said.append(f"{within:.0f} % of passages match within 2 %, the farthest is {off:.0f} % off")
        for name, what in (("check", "with nothing removed"), ("scorer_check", "as scorer")):
            if name in notes:
                here, there = notes[name]["nll_here"], notes[name]["nll_there"]
                said.append(f"the same LLM {what}: NLL {there:.4f} there, {here:.4f} here")
        if said:
            lines.append(f"* {row['title']} at rate {row['rate']:g}: " + "; ".join(said) + ".")
    for name, left in record["left_out"].items():
        how = f"`{left['how']}`" if str(left["how"]).startswith("python") else left["how"]
        lines.append(f"* {left['title']} was left out: {left['why']}" + (f" ({how})." if how else "."))
        if name == "llmlingua2":
            lines[-1] += f" Its recipe, trained here on a small encoder, is the row `lingua2` of *{ALIKE}*."
    return [*lines, ""] if lines else []


def _published() -> list[str]:
    known = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    lines = ["### Published by others", "", known["note"], ""]
    for part in known["quality"]:
        rows = [
            [row["system"], *("–" if value is None else f"{value:g}" for value in row["values"])]
            for row in part["rows"]
        ]
        lines += [f"{part['title']}: {part['source']}, {part['place']}; {part['metric']}.", ""]
        lines += table(["system", *part["columns"]], rows)
    rows = [
        [row["system"], row["what"], f"{row['times']:g}", row["model"], f"{row['source']}, {row['place']}"]
        for row in known["speed"]
    ]
    lines += ["Speed over text, each against a baseline of its own:", ""]
    return lines + table(["system", "what", "times", "model", "source"], rows)


def plot(record: dict[str, Any]) -> Any:
    """F1 and recovered of each rival with their intervals, one colour a rate."""
    from matplotlib.figure import Figure

    shown = [row for row in record["rivals"] if row["rate"] is not None]
    titles = list(dict.fromkeys(row["title"] for row in shown))
    text = next(row for row in record["rivals"] if row["name"] == "text")
    rates = record["rates"]
    figure = Figure(figsize=(9.0, 1.4 + 0.36 * len(titles) * max(1, len(rates) * 0.7)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, metric, label in zip(panels, ("f1", "recovered"), ("F1 (%)", "recovered (%)"), strict=True):
        for at, rate in enumerate(rates):
            rows = [row for row in shown if row["rate"] == rate and row[metric] is not None]
            x = [row[metric] for row in rows]
            ends = [row["intervals"][metric] for row in rows]
            y = [titles.index(row["title"]) + 0.24 * (at - (len(rates) - 1) / 2) for row in rows]
            errors = [[max(0.0, v - e[0]) for v, e in zip(x, ends, strict=True)]]
            errors.append([max(0.0, e[1] - v) for v, e in zip(x, ends, strict=True)])
            colour = _COLOURS[at % len(_COLOURS)]
            panel.errorbar(x, y, xerr=errors, fmt="o", capsize=3, color=colour, label=f"rate {rate:g}")
            for value, place in zip(x, y, strict=True):
                if value < _LOWEST:
                    panel.annotate(f"◂ {value:.0f}", (_LOWEST, place), color=colour, va="center", fontsize="small")
        if text[metric] is not None:
            panel.axvline(text[metric], color="0.4", linewidth=1, linestyle="--", label="text")
        panel.set_xlim(left=max(_LOWEST, panel.get_xlim()[0]))
        panel.set_xlabel(label)
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
    panels[0].set_yticks(range(len(titles)), titles)
    panels[0].invert_yaxis()
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(rates) + 1, frameon=False
    )
    return figure
