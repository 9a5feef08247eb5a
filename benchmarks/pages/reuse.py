"""The section on reuse: what a query costs when passages come again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.pages.cells import finished, number, source


def section(results: Path, docs: Path) -> str | None:
    """Markdown of the section; draws the plot beside the page.

    Args:
        results: Folder with reuse.json.
        docs: Folder of the page.
    """
    record = finished(results / "reuse.json")
    if record is None:
        return None
    plot(record, docs / "reuse.png")
    costs = record["costs"]
    lines = [
        "## Reuse",
        "",
        f"{record['queries']:,} queries over {record['passages']} passages ({record['source_tokens']:,} tokens), "
        f"{record['k']} passages each, drawn by Zipf with exponent {record['exponent']:g}, seed {record['seed']}; and "
        f"conversations of {record['turns']} turns, each turn one more passage. The streams are simulated, with costs "
        f"measured on `{record['llm']}`: {1000 * costs['compress']:.2f} ms to compress a token, "
        f"{1000 * costs['fetch']:.1f} ms to fetch a chunk's concepts, {1000 * costs['kv_load']:.1f} ms to load its KV "
        "cache from a warm disk. *Amortised* includes ingesting all passages. The prefix cache never evicts. Chunk KV "
        "is priced, its answers are not judged.",
        "",
        f"Per source token concepts take {costs['concept_bytes']:,.0f} bytes and KV {costs['kv_bytes']:,.0f}, "
        f"{costs['kv_bytes'] / costs['concept_bytes']:.0f} times as much.",
        "",
        f"{source(record)}.",
        "",
    ]
    for name, found in record["streams"].items():
        lines += _table(name, found)
    return "\n".join([*lines, "![Amortised cost of a query](reuse.png)", ""])


def _table(name: str, found: dict[str, Any]) -> list[str]:
    lines = [
        f"### {name.capitalize()}: {found['reused']:.1f} % of the tokens read had been read before",
        "",
        "| | ingestion (s) | positions a query | seconds a query | amortised over 100 | cheaper than text from query "
        "| than the prefix cache from |",
        "|---|---|---|---|---|---|---|",
    ]
    for system, row in found["systems"].items():
        amortised = row["amortised_s"].get("100")
        cells = [system, number(row["ingest_s"]), number(row["positions_per_query"], 0), number(row["per_query_s"], 3)]
        cells.append(number(amortised, 3))
        cells += ["–" if system == "text" else _query(row["breaks_even_with_text"])]
        cells += ["–" if system == "text, prefix cache" else _query(row["breaks_even_with_prefix_cache"])]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _query(number_: int | None) -> str:
    return "never" if number_ is None else f"{number_:,}"


def plot(record: dict[str, Any], path: Path) -> None:
    """Amortised seconds over the number of queries, a panel for each stream."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    panels = figure.subplots(1, len(record["streams"]), squeeze=False)[0]
    for panel, (name, found) in zip(panels, record["streams"].items(), strict=True):
        for system, row in found["systems"].items():
            x = [int(q) for q in row["amortised_s"]]
            panel.plot(x, list(row["amortised_s"].values()), marker="o", markersize=3, label=system)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(name, fontsize="medium")
        panel.set_xlabel("queries")
        panel.set_ylabel("seconds per query, ingestion included")
    panels[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
