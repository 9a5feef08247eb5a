"""The section on TTFT, the KV cache and the crossover length; one part for each machine it was measured on."""

from __future__ import annotations

from typing import Any

from benchmarks.cells import number, source, spread, table, way
from benchmarks.ttft import ttft_deep

_HEAD = ["context", "read as", "positions", "TTFT (s)", "compress", "fetch, lay out (fetch the first time)"]
_HEAD += ["over the bound", "of text's TTFT", "speed-up (FLOP bound; at these positions)", "1,000 tokens (s)"]
_HEAD += ["KV cache (MiB)", "peak (MiB)"]


def tables(record: dict[str, Any]) -> list[str]:
    """Lines of the section."""
    if "entry_layer" in record:
        return ttft_deep.tables(record)
    rows = []
    for found in record["lengths"].values():
        context = f"{found['source_tokens']:,}"
        for row in found["rows"]:
            rows.append([context, *_cells(row)])
            context = ""
    crossovers = [
        [f"{row['rate']:g}", _measured(row["measured"]), _tokens(row["arithmetic"])] for row in record["crossover"]
    ]
    # Of a shape with random weights, the name of its file of results.
    shape = "_" + record["llm"].split()[-1].replace("-", "_") if "shape" in record else ""
    return [
        "## TTFT and KV cache",
        "",
        f"### {record['llm']}, {record['dtype']}",
        "",
        "The context as text, as concepts from a warm store on disk, and *cold*: compressed in line by the first "
        f"{record['layers']} layers. All settings in turns; medians, in brackets least and most. The *bound* is the "
        "prefill alone of as many random embeddings; the goal is a TTFT of at most 1.02 times that. The *FLOP bound* "
        "is the speed-up over text that arithmetic allows: at the rate alone, and for the positions that were "
        "prefilled, question and lines in front of passages among them.",
        "",
        f"{source(record)}.",
        "",
        *table(_HEAD, rows),
        f"*1,000 tokens* is TTFT and 999 times the time of one of the {record['decode']} tokens that were decoded at "
        "that length of cache. *Peak* is what lies in memory above the start of the query, at its most. Passages "
        "that were asked for before are remembered as token ids, with text and with concepts alike; *the first time* "
        "they are not.",
        "",
        f"![TTFT over the context](ttft{shape}.png)",
        "",
        "Crossover, the context from which compressing in line takes no longer than reading text:",
        "",
        *table(["rate", "measured", "by the arithmetic"], crossovers),
    ]


def _cells(row: dict[str, Any]) -> list[str]:
    gain = 1 / row["ttft_over_text"]["median"]
    bounds = [row[key] for key in ("flop_bound", "flop_bound_positions") if key in row]
    bound = f" ({'; '.join(f'{value:.2f}' for value in bounds)})" if bounds else ""
    first = f" ({number(row['fetch_first_s'], 3)})" if row.get("fetch_first_s") else ""
    return [
        way(row),
        f"{row['positions']:,}",
        number(row["ttft_s"], 3),
        number(row["compress_s"] or None, 3),
        number(row["fetch_s"] + row["layout_s"], 3) + first,
        spread(row["ttft_over_bound"]) if row["mode"] != "cold" else "–",
        spread(row["ttft_over_text"]) if row["mode"] != "text" else "–",
        f"{gain:.2f}{bound}" if row["mode"] != "text" else "–",
        number(row["thousand_tokens_s"], 1),
        number(row["kv_bytes"] / 2**20, 0),
        number(None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20, 0),
    ]


def _measured(found: dict[str, int] | None) -> str:
    if found is None:
        return "not measured"
    if "tokens" in found:
        return f"{found['tokens']:,} tokens"
    return f"above {found['above']:,} tokens" if "above" in found else f"below {found['below']:,} tokens"


def _tokens(found: float | None) -> str:
    if found is None:
        return "never"
    return "always pays" if found < 1 else f"{found:,.0f} tokens"


def plot(record: dict[str, Any]) -> Any:
    """TTFT over the context for each way of reading it, with the bounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    panel = figure.subplots()
    lines: dict[tuple[str, float | None], list[tuple[int, dict[str, Any]]]] = {}
    for found in record["lengths"].values():
        for row in found["rows"]:
            lines.setdefault((row["mode"], row["rate"]), []).append((found["source_tokens"], row))
    colours = {"text": ["black"], "concepts": ["tab:blue", "tab:cyan"], "cold": ["tab:red", "tab:orange"]}
    for (mode, rate), points in lines.items():
        same = sorted({r for m, r in lines if m == mode and r is not None})
        colour = colours[mode][same.index(rate) % 2 if rate is not None else 0]
        points.sort(key=lambda point: point[0])
        x = [n for n, _ in points]
        y = [row["ttft_s"] for _, row in points]
        panel.plot(x, y, marker="o", markersize=4, color=colour, label=way(points[0][1]))
        if mode != "cold":
            panel.plot(x, [row["bound_s"] for _, row in points], linestyle=":", color=colour)
    panel.plot([], [], linestyle=":", color="gray", label="bound: the prefill alone")
    panel.set_xscale("log")
    panel.set_yscale("log")
    contexts = [found["source_tokens"] for found in record["lengths"].values()]
    panel.set_xticks(contexts, [f"{n:,}" for n in contexts])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xlabel("context (source tokens)")
    panel.set_ylabel("TTFT (s)")
    panel.legend(frameon=False, fontsize="small")
    return figure
