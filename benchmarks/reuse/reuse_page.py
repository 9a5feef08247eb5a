"""The section on reuse: what a query costs when passages come again."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.cells import number, source, table


def tables(record: dict[str, Any]) -> list[str]:
    """Lines of the section."""
    costs = record["costs"]
    rounds = record["costs_all_s"]
    lines = [
        "## Reuse of deep concepts" if record.get("entry_layer") else "## Reuse",
        "",
        f"{record['queries']:,} queries over {record['passages']} passages ({record['source_tokens']:,} tokens, "
        f"{record['concepts']:,} concepts), {record['k']} passages each, drawn by Zipf with exponent "
        f"{record['exponent']:g}, seed {record['seed']}; and conversations of {record['turns']} turns, each turn one "
        "more passage behind what was said before. The streams are simulated over these passages in the default "
        "prompt, "
        f"with costs measured on `{record['llm']}`, in brackets least and most of {record['repeats']} rounds:",
        "",
        f"- {1000 * costs['compress']:.2f} ms to compress a token and store its concepts{_spread(rounds['compress'])}",
        f"- {1000 * costs['fetch']:.2f} ms to fetch a passage's concepts from a warm disk{_spread(rounds['fetch'])}",
        f"- {1000 * costs['kv_load']:.1f} ms to load its KV cache from there{_spread(rounds['kv_load'])}, "
        f"{1000 * costs['kv_store']:.1f} ms to store it{_spread(rounds['kv_store'])}",
        "",
        "*Amortised* includes ingesting all passages; *lazy* compresses each when it is first read. The prefix cache "
        "keeps everything in memory and never evicts. Chunk KV is priced, its answers are not judged. KV is counted in "
        "fp16, as concepts are: "
        f"{costs['kv_bytes']:,.0f} bytes a token, {_times(record)} times as much as concepts take for it.",
        "",
        f"{source(record)}.",
        "",
    ]
    for name, found in record["streams"].items():
        lines += _table(name, found)
    picture = "reuse_deep.png" if record.get("entry_layer") else "reuse.png"
    return [*lines, f"![Amortised cost of a query]({picture})", ""]


def _table(name: str, found: dict[str, Any]) -> list[str]:
    head = ["", "ingestion (s)", "positions a query", "seconds a query", "amortised over 100", "kept (MiB)"]
    head += ["cheaper than text from query", "than text with prefix cache from"]
    rows = []
    for system, row in found["systems"].items():
        cells = [system, number(row["ingest_s"]), number(row["positions_per_query"], 0), number(row["per_query_s"], 3)]
        cells += [number(row["amortised_s"].get("100"), 3), number(row["kept_bytes"] / 2**20)]
        cells += ["–" if system == "text" else _query(row["breaks_even_with_text"])]
        rows.append([*cells, "–" if system == "text, prefix cache" else _query(row["breaks_even_with_prefix_cache"])])
    share = f"### {name.capitalize()}: {found['reused']:.1f} % of the tokens read had been read before"
    return [share, "", *table(head, rows)]


def _spread(seconds: list[float]) -> str:
    """Least and most over the median."""
    middle = statistics.median(seconds)
    return f" ({min(seconds) / middle:.2f} to {max(seconds) / middle:.2f} of that)"


def _times(record: dict[str, Any]) -> str:
    per_token = record["costs"]["concept_bytes"] * record["concepts"] / record["source_tokens"]
    return f"{record['costs']['kv_bytes'] / per_token:.0f}"


def _query(number_: int | None) -> str:
    return "never" if number_ is None else f"{number_:,}"


def plot(record: dict[str, Any]) -> Any:
    """Amortised seconds over the number of queries, a panel for each stream; where concepts break even is marked."""
    from matplotlib.figure import Figure

    # The same colour for the same thing, dashed where prefixes are cached.
    colours = {"text": "black", "concepts": "tab:blue", "concepts, lazy": "tab:green", "chunk KV": "tab:red"}
    figure = Figure(figsize=(9.2, 4.4), layout="constrained")
    panels = figure.subplots(1, len(record["streams"]), squeeze=False, sharey=True)[0]
    for panel, (name, found) in zip(panels, record["streams"].items(), strict=True):
        for system, row in found["systems"].items():
            x = [int(q) for q in row["amortised_s"]]
            colour = colours[system.removesuffix(", prefix cache")]
            style = "--" if system.endswith("prefix cache") else "-"
            panel.plot(x, list(row["amortised_s"].values()), style, color=colour, linewidth=1.5, label=system)
        even = found["systems"]["concepts"]["breaks_even_with_text"]
        if even is not None:
            panel.axvline(even, color="gray", linewidth=0.8)
            panel.annotate(
                f"concepts cheaper\nthan text from {even:,}",
                (even, 0.97),
                xycoords=("data", "axes fraction"),
                xytext=(4, 0),
                textcoords="offset points",
                va="top",
                fontsize="small",
                color="gray",
            )
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(name, fontsize="medium")
        panel.set_xlabel("queries")
    panels[0].set_ylabel("seconds per query, ingestion included")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize="small"
    )
    return figure
