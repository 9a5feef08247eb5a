"""The section on a growing storage: speed, linearity, memory."""

from __future__ import annotations

from typing import Any

from benchmarks.cells import source, table


def tables(record: dict[str, Any]) -> list[str]:
    """Lines of the section."""
    growth = record["growth"]
    rows = growth["rows"]
    last, per_token = rows[-1], growth["bytes_per_token"]
    seconds, embedding, compressing = (sum(row[name] for row in rows) for name in ("seconds", "embed_s", "compress_s"))
    peak = max(row["peak_rss_bytes"] for row in rows)
    sweeps = []
    for part, title in (("layers", "layers that compress"), ("segments", "most tokens of a segment")):
        for name, row in record[part]["rows"].items():
            sweeps.append([title, name, f"{row['tokens_per_s']:.0f}", f"{row['bytes_per_token']:.0f}"])
            title = ""
    title = "positions of a batch"
    for name, row in record["batches"]["rows"].items():
        sweeps.append([title, f"{int(name):,}", f"{row['tokens_per_s']:.0f}", "–"])
        title = ""
    shipped = record["shipped"]
    return [
        "## Ingestion",
        "",
        f"One storage grown to {last['tokens']:,} tokens in slices of {record['slice']:,} (texts: {record['texts']}), "
        "chunks, vectors, concepts and commit included; beside some slices a fresh storage ingests the same slice. Of "
        f"the {seconds:,.0f} s embedding took {100 * embedding / seconds:.0f} %, compressing "
        f"{100 * compressing / seconds:.0f} %. A slice takes {growth['time_over_fresh_first']:.2f} times as long as in "
        f"the fresh storage at the beginning and {growth['time_over_fresh_last']:.2f} times at the end, median "
        f"{growth['time_over_fresh_median']:.2f}. All up to a size, per token, over the median of the small ingests:",
        "",
        *table(
            ["tokens in the storage", "time per token, small ingests = 1"],
            [[f"{int(size):,}", f"{over:.2f}"] for size, over in growth["time_over_small_ingests"].items()],
        ),
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
        *table(["setting", "", "tokens/s", "bytes per token"], sweeps),
        f"Shipped: {shipped['layers'] or 'all'} layers, segments of at most {shipped['segment_length']} tokens.",
        "Bytes in other encodings are in [storage.md](storage.md).",
        "",
    ]


def plot(record: dict[str, Any]) -> Any:
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
    return figure
