"""The section on LOFT: answers and recall over a large corpus."""

from __future__ import annotations

from typing import Any

from benchmarks.cells import difference, number, source, table, way, with_interval

# Percent: with this recall of one document, more of them cannot help.
_EASY = 99.0
_METRICS = ("em", "subspan_em", "f1", "coverage")


def tables(record: dict[str, Any]) -> list[str]:
    """Lines of the section, after retrieval or of the corpus in context."""
    title = "## LOFT with deep concepts" if record.get("entry_layer") else "## LOFT"
    return [title, "", *(_in_context(record) if "in_context" in record else _retrieved(record))]


def _retrieved(record: dict[str, Any]) -> list[str]:
    lines = [
        f"Retrieval over {record['documents']} documents of LOFT {record['set']}, {record['n']} questions, "
        f"`{record['llm']}` with the embedder `{record['embedder']}`; metrics as LOFT's evaluation defines them, in "
        "percent, with bootstrap 95 % intervals over questions. " + record["note"],
        "",
        f"{source(record)}.",
        "",
    ]
    recall = record["recall"]
    if recall:
        lines += table(["k", *recall], [["recall@k", *map(number, recall.values())]])
    if recall and recall["1"] >= _EASY:
        lines += [
            f"The gold document is the first one found for {number(recall['1'])} % of these questions, so that more "
            "documents only distract; the section on equal cost takes a corpus where the first one is not always the "
            "right one.",
            "",
        ]
    for k, rows in record["top"].items():
        lines += [f"### Top {k}", "", *([rows[0]["left_out"], ""] if "left_out" in rows[0] else _table(rows))]
    picture = "loft_deep.png" if record.get("entry_layer") else "loft.png"
    return [*lines, f"![Answers by the number of documents]({picture})", ""]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    names = [name for name in _METRICS if name in rows[0]["loft"]]
    shown = []
    for row in rows:
        cells = [row["mode"], number(row["achieved_rate"], 2), number(row["positions"], 0)]
        cells += [with_interval(row["loft"][name]["value"], row["loft"][name]["interval"]) for name in names]
        cells += [number(row["nll"], 2), number(row["recovered"])]
        shown.append([*cells, difference((row["paired"] or {}).get("f1") if row["mode"] != "text" else None)])
    return table(["read as", "rate", "positions", *names, "NLL", "recovered", "F1 to text"], shown)


def _in_context(record: dict[str, Any]) -> list[str]:
    rows = []
    for row in record["in_context"]:
        scored = row.get("loft", {})
        parts = [f"{name} {with_interval(made['value'], made['interval'])}" for name, made in scored.items()]
        found = row.get("left_out") or ", ".join(parts)
        rows.append([row["mode"], number(row["rate"]), f"{row['positions']:,}", found])
    return [
        "### Corpus in context",
        "",
        f"All {record['documents']} documents of LOFT {record['set']} in one prompt in LOFT's layout, with "
        f"{record['examples']} answered examples; {record['n']} questions, `{record['llm']}`. " + record["note"],
        "",
        f"{source(record)}.",
        "",
        *table(["read as", "rate", "positions", "what came of it"], rows),
    ]


def plot(record: dict[str, Any]) -> Any:
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
                lines.setdefault(way(row), []).append((int(k), row["loft"][metric]))
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
    return figure
