"""The section on rates that follow the text."""

from __future__ import annotations

from typing import Any

from benchmarks.cells import difference, number, source, table, with_interval
from benchmarks.rates.rows import group_of

_LOOKS = {
    "fixed": ("dimgray", "o", "fixed"),
    "information": ("tab:blue", "s", "information"),
    "learned": ("tab:orange", "^", "learned"),
    "budget": ("tab:green", "D", "budget"),
    "random": ("silver", "x", "random places"),
    "BM25": ("tab:red", "v", "BM25 sentences"),
}
# Panels of a set: what stands on its axes, by the keys of a row.
_PANELS = (
    ("prefill_cost", "recovered", "prefill cost (text = 1)", "recovered (%)"),
    ("prefill_cost", "f1", "prefill cost (text = 1)", "F1"),
    ("passage_positions", "f1", "positions (text = 1)", "F1"),
)
Rows = dict[str, dict[str, Any]]


def tables(record: dict[str, Any]) -> list[str]:
    """Lines of the section."""
    lines = ["## Rates that follow the text", "", *_about(record), f"{source(record)}.", ""]
    for group, why in record["unavailable"].items():
        lines += [f"No row `{group}`: {why}.", ""]
    for name, made in record["sets"].items():
        lines += [f"### {name}, {made['n']} questions", "", *_table(made["rows"]), *_over(made["over_rivals"])]
    if record["sets"]:
        lines += ["![Recovered and F1 over prefill cost, F1 over positions](rates.png)", ""]
    claims = {name: made["claim"] for name, made in record["sets"].items() if made["claim"]}
    if claims:
        lines += ["### The claim of the seed article", "", *(_said(name, each) for name, each in claims.items()), ""]
    if record["probes"]:
        lines += _probes(record["probes"])
    if record["kinds"] and record["kinds"]["kinds"]:
        lines += _kinds(record["kinds"])
    return lines


def _about(record: dict[str, Any]) -> list[str]:
    return [
        f"`{record['llm']}` ({record['dtype']}), the first {record['limit']} questions of a seeded order in each set, "
        "their passages whole. *Prefill cost* and *positions* are those of a token of the passages, text = 1: a deep "
        "concept takes one position, and passes but the layers behind its entry layer. Brackets are bootstrap 95 % "
        "intervals over questions, Δ F1 is paired with text. A budget is shared out over all passages of a set, in "
        "shares of their tokens.",
        "",
        "Rivals take the prefill of a fixed rate. *random*: as many deep concepts, at places taken by chance. *BM25 "
        "sentences*: as text, the sentences that answer best to the words of the question, as many as fit, and what "
        "the titles of passages left out would take is spent on them, too; the last is cut off where the budget ends. "
        "They are chosen when the question is known, which concepts that were made at ingestion cannot be.",
        "",
    ]


def _table(rows: Rows) -> list[str]:
    cells = [
        [
            name,
            number(row["prefill_cost"], 3),
            number(row["passage_positions"], 3),
            number(row["achieved_rate"], 2),
            with_interval(row["recovered"], row["recovered_interval"]),
            with_interval(row["f1"], row["f1_interval"]),
            difference(row["to_text"]["f1"] if name != "text" else None, 1),
            number(row["passages_as_text"], 0),
        ]
        for name, row in rows.items()
    ]
    head = [
        "rates",
        "prefill cost",
        "positions",
        "achieved rate",
        "recovered (%)",
        "F1",
        "Δ F1 to text",
        "left as text",
    ]
    return table(head, cells)


def _over(pairs: list[dict[str, Any]]) -> list[str]:
    if not pairs:
        return []
    cells = [[each["row"], each["rival"], difference(each["f1"]), difference(each["recovered"])] for each in pairs]
    return table(["fixed − rival", "rival", "Δ F1", "Δ recovered"], cells)


def _said(name: str, claim: dict[str, Any]) -> str:
    if claim["achieved_rate"] is None or claim["f1_lost_percent"] is None:
        return f"* {name}: nothing to tell."
    verdict = "holds" if claim["holds"] else "does not hold"
    return (
        f"* {name}: bands 1.5-2, 2-3 and 3-4 gave a mean rate of {claim['achieved_rate']:.2f} and lost "
        f"{claim['f1_lost_percent']:.1f} % of text's F1. The claim (2.5 at less than 1 %) {verdict}."
    )


