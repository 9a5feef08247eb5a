"""The section on equal cost: quality over TTFT, and text against concepts where both cost the same."""

from __future__ import annotations

from typing import Any

from benchmarks.cells import difference, number, source, table, way, with_interval
from benchmarks.common import median_of_quotients


def tables(record: dict[str, Any]) -> list[str]:
    """Lines of the section."""
    head = ["read as", "rate", "documents", "positions", "TTFT (s)", "F1", "subspan EM", "NLL"]
    rows = []
    for row in record["rows"]:
        cells = [row["mode"], number(row["achieved_rate"], 2), str(row["k"]), number(row["positions"], 0)]
        cells += [number(row.get("ttft_s"), 2), with_interval(row["f1"], row["interval"]), number(row["subspan_em"])]
        rows.append([*cells, number(row["nll"], 2)])
    return [
        "## Equal cost of deep concepts" if record.get("entry_layer") else "## Equal cost",
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
        *table(head, rows),
        "At the most equal prompt positions:",
        "",
        *_pairs(record["equal_positions"], record["rows"]),
        *_prefill(record),
        "At the most equal TTFT:",
        "",
        *_pairs(record["equal_ttft"], record["rows"]),
        f"![F1 over TTFT](equal_cost{'_deep' if record.get('entry_layer') else ''}.png)",
        "",
    ]


def _prefill(record: dict[str, Any]) -> list[str]:
    """Deep concepts alone: at the input embeddings, positions are the cost."""
    if not record.get("entry_layer"):
        return []
    head = "At the most equal prefill (positions times the share of the layers that each passes):"
    return [head, "", *_pairs(record["equal_prefill"], record["rows"])]


def _pairs(pairs: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[str]:
    head = ["text, top", "concepts, top", "rate", "cost / text", "TTFT / text", "F1 text", "F1 concepts", "difference"]
    several = any(pair.get("mode", "concepts") != "concepts" for pair in pairs)
    if several:
        head = ["read as", *(cell.replace("concepts", "these") for cell in head)]
    known = {(row["mode"], row["rate"], row["k"]): row["ttft_all_s"] for row in rows if "ttft_all_s" in row}
    shown = []
    for pair in pairs:
        mode = pair.get("mode", "concepts")
        mine, theirs = known.get((mode, pair["rate"], pair["concepts_k"])), known["text", None, pair["text_k"]]
        cells = [mode] if several else []
        cells += [str(pair["text_k"]), str(pair["concepts_k"]), f"{pair['rate']:g}", f"{pair['cost_ratio']:.2f}"]
        if mine is None:
            cells.append("–")
        else:
            ratio = median_of_quotients(mine, theirs)  # of the same question in the same round
            cells.append(with_interval(ratio["median"], (ratio["min"], ratio["max"]), 2, 2))
        shown.append([*cells, number(pair["f1_text"]), number(pair["f1_concepts"]), difference(pair)])
    return table(head, shown)


def plot(record: dict[str, Any]) -> Any:
    """F1 over TTFT, a point for each setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    panel = figure.subplots()
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        if "ttft_s" in row:
            groups.setdefault(way(row), []).append(row)
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
    return figure
