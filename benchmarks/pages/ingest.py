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
        f"batched forward of the same tokens and anchors through the same {record['layers'] or 'all'} layers:",
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


def _scale(record: dict[str, Any]) -> list[str]:
    rows = record["rows"]
    last = rows[-1]
    per_token = last["faiss_bytes"] / last["tokens"]
    lines = [
        f"One storage grown to {last['tokens']:,} tokens in slices of {record['slice']:,} (texts: {record['texts']}), "
        "chunks, vectors, concepts and commit included. Time per token against a fresh storage that ingests the same "
        f"slice in the same minute: {record['time_over_fresh_first']:.2f} at the first slice, "
        f"{record['time_over_fresh_last']:.2f} at the last, median {record['time_over_fresh_median']:.2f}. Resident "
        f"memory grew by {record['memory_growth_bytes'] / 2**20:+.1f} MiB over the last "
        f"{record['memory_growth_tokens']:,} tokens, the FAISS index not counted, which takes {per_token:.1f} bytes "
        f"per source token ({last['faiss_bytes'] / 2**20:.1f} MiB at the end).",
        "",
        f"{source(record)}.",
        "",
        "![Speed and memory while a storage grows](ingest.png)",
        "",
        "Compressing alone, small ingests in turns (untrained weights, which cost the same):",
        "",
        "| layers that compress | tokens/s |",
        "|---|---|",
    ]
    lines += [f"| {name} | {row['tokens_per_s']:.0f} |" for name, row in record["layers"].items()]
    lines += ["", "| positions of a batch | tokens/s |", "|---|---|"]
    lines += [f"| {int(name):,} | {row['tokens_per_s']:.0f} |" for name, row in record["batches"].items()]
    return [*lines, "", "Bytes per token are in [storage.md](storage.md).", ""]


def plot(record: dict[str, Any], path: Path) -> None:
    """Speed and memory over the tokens in the storage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = record["rows"]
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
