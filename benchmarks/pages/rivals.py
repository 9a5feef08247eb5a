"""The section on rivals: our measurements, and in a table of its own what others published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.pages.cells import finished

PUBLISHED = Path(__file__).parents[1] / "published.json"
_COLOURS = ("tab:blue", "tab:orange", "tab:green")
# A rival can be far worse than no passages at all; below this the plot gives the number alone.
_LOWEST = -50.0


def section(results: Path, docs: Path) -> str | None:
    """Markdown of the section; draws the plot beside the page.

    Args:
        results: Folder with rivals.json.
        docs: Folder of the page.
    """
    record = finished(results / "rivals.json")
    if record is None:
        return None
    plot(record, docs / "rivals.png")
    lines = [
        "## Rivals",
        "",
        f"{record['n']} questions over {record['passages']} passages of `{record['data']}`: the same passages, prompt, "
        f"target LLM (`{record['llm']}`) and reader for all, and for each passage as many positions as its concepts "
        "take. LLMLingua is asked again until the tokens it leaves match; KV pruning keeps as many positions of the "
        "prompt in front of the question as a prompt with concepts has there. *KV* is the positions that an answer "
        "attends to, *prefilled* those that were computed for it: KV pruning saves memory, not prefill. Brackets are "
        "bootstrap 95 % intervals over questions; differences are paired. All in percent, but for NLL (nats per token) "
        "and positions.",
        "",
        f"`{record['command']}`, commit {record['environment']['commit'][:9]}.",
        "",
    ]
    if not record["trained"]:
        lines += ["The compressor is untrained here: its concepts are what pruning gives.", ""]
    fixed = [row for row in record["rivals"] if row["rate"] is None]
    for rate in record["rates"]:
        lines += _table(f"Rate {rate:g}", [*fixed, *(row for row in record["rivals"] if row["rate"] == rate)])
    lines += ["![F1 and recovered of each rival](rivals.png)", "", *_notes(record), *_published()]
    return "\n".join(lines)


def _table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    head = ["", "rate", "KV", "prefilled", "F1", "EM", "NLL", "recovered", "F1 to text", "F1 to concepts"]
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["title"], _number(row["achieved_rate"], 2), _number(row["kv_positions"], 0)]
        cells += [_number(row["prefilled_positions"], 0), _with(row, "f1"), _number(row["em"]), _number(row["nll"], 2)]
        cells += [_with(row, "recovered"), _difference(row["to_text"]), _difference(row["to_concepts"])]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


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
    for left in record["left_out"].values():
        how = (
            f" (`{left['how']}`)"
            if str(left["how"]).startswith("python")
            else f" ({left['how']})"
            if left["how"]
            else ""
        )
        lines.append(f"* {left['title']} was left out: {left['why']}{how}.")
    return [*lines, ""] if lines else []


def _published() -> list[str]:
    known = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    lines = ["### Published by others", "", known["note"], ""]
    for table in known["quality"]:
        head = ["system", *table["columns"]]
        lines += [f"{table['title']}: {table['source']}, {table['place']}; {table['metric']}.", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in table["rows"]:
            cells = [row["system"], *("–" if value is None else f"{value:g}" for value in row["values"])]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["Speed over text, each against a baseline of its own:", "", "| system | what | times | model | source |"]
    lines.append("|---|---|---|---|---|")
    for row in known["speed"]:
        source = f"{row['source']}, {row['place']}"
        lines.append(f"| {row['system']} | {row['what']} | {row['times']:g} | {row['model']} | {source} |")
    return [*lines, ""]


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _with(row: dict[str, Any], name: str) -> str:
    interval = row["intervals"].get(name)
    if row[name] is None:
        return "–"
    shown = f"{row[name]:.1f}"
    return f"{shown} [{interval[0]:.0f}, {interval[1]:.0f}]" if interval and interval[0] != interval[1] else shown


def _difference(paired: dict[str, Any] | None) -> str:
    found = (paired or {}).get("f1")
    if not found or found["interval"][0] == found["interval"][1]:
        return "–"
    low, high = found["interval"]
    return f"{found['difference']:+.1f} [{low:+.0f}, {high:+.0f}]"


def plot(record: dict[str, Any], path: Path) -> None:
    """F1 and recovered of each rival with their intervals, one colour a rate."""
    from matplotlib.figure import Figure

    shown = [row for row in record["rivals"] if row["rate"] is not None]
    titles = list(dict.fromkeys(row["title"] for row in shown))
    text = next(row for row in record["rivals"] if row["name"] == "text")
    rates = record["rates"]
    figure = Figure(figsize=(9.0, 1.4 + 0.36 * len(titles) * max(1, len(rates) * 0.7)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, metric, label in zip(panels, ("f1", "recovered"), ("F1 (%)", "recovered (%)"), strict=True):
        for number, rate in enumerate(rates):
            rows = [row for row in shown if row["rate"] == rate and row[metric] is not None]
            x = [row[metric] for row in rows]
            ends = [row["intervals"][metric] for row in rows]
            y = [titles.index(row["title"]) + 0.24 * (number - (len(rates) - 1) / 2) for row in rows]
            errors = [[max(0.0, v - e[0]) for v, e in zip(x, ends, strict=True)]]
            errors.append([max(0.0, e[1] - v) for v, e in zip(x, ends, strict=True)])
            colour = _COLOURS[number % len(_COLOURS)]
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
    figure.savefig(path, dpi=120)
