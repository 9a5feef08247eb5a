"""The section on equal cost: quality over TTFT, and text against concepts where both cost the same."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.pages.cells import finished, number, source, with_interval


def section(results: Path, docs: Path) -> str | None:
    """Markdown of the section; draws the plot beside the page.

    Args:
        results: Folder with equal_cost.json.
        docs: Folder of the page.
    """
    record = finished(results / "equal_cost.json")
    if record is None:
        return None
    plot(record, docs / "equal_cost.png")
    lines = [
        "## Equal cost",
        "",
        f"{record['set']}, {record['n']} questions, `{record['llm']}`: fewer documents as text against more of "
        f"them as concepts. TTFT is the median over {record['timed']} of the questions, from a warm store, all "
        "settings in turns. Brackets are bootstrap 95 % intervals over questions, of TTFT ratios the least and the "
        "most over the same questions in the same rounds; differences are paired. " + record["note"],
        "",
        f"{source(record)}.",
        "",
        "Recall of the document with the answer: "
        + ", ".join(f"{number(v)} % at {k}" for k, v in record["recall"].items())
        + f", of {record['documents']} documents.",
        "",
        "| read as | rate | documents | positions | TTFT (s) | F1 | subspan EM | NLL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        cells = [row["mode"], number(row["achieved_rate"], 2), str(row["k"]), number(row["positions"], 0)]
        cells += [number(row["ttft_s"], 2), with_interval(row["f1"], row["interval"]), number(row["subspan_em"])]
        lines.append("| " + " | ".join([*cells, number(row["nll"], 2)]) + " |")
    for name, title in (("equal_positions", "prompt positions"), ("equal_ttft", "TTFT")):
        lines += ["", f"At the most equal {title}:", "", *_pairs(record[name], record["rows"])]
    return "\n".join([*lines, "", "![F1 over TTFT](equal_cost.png)", ""])


def _pairs(pairs: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[str]:
    head = ["text, top", "concepts, top", "rate", "cost / text", "TTFT / text", "F1 text", "F1 concepts", "difference"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    known = {(row["mode"], row["rate"], row["k"]): row["ttft_all_s"] for row in rows}
    for pair in pairs:
        low, high = pair["interval"]
        timed = known["concepts", pair["rate"], pair["concepts_k"]], known["text", None, pair["text_k"]]
        cells = [str(pair["text_k"]), str(pair["concepts_k"]), f"{pair['rate']:g}", f"{pair['cost_ratio']:.2f}"]
        cells += [_ratio(*timed), number(pair["f1_text"]), number(pair["f1_concepts"])]
        lines.append("| " + " | ".join([*cells, f"{pair['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"]) + " |")
    return lines


def _ratio(over: list[float], under: list[float]) -> str:
    """Median and range of quotients of the same question in the same round."""
    quotients = [a / b for a, b in zip(over, under, strict=True)]
    return f"{statistics.median(quotients):.2f} [{min(quotients):.2f}, {max(quotients):.2f}]"


def plot(record: dict[str, Any], path: Path) -> None:
    """F1 over TTFT, a point for each setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    panel = figure.subplots()
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        name = row["mode"] if row["rate"] is None else f"{row['mode']}, rate {row['rate']:g}"
        groups.setdefault(name, []).append(row)
    for name, rows in groups.items():
        x, y = [row["ttft_s"] for row in rows], [row["f1"] for row in rows]
        low = [max(0.0, row["f1"] - row["interval"][0]) for row in rows]
        high = [max(0.0, row["interval"][1] - row["f1"]) for row in rows]
        panel.errorbar(x, y, yerr=[low, high], marker="o", capsize=3, linewidth=1, label=name)
        for row in rows:
            panel.annotate(f"{row['k']}", (row["ttft_s"], row["f1"]), textcoords="offset points", xytext=(5, 5))
    panel.set_xlabel("TTFT (s); numbers at the points are documents in the prompt")
    panel.set_ylabel("F1 (%)")
    panel.set_ylim(bottom=0)
    panel.set_xlim(left=0)
    panel.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
