"""The section on LOFT: answers and recall over a large corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.pages.cells import finished, number, source, with_interval

_METRICS = ("em", "subspan_em", "f1", "coverage")


def section(results: Path, docs: Path) -> str | None:
    """Markdown of the section; draws the plot beside the page.

    Args:
        results: Folder with loft.json.
        docs: Folder of the page.
    """
    record = finished(results / "loft.json")
    if record is None:
        return None
    lines = [
        "## LOFT",
        "",
        f"Retrieval over {record['documents']} documents of LOFT {record['set']}, {record['n']} questions, "
        f"`{record['llm']}` with the embedder `{record['embedder']}`; metrics as LOFT's evaluation defines them, in "
        "percent, with bootstrap 95 % intervals over questions. " + record["note"],
        "",
        f"{source(record)}.",
        "",
    ]
    if "in_context" in record:
        return "\n".join([*lines, *_in_context(record["in_context"])])
    if record["recall"]:
        lines += ["| k | " + " | ".join(record["recall"]) + " |", "|---|" + "---|" * len(record["recall"])]
        lines += ["| recall@k | " + " | ".join(number(v) for v in record["recall"].values()) + " |", ""]
    for k, rows in record["top"].items():
        lines += _table(f"Top {k}", rows)
    plot(record, docs / "loft.png")
    return "\n".join([*lines, "![F1 by the number of documents](loft.png)", ""])


def _table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    if "left_out" in rows[0]:
        return [f"### {title}", "", rows[0]["left_out"], ""]
    names = [name for name in _METRICS if name in rows[0]["loft"]]
    head = ["read as", "rate", "positions", *names, "NLL", "recovered", "F1 to text"]
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        change = (row["paired"] or {}).get("f1")
        cells = [row["mode"], number(row["achieved_rate"], 2), number(row["positions"], 0)]
        cells += [with_interval(row["loft"][name]["value"], row["loft"][name]["interval"]) for name in names]
        cells += [number(row["nll"], 2), number(row["recovered"])]
        cells.append("–" if not change or row["mode"] == "text" else _signed(change))
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _signed(change: dict[str, Any]) -> str:
    low, high = change["interval"]
    return f"{change['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"


def _in_context(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| read as | rate | positions | what came of it |", "|---|---|---|---|"]
    for row in rows:
        found = row.get("left_out") or ", ".join(f"{k} {v['value']:.1f}" for k, v in row["loft"].items())
        lines.append(f"| {row['mode']} | {number(row['rate'])} | {row['positions']:,} | {found} |")
    return [*lines, ""]


def plot(record: dict[str, Any], path: Path) -> None:
    """F1 over the number of documents, a line for each way of reading them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    panel = figure.subplots()
    lines: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for k, rows in record["top"].items():
        for row in rows:
            if "left_out" not in row:
                name = row["mode"] if row["rate"] is None else f"{row['mode']}, rate {row['rate']:g}"
                lines.setdefault(name, []).append((int(k), row["loft"]["f1" if "f1" in row["loft"] else "subspan_em"]))
    for name, points in lines.items():
        points.sort(key=lambda point: point[0])
        values = [p["value"] for _, p in points]
        low = [p["value"] - p["interval"][0] for _, p in points]
        high = [p["interval"][1] - p["value"] for _, p in points]
        panel.errorbar([k for k, _ in points], values, yerr=[low, high], marker="o", capsize=3, label=name)
    panel.set_xlabel("documents in the prompt (top k)")
    panel.set_ylabel("F1 (%)")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
