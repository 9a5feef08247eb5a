"""The section on ingestion: speed, linearity, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.pages.cells import finished, number, source


def section(results: Path, docs: Path) -> str | None:
    """Markdown of the section; draws the plot beside the page.

    Args:
        results: Folder with ingest.json or ingest_scale.json, or both.
        docs: Folder of the page.
    """
    bare, scale = finished(results / "ingest.json"), finished(results / "ingest_scale.json")
    lines = _bare(bare) if bare is not None else []
    if scale is not None:
        plot(scale, docs / "ingest.png")
        lines += _scale(scale)
    return "\n".join(["## Ingestion", "", *lines]) if lines else None


def _bare(record: dict[str, Any]) -> list[str]:
    lines = [
        "Compressing into a store on disk (tokenise, cut, choose anchors, compress, write, fsync) against a bare "
        f"batched forward of the same tokens and anchors through {_layers(record['layers'])}:",
        "",
        f"{source(record)}.",
        "",
        "| source tokens | tokens/s | of the bare forward's speed (least to most) |",
        "|---|---|---|",
    ]
    for row in record["sizes"].values():
        ratio = row["ensure_over_bare"]
        spread = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        lines.append(f"| {row['source_tokens']:,} | {number(row['tokens_per_s']['ensure'], 0)} | {spread} |")
    return [*lines, ""]


def _layers(number_: int | None) -> str:
    return f"the same {number_} layers" if number_ else "all layers"


def _scale(record: dict[str, Any]) -> list[str]:
    growth = record["growth"]
    rows = growth["rows"]
    last, per_token = rows[-1], growth["bytes_per_token"]
    sizes = growth["time_over_small_ingests"]
    seconds, embedding, compressing = (sum(row[name] for row in rows) for name in ("seconds", "embed_s", "compress_s"))
    peak = max(row["peak_rss_bytes"] for row in rows)
    lines = [
        f"One storage grown to {last['tokens']:,} tokens in slices of {record['slice']:,} (texts: {record['texts']}), "
        "chunks, vectors, concepts and commit included; beside some slices a fresh storage ingests the same slice. Of "
        f"the {seconds:,.0f} s embedding took {100 * embedding / seconds:.0f} %, compressing "
        f"{100 * compressing / seconds:.0f} %. A slice takes {growth['time_over_fresh_first']:.2f} times as long as in "
        f"the fresh storage at the beginning and {growth['time_over_fresh_last']:.2f} times at the end, median "
        f"{growth['time_over_fresh_median']:.2f}. All up to a size, per token, over the median of the small ingests:",
        "",
        "| tokens in the storage | time per token, small ingests = 1 |",
        "|---|---|",
        *(f"| {int(size):,} | {over:.2f} |" for size, over in sizes.items()),
        "",
        f"Resident memory grew by {growth['memory_growth_bytes'] / 2**20:+.1f} MiB over the last "
        f"{growth['memory_growth_tokens']:,} tokens, the FAISS index not counted; its peak was {peak / 2**20:.0f} MiB. "
        f"A token takes {per_token['faiss']:.1f} bytes in the FAISS index ({last['faiss_bytes'] / 2**20:.1f} MiB "
        f"at the end), {per_token['concepts']:.0f} as concepts, and {per_token['disk']:.0f} on disk all in all; the "
        f"copies of the adapters in each storage take {growth['adapter_bytes'] / 2**20:.1f} MiB more.",
        "",
        f"{source(record)}.",
        "",
        "![Speed and memory while a storage grows](ingest.png)",
        "",
        f"Compressing alone, ingests of {record['sweep_tokens']:,} tokens in turns (layers and segment lengths with "
        "untrained weights, which cost the same; concepts in fp16 at rate 2):",
        "",
        "| setting | | tokens/s | bytes per token |",
        "|---|---|---|---|",
    ]
    for part, title in (("layers", "layers that compress"), ("segments", "most tokens of a segment")):
        for name, row in record[part]["rows"].items():
            lines.append(f"| {title} | {name} | {row['tokens_per_s']:.0f} | {row['bytes_per_token']:.0f} |")
            title = ""
    title = "positions of a batch"
    for name, row in record["batches"]["rows"].items():
        lines.append(f"| {title} | {int(name):,} | {row['tokens_per_s']:.0f} | – |")
        title = ""
    shipped = record["shipped"]
    lines += [
        "",
        f"Shipped: {shipped['layers'] or 'all'} layers, segments of at most {shipped['segment_length']} tokens.",
    ]
    return [*lines, "Bytes in other encodings are in [storage.md](storage.md).", ""]


def plot(record: dict[str, Any], path: Path) -> None:
    """Speed and memory over the tokens in the storage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = record["growth"]["rows"]
    tokens = [row["tokens"] / 1000 for row in rows]
    left.plot(tokens, [row["tokens_per_s"] for row in rows], marker="o", markersize=3, label="the growing storage")
    fresh = [(t, row["fresh_tokens_per_s"]) for t, row in zip(tokens, rows, strict=True) if row["fresh_tokens_per_s"]]
    left.plot([t for t, _ in fresh], [s for _, s in fresh], "s", color="tab:orange", label="a fresh one, same minute")
    left.set_ylim(bottom=0)
    left.set_ylabel("source tokens per second")
    left.legend(frameon=False, fontsize="small")
    right.plot(tokens, [row["rss_bytes"] / 2**20 for row in rows], marker="o", markersize=3, label="resident")
    right.plot(tokens, [row["faiss_bytes"] / 2**20 for row in rows], label="FAISS index")
    right.set_ylim(bottom=0)
    right.set_ylabel("memory (MiB)")
    right.legend(frameon=False, fontsize="small")
    for panel in (left, right):
        panel.set_xlabel("tokens in the storage (thousands)")
    figure.savefig(path, dpi=120)