def _probes(probes: dict[str, dict[str, Any]]) -> list[str]:
    """F1 of each row, and what it cost, a column a kind."""
    labels = list(dict.fromkeys(label for made in probes.values() for label in made["rows"]))
    cells = [[label, *(_probe_cell(made["rows"].get(label)) for made in probes.values())] for label in labels]
    return [
        "### By kind of probe",
        "",
        "F1 on the fidelity probes that ship with the package, short passages made by templates, and behind it the "
        "prefill cost and the positions of a passage token. A budget is shared out over the passages of a kind.",
        "",
        *table(["rates", *(f"{kind}, n = {made['n']}" for kind, made in probes.items())], cells),
    ]


def _probe_cell(row: dict[str, Any] | None) -> str:
    if row is None or row["f1"] is None:
        return "–"
    told = with_interval(row["f1"], row["f1_interval"], 0)
    return f"{told}; {number(row['prefill_cost'], 2)}, {number(row['passage_positions'], 2)}"


def _kinds(found: dict[str, Any]) -> list[str]:
    """What each policy chooses, a row a kind of text."""
    labels = list(dict.fromkeys(label for made in found["kinds"].values() for label in made["policies"]))
    learned = any(
        row["left_as_text"] is not None for made in found["kinds"].values() for row in made["policies"].values()
    )
    cells = [
        [
            title,
            str(made["n"]),
            f"{100 * made['left_as_text']:.0f}",
            *(_kind_cell(made["policies"][label]) for label in labels),
        ]
        for title, made in found["kinds"].items()
    ]
    unit = (
        "what the compressor's learned losses predict, in nats per token of an answer"
        if learned
        else "the share of the information that is dropped, because the compressor has no learned losses"
    )
    return [
        "### By kind of text",
        "",
        f"What each policy chooses for chunks of about {found['chunk_size']} tokens: the mean rate, and the loss that "
        f"is predicted at it ({unit})"
        + (", and the share of chunks that guard `loss` would leave as text" if learned else "")
        + ". *Guard exact* is the share of chunks that this guard leaves as text, whatever the policy. Nothing is "
        "asked here, and some of these texts were trained on.",
        "",
        *table(["kind of text", "chunks", "guard exact (%)", *labels], cells),
    ]


def _kind_cell(row: dict[str, Any]) -> str:
    told = f"{row['achieved_rate']:.2f}, loss {row['predicted_loss']:.2f}"
    return told if row["left_as_text"] is None else f"{told}, {100 * row['left_as_text']:.0f} % left"


def plot(record: dict[str, Any]) -> Any:
    """Three panels a set: recovered and F1 over prefill cost, F1 over positions; text and no passages are lines."""
    from matplotlib.figure import Figure

    sets = record["sets"]
    figure = Figure(figsize=(10.5, 1.0 + 3.0 * len(sets)), layout="constrained")
    grid = figure.subplots(len(sets), len(_PANELS), squeeze=False)
    for axes, (name, made) in zip(grid, sets.items(), strict=True):
        for axis, (x, y, across, up) in zip(axes, _PANELS, strict=True):
            _draw(axis, made["rows"], x, y)
            axis.set_title(name, fontsize="medium")
            axis.set_xlabel(across)
            axis.set_ylabel(up)
    found = [each for axis in grid.ravel() for each in zip(*axis.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in reversed(found)}
    names = [name for name in ("text", "no passages", *(look[2] for look in _LOOKS.values())) if name in handles]
    figure.legend([handles[n] for n in names], names, loc="outside upper center", ncols=4, frameon=False)
    return figure


def _draw(axis: Any, rows: Rows, x: str, y: str) -> None:
    for label, name, style in (("text", "text", "--"), ("none", "no passages", ":")):
        if rows[label][y] is not None:
            axis.axhline(rows[label][y], color="black", linestyle=style, linewidth=0.9, label=name)
    for group, (colour, marker, name) in _LOOKS.items():
        shown = [row for label, row in rows.items() if group_of(label) == group and row[y] is not None]
        shown.sort(key=lambda row: row[x])
        if shown:
            across, up = [row[x] for row in shown], [row[y] for row in shown]
            axis.plot(across, up, color=colour, marker=marker, label=name, linewidth=1, markersize=5)
