"""The page on quality: a section for each set, the plot of them, and the probes by what they ask for."""

from __future__ import annotations

from typing import Any

from benchmarks.cells import apart, difference, number, source, table, with_interval
from benchmarks.quality.quality import SETS
from compllm_rag.config import DEFAULT_LLM, CompressorConfig

_LAYER = 15  # at which the concepts enter that are the default of the embedded LLM
_UNIT = CompressorConfig().unit_length
_NARROWED = ("tab:green", "tab:olive", "tab:cyan")


def tables(record: dict[str, Any]) -> list[str]:
    """Lines of the page.

    Args:
        record: A record for each set by its name.
    """
    sets = [name for name in SETS if name in record]
    lines = [line for name in sets for line in _section(record[name])]
    over = "prefill cost" if _deep(record) else "the achieved rate"
    # A single set is no comparison; and pages may hold several records of one, beside those with a plot.
    lines += [f"![Recovered over {over}]({_picture(record[sets[0]])}.png)", ""] if len(sets) > 1 else []
    return lines + (_probes(record["probes"]) if "probes" in record else [])


def _picture(record: dict[str, Any]) -> str:
    """The name of a plot, another for each kind of concepts."""
    made = record["compressor"]
    if not made.get("entry_layer"):
        return "quality"
    if _elsewhere(record):
        return "quality_further"
    if made.get("unit_length", _UNIT) != _UNIT:
        return "quality_units"
    if _least(record) > 1:
        return "quality_pressed"
    return "quality_frozen" if _frozen(made) else "quality_deep"


def _section(record: dict[str, Any]) -> list[str]:
    choices = any(r["accuracy"] is not None for r in record["results"])
    answers = any(r["f1"] is not None for r in record["results"])
    deep = record["compressor"].get("entry_layer", 0)
    head = ["mode", "rate", *(["prefill cost"] if deep else []), "positions", "NLL", "ΔNLL", "recovered"]
    head += ["F1", "ΔF1", "EM", "ΔEM", "as text says"] if answers else []
    head += ["accuracy", "Δaccuracy"] if choices else []
    rows = []
    for row in record["results"]:
        cells = [_named(row), number(row["achieved_rate"], 2)]
        cells += [number(row["prefill_cost"], 2)] if deep else []
        cells.append(number(row["positions"], 0))
        cells += [_with(row, "nll", 2), _paired(row, "nll", 2), _with(row, "recovered")]
        if answers:
            cells += [_with(row, "f1"), _paired(row, "f1"), _with(row, "em"), _paired(row, "em")]
            cells.append(_with(row, "agreement"))
        if choices:
            cells += [_with(row, "accuracy"), _paired(row, "accuracy")]
        rows.append(cells)
    asked = f"{record['results'][0]['n']} questions; {source(record)}."
    kind = f"Deep concepts{_other(record)}" if deep else "Concepts at the input embeddings"
    return [f"## {kind}, {record['title']}", "", asked, "", *table(head, rows)]


def _probes(record: dict[str, Any]) -> list[str]:
    names = [f"{_named(r)} {r['rate']:g}" if r["rate"] else r["mode"] for r in record["results"]]
    first = record["kinds"][0]
    # A needle's depths in their order behind it: "needle at 25 %" by its number, everything else by name.
    order = sorted(first, key=lambda kind: [int(w) if w.isdigit() else -1 for w in kind.split()])
    order.sort(key=lambda kind: kind.split(" at ")[0])
    rows = [[k, str(first[k]["n"]), *(number(kinds[k]["f1"], 0) for kinds in record["kinds"])] for k in order]
    deep = record["compressor"].get("entry_layer")
    return [
        f"## {f'Deep concepts{_other(record)}' if deep else 'Concepts at the input embeddings'}, fidelity probes",
        "",
        "Short questions made by templates (`pipelines/build_probes.py`), F1 by what they ask for: what compression "
        f"loses, and what the reader cannot do even with text. `{record['command']}`.",
        "",
        *table(["kind", "n", *names], rows),
    ]


