"""The section on LOFT: answers and recall over a large corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.pages.cells import finished, number, source, with_interval

# Percent: with this recall of one document, more of them cannot help.
_EASY = 99.0
_METRICS = ("em", "subspan_em", "f1", "coverage")


def section(results: Path, docs: Path) -> str | None:
    """Markdown of the section; draws the plot beside the page.

    Args:
        results: Folder with loft.json, loft_in_context.json or both.
        docs: Folder of the page.
    """
    retrieved, whole = finished(results / "loft.json"), finished(results / "loft_in_context.json")
    if retrieved is None and whole is None:
        return None
    lines = ["## LOFT", ""]
    if retrieved is not None:
        lines += _retrieved(retrieved)
        plot(retrieved, docs / "loft.png")
        lines += ["![Answers by the number of documents](loft.png)", ""]
    if whole is not None:
        lines += _in_context(whole)
    return "\n".join(lines)


def _retrieved(record: dict[str, Any]) -> list[str]:
    lines = [
        f"Retrieval over {record['documents']} documents of LOFT {record['set']}, {record['n']} questions, "
        f"`{record['llm']}` with the embedder `{record['embedder']}`; metrics as LOFT's evaluation defines them, in "
        "percent, with bootstrap 95 % intervals over questions. " + record["note"],
        "",
        f"{source(record)}.",
        "",
    ]
    if record["recall"]:
        lines += ["| k | " + " | ".join(record["recall"]) + " |", "|---|" + "---|" * len(record["recall"])]
        lines += ["| recall@k | " + " | ".join(number(v) for v in record["recall"].values()) + " |", ""]
        if record["recall"]["1"] >= _EASY:
            lines += [
                f"The gold document is the first one found for {number(record['recall']['1'])} % of these questions, "
                "so that more documents only distract; the section on equal cost takes a corpus where the first one is "
                "not always the right one.",
                "",
            ]
    for k, rows in record["top"].items():
        lines += _table(f"Top {k}", rows)
    return lines


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


def _in_context(record: dict[str, Any]) -> list[str]:
    lines = [
        "### Corpus in context",
        "",
        f"All {record['documents']} documents of LOFT {record['set']} in one prompt in LOFT's layout, with "
        f"{record['examples']} answered examples; {record['n']} questions, `{record['llm']}`. " + record["note"],
        "",
        f"{source(record)}.",
        "",
        "| read as | rate | positions | what came of it |",
        "|---|---|---|---|",
    ]
    for row in record["in_context"]:
        scored = row.get("loft", {})
        parts = [f"{name} {with_interval(made['value'], made['interval'])}" for name, made in scored.items()]
        found = row.get("left_out") or ", ".join(parts)
        lines.append(f"| {row['mode']} | {number(row['rate'])} | {row['positions']:,} | {found} |")
    return [*lines, ""]


def plot(record: dict[str, Any], path: Path) -> None:
    """F1, or of lists subspan EM, over the number of documents: a line for each way of reading them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    panel = figure.subplots()
    lines: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    made = [row["loft"] for rows in record["top"].values() for row in rows if "loft" in row]
    metric = "f1" if all("f1" in row for row in made) else "subspan_em"
    for k, rows in record["top"].items():
        for row in rows:
            if "left_out" not in row:
                name = row["mode"] if row["rate"] is None else f"{row['mode']}, rate {row['rate']:g}"
                lines.setdefault(name, []).append((int(k), row["loft"][metric]))
    for name, points in lines.items():
        points.sort(key=lambda point: point[0])
        values = [p["value"] for _, p in points]
        low = [p["value"] - p["interval"][0] for _, p in points]
        high = [p["interval"][1] - p["value"] for _, p in points]
        panel.errorbar([k for k, _ in points], values, yerr=[low, high], marker="o", capsize=3, label=name)
    panel.set_xticks([int(k) for k in record["top"]])
    panel.set_xlabel("documents in the prompt (top k)")
    panel.set_ylabel({"f1": "F1 (%)", "subspan_em": "subspan EM (%)"}[metric])
    panel.set_ylim(bottom=0)
    if lines:
        panel.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
