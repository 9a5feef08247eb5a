"""The section on rivals trained alike: what each row is, which needs no measurement, then what was measured."""

from __future__ import annotations

from typing import Any

from benchmarks.cells import apart, difference, measured, number, table, with_interval
from benchmarks.rivals.trained.about import KINDS

_HEAD = ["", "rate", "positions", "prefill cost", "KV", "stored", "learned", "steps"]
_HEAD += ["held-out, start", "held-out, end", "F1", "recovered", "F1 to ours", "recovered to ours"]
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
# A row can be far worse than no passages at all.
_LOWEST = -50.0


def about() -> list[str]:
    """What rows there are: the section as far as nothing was measured."""
    rows = [[f"`{name}`", kind.title, kind.what, kind.after, kind.differs] for name, kind in KINDS.items()]
    return [
        "## Rivals trained alike",
        "",
        "Rows after the systems that the seed article compares with, and a few of our own, each from nothing: the same "
        "frozen LLM and reader, the same training examples in the same order (questions over one to six passages, "
        "distractors among them), as many minutes of one CPU thread, LoRA of one rank on the same layers, one learning "
        "rate for LoRA and twice that for what else is learned, tuned for none of them. They learn by cross-entropy of "
        "the gold answers and KL to the LLM that reads text, where nothing else is said. `lingua2` alone trains all of "
        "an encoder, at a learning rate of its own, and learns by labels of words; of the LLM it has nothing but the "
        "tokens. Minutes on a CPU say which "
        "way learns soonest; the papers trained for GPU-days, and none of their figures is to be expected here.",
        "",
        *table(["row", "", "what stands for a passage, what is learned", "after", "differs"], rows),
    ]


def tables(record: dict[str, Any]) -> list[str]:
    """Lines of the section."""
    text, none = record["text"], record["none"]
    fixed = []
    for title, made, cost in (("text", text, "1.00"), ("no passages", none, "–")):
        cells = [title, "–", number(made["positions"], 0), cost, cost, "–", "–", "–", "–", "–"]
        cells.append(with_interval(made["f1"], apart(made["intervals"]["f1"])))
        fixed.append([*cells, number(made["recovered"]), "–", "–"])
    return [
        *about(),
        f"{record['n']} questions over {record['passages']} passages of `{record['data']}`, `{record['llm']}` of "
        f"{record['depth']} layers, L = {record['entry_layer']}, {record['minutes']:g} minutes each. *Prefill cost*, "
        "*KV* and *positions* are what a passage takes when a question comes, prefill and KV as shares of text (a "
        "concept passes the layers from its entry layer on; of KV-Distill nothing is prefilled, keys and values of all "
        "layers are read from the store); *stored* is numbers kept for each source token; *held-out* is NLL (nats "
        "per token) on training questions that were kept out, before and after training. Brackets are bootstrap 95 % "
        "intervals over questions; *to ours* is paired with `deep` at the same rate (xRAG: rate 2).",
        "",
        f"{measured(record)}.",
        "",
        *table(_HEAD, [*fixed, *map(_cells, record["rows"])]),
        *(f"* `{word}` was left out: {why}" for word, why in record["left_out"].items()),
        *([""] if record["left_out"] else []),
        *_not_run(record),
        "![Held-out loss over minutes, and what is recovered](alike.png)",
        "",
    ]


def _not_run(record: dict[str, Any]) -> list[str]:
    """Which rows nobody asked for."""
    met = {word.split("@")[0] for word in [*(row["name"] for row in record["rows"]), *record["left_out"]]}
    missing = [f"`{name}`" for name in KINDS if name not in met]
    return [f"Not run: {', '.join(missing)}.", ""] if missing else []


def _cells(row: dict[str, Any]) -> list[str]:
    cost, to, curve = row["cost"], row["to_ours"] or {}, row["curve"]
    cells = [row["title"], number(row["achieved_rate"], 2), number(row["positions"], 0)]
    cells += [number(cost["prefill"], 3), number(cost["kv"], 3), number(cost["stored"], 0), f"{row['learned']:,}"]
    cells += [f"{row['steps']:,}", number(curve[0]["nll"], 2), number(curve[-1]["nll"], 2)]
    cells += [with_interval(row[name], apart(row["intervals"][name])) for name in ("f1", "recovered")]
    return cells + [difference(to.get(name), 1, 0) for name in ("f1", "recovered")]


def plot(record: dict[str, Any]) -> Any:
    """Held-out loss over minutes of each row, and recovered over prefill cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    curves, costs = figure.subplots(1, 2)
    for at, row in enumerate(record["rows"]):
        colour, style = _COLOURS[at % len(_COLOURS)], "-" if at < len(_COLOURS) else "--"
        points = row["curve"]
        curves.plot(
            [p["minutes"] for p in points], [p["nll"] for p in points], style, marker=".", color=colour,
            label=row["title"],
        )  # fmt: skip
        value, ends = row["recovered"], row["intervals"]["recovered"]
        if value is None or not ends:
            continue
        errors = [[max(0.0, value - ends[0])], [max(0.0, ends[1] - value)]]
        face = colour if style == "-" else "white"
        costs.errorbar(
            row["cost"]["prefill"], max(_LOWEST, value), yerr=errors, fmt="o", color=colour, markerfacecolor=face,
            capsize=3,
        )  # fmt: skip
    for name, label in (("nll_text", "text"), ("nll_none", "no passages")):
        level = next((row[name] for row in record["rows"]), 0.0)
        curves.axhline(level, color="0.5", linewidth=0.8, linestyle=":")
        curves.annotate(label, (0, level), fontsize="x-small", color="0.4", va="bottom")
    curves.set_xlabel("minutes of one CPU thread")
    curves.set_ylabel("held-out NLL (nats per token)")
    costs.axhline(100, color="0.7", linewidth=0.8)
    costs.set_ylim(bottom=max(_LOWEST, costs.get_ylim()[0]))
    costs.set_xlabel("prefill cost of a passage (text = 1)")
    costs.set_ylabel("recovered on SQuAD dev (%)")
    figure.legend(
        *curves.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize="small"
    )
    return figure