def _named(row: dict[str, Any]) -> str:
    """A mode, and how its concepts are narrowed; records of before know nothing of it."""
    way = row.get("narrowing")
    return row["mode"] if way is None else f"{row['mode']}, narrowed {way}"


def _other(record: dict[str, Any]) -> str:
    """What sets deep concepts apart from the default: another LLM or layer, higher rates alone, a frozen upper half."""
    made, llm = record["compressor"], record["llm"]
    named = "" if llm == DEFAULT_LLM else f" of {llm}"
    named += f", entry layer {made['entry_layer']}" if _elsewhere(record) else ""
    longest = made.get("unit_length", _UNIT)
    named += f", units of {longest} tokens" if longest != _UNIT else ""
    named += f", rates from {_least(record):g}" if _least(record) > 1 else ""
    return (
        named
        + (", the upper half frozen" if _frozen(made) else "")
        + (", whole and narrowed" if _narrows(record) else "")
    )


def _frozen(made: dict[str, Any]) -> bool:
    """Whether a trained compressor is read by the LLM as it is."""
    return bool(made.get("entry_layer") and made["lora_rank"] and not made.get("read_rank"))


def _elsewhere(record: dict[str, Any]) -> bool:
    """Whether the concepts enter the embedded LLM at another layer than its default one."""
    return bool(record["llm"] == DEFAULT_LLM and record["compressor"].get("entry_layer") not in (None, 0, _LAYER))


def _least(record: dict[str, Any]) -> float:
    """The lowest rate at which concepts were read; 1 where none were."""
    return min((float(row["rate"]) for row in record["results"] if row["rate"]), default=1.0)


def _narrows(record: dict[str, Any]) -> bool:
    return any(row.get("narrowing") for row in record["results"])


def _deep(record: dict[str, Any]) -> bool:
    """Whether the records are of deep concepts."""
    return any(one["compressor"].get("entry_layer") for one in record.values())


def _with(row: dict[str, Any], name: str, digits: int = 1) -> str:
    return with_interval(row[name], apart(row["intervals"].get(name)), digits, digits if digits > 1 else 0)


def _paired(row: dict[str, Any], name: str, digits: int = 1) -> str:
    """The difference to text with its interval; text itself has none."""
    return difference(None if row["mode"] == "text" else row["paired"].get(name), digits)


def plot(record: dict[str, Any]) -> Any:
    """Recovered over the achieved rate, or over the prefill cost of deep concepts; one panel a set."""
    from matplotlib.figure import Figure

    shown = [record[name] for name in SETS if name in record]
    columns = min(3, len(shown)) or 1
    rows = -(-len(shown) // columns) or 1
    figure = Figure(figsize=(3.4 * columns + 0.6, 3.0 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(shown) :]:
        panel.set_visible(False)
    over = "prefill_cost" if _deep(record) else "achieved_rate"
    for panel, one in zip(panels.flat, shown, strict=False):
        ways = dict.fromkeys(_named(row) for row in one["results"] if row.get("narrowing"))
        for mode, colour, marker in (
            ("concepts", "tab:blue", "o"),
            *((way, colour, "D") for way, colour in zip(ways, _NARROWED, strict=False)),
            ("random", "tab:orange", "^"),
            ("pruned", "tab:gray", "s"),
        ):
            points = [r for r in one["results"] if _named(r) == mode and r["recovered"] is not None]
            if not points:
                continue
            x, y = [r[over] for r in points], [r["recovered"] for r in points]
            low = [r["recovered"] - r["intervals"]["recovered"][0] for r in points]
            high = [r["intervals"]["recovered"][1] - r["recovered"] for r in points]
            panel.errorbar(x, y, yerr=[low, high], color=colour, marker=marker, capsize=3, label=mode)
        panel.axhline(100, color="0.7", linewidth=0.8)
        panel.axhline(0, color="0.7", linewidth=0.8)
        panel.set_title(one["title"], fontsize="medium")
        panel.set_xlabel(
            "prefill cost of a passage (text = 1)" if _deep(record) else "achieved rate (tokens per concept)"
        )
        panel.legend(frameon=False, fontsize="small")
    for panel in panels[:, 0]:
        panel.set_ylabel("recovered (%)")
    return figure
