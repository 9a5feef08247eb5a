"""Prefill up to 128k tokens: text and deep concepts at several rates, by an LLM of a known shape with random weights.

A prompt is read in chunks, so that no attention mask is larger than one chunk times what stands in front of it; rotary
positions are scaled to the length (benchmarks/shapes.py). Nothing is fetched and no store is asked: what is timed is
the prefill, and each of the tokens that are decoded behind it. One run of each way, since a long prefill varies little;
on a GPU the second of two, for the first also loads kernels and takes memory from the driver. A prefill of hours can be
had from some of its chunks (`--whole-to`, benchmarks/ttft/long_prompt.py).

Every run is kept beside the JSON as soon as it is done (OUT.records.jsonl), shortest contexts first, so that it can be
stopped at any time and started again with the same words, or with another `--shape-to`.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.cells import number, source, table
from benchmarks.common import Record, journal_of, parsed, parser, part, progress, written
from benchmarks.memory import Peak, cache_bytes
from benchmarks.shapes import SHAPES, attention_for, random_llm, tokenizer_of
from benchmarks.ttft.flops import LayerShape, deep_prefill, layers_of, prefill
from benchmarks.ttft.long_prompt import Caches, Prompt, decode, slots
from compllm_rag.models.device_memory import release_unused
from compllm_rag.models.halves import Halves, default_entry_layer

# Full chunks that are timed of a prompt that is not read as a whole; its last chunk comes on top.
TIMED = 5


def tokens(text: str) -> int:
    """A number of tokens: `4096`, or `4k` for 4 times 1,024."""
    return 1024 * int(text[:-1]) if text.lower().endswith("k") else int(text)


def one(halves: Halves, layers: list[LayerShape], length: int, rate: float | None, args: Any) -> dict[str, Any]:
    """One run of one way."""
    is_token, positions = slots(length, rate)
    own = int(is_token.sum())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, halves.llm.embedding.weight.shape[0], (own,), generator=generator)
    gc.collect()
    release_unused(halves.llm.device)  # what was kept from the run before would hide this one's peak
    prompt = Prompt(halves, ids, is_token, positions, args.prefill_chunk)
    whole = args.whole_to is None or length <= args.whole_to
    check = prompt.sampled(TIMED)[0] if length == args.whole_to else None
    for _ in range(_runs(halves.llm.device)):
        caches: Caches = (None, None)  # those of the first run make room
        with Peak(halves.llm.device) as peak:
            begun = time.perf_counter()
            if whole:
                logits, caches = prompt.whole()
                token = logits.argmax()
                int(token)
                prefill_s = time.perf_counter() - begun
            else:
                prefill_s, logits, caches = prompt.sampled(TIMED)
                token = logits.argmax()
    steps = decode(halves, token, int(positions[-1]) + 1, caches, args.decode)
    progress(f"{length} tokens, {'text' if rate is None else f'C = {rate:g}'}: {prefill_s:.1f} s")
    concepts = len(is_token) - own
    return {
        "length": length,
        "rate": rate,
        "positions": len(is_token),
        "concepts": concepts,
        "prefill_s": prefill_s,
        "whole": whole,
        "sampled_s": check,
        "per_token_s": statistics.median(steps) if steps else None,
        "kv_bytes": cache_bytes(*caches),
        "peak_bytes": peak.bytes,
        "flops": prefill(layers, own) if rate is None else deep_prefill(layers, halves.layer, own, concepts),
    }


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser("ttft_long", __doc__, "llm rates", rates=[1.0, 2.0, 4.0])
    options.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m", help="--llm gives its tokenizer")
    options.add_argument("--shape-to", type=tokens, default=tokens("128k"), help="longest context, such as 32k")
    options.add_argument("--shape-from", type=tokens, default=tokens("1k"), help="shortest; each next is twice as long")
    options.add_argument(
        "--whole-to",
        type=tokens,
        help=f"longer prompts are not read as a whole, {TIMED} chunks of each are timed; at this length both are done",
    )
    options.add_argument("--prefill-chunk", type=int, default=512, help="slots of one forward; 0: all at once")
    options.add_argument("--decode", type=int, default=8, help="tokens after the first that are timed; 0: none")
    options.add_argument("--entry-layer", type=int, help="L (default: half the layers)")
    options.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--attention", help="default: sdpa, with windows the best there is")
    args = parsed(options, argv)
    if args.shape_from < 1 or args.shape_to < args.shape_from or args.prefill_chunk < 0:
        options.error("--shape-from must be at least 1 and at most --shape-to, --prefill-chunk not negative")
    if args.whole_to is not None and not args.prefill_chunk:
        options.error("--whole-to times some of many chunks: leave --prefill-chunk above 0")
    attention = args.attention or attention_for(args.shape, args.device)
    llm = random_llm(args.shape, tokenizer_of(args.llm), dtype=args.dtype, device=args.device, attention=attention)
    entry = default_entry_layer(llm.depth) if args.entry_layer is None else args.entry_layer
    whole, deep, layers = Halves(llm, 0), Halves(llm, entry), layers_of(llm.model.config)
    same = {
        "llm": llm.source,
        "shape": args.shape,
        "entry_layer": entry,
        "depth": llm.depth,
        "dtype": args.dtype,
        "attention": attention,
        "prefill_chunk": args.prefill_chunk,
        "decode": args.decode,
        "whole_to": args.whole_to,
        "device": llm.device.type,
        "runs": _runs(llm.device),
        "threads": torch.get_num_threads(),
    }
    journal = journal_of(args.json, same)
    one(deep, layers, 64, 2.0, args)  # nothing is counted before the first forward has been through
    lengths, rows = [args.shape_from], []
    while lengths[-1] * 2 <= args.shape_to:
        lengths.append(lengths[-1] * 2)
    for length in lengths:
        for rate in [*sorted(args.rates, reverse=True), None]:  # the cheapest first
            make = partial(one, whole if rate is None else deep, layers, length, rate, args)
            rows.append(part(journal, f"{length} tokens, {'text' if rate is None else f'C = {rate:g}'}", make))
    return written(args, {**same, "rates": args.rates, "rows": rows})


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    once = "one run each" if record["runs"] == 1 else f"run {record['runs']} of each way counts"
    if record["device"] == "cuda" and record["runs"] == 1:
        once += ", in which a GPU also loads kernels and takes memory from the driver"
    head = ["source tokens", "read as", "positions", "prefill s", "of text's", "by arithmetic", "decode ms / token"]
    head += ["KV MiB", "of text's", "peak MiB"]
    cells = []
    for row in _sorted(record["rows"]):
        text = next((r for r in record["rows"] if r["length"] == row["length"] and r["rate"] is None), None)
        cells.append(
            [
                number(row["length"], 0),
                "text" if row["rate"] is None else f"concepts, rate {row['rate']:g}",
                number(row["positions"], 0),
                number(row["prefill_s"], 2) if row.get("whole", True) else f"≈ {number(row['prefill_s'], 0)}",
                number(text and row["prefill_s"] / text["prefill_s"], 3),
                number(text and row["flops"] / text["flops"], 3),
                number(None if row["per_token_s"] is None else row["per_token_s"] * 1000, 1),
                number(row["kv_bytes"] / 2**20, 0),
                number(text and row["kv_bytes"] / text["kv_bytes"], 3),
                number(row["peak_bytes"] / 2**20, 0),
            ]
        )
    return [
        "## Prefill of long contexts as deep concepts",
        "",
        f"The shape {record['shape']} with random weights, {record['dtype']}, rotary positions scaled; concepts enter "
        f"at layer {record['entry_layer']} of {record['depth']}. Prompts are read {record['prefill_chunk']} slots at a "
        f"time, {once}; nothing is fetched. *By arithmetic* are the operations as a share of text's. *Peak* is "
        "what lies in memory above the start of the prefill, at its most, weights not counted."
        + ("" if _complete(record) else " The run was broken off before its longest context had been read as text."),
        *_sampled(record),
        "",
        f"{source(record)}.",
        "",
        *table(head, cells),
        f"![Prefill over the context](ttft_long_{record['shape'].replace('-', '_')}.png)",
        "",
    ]


def _runs(device: torch.device) -> int:
    """How often each way is read; the last time counts."""
    return 2 if device.type == "cuda" else 1


def _sampled(record: Record) -> list[str]:
    """What to say of prompts of which only some chunks were read."""
    checks = [row["sampled_s"] / row["prefill_s"] for row in record["rows"] if row.get("sampled_s")]
    if not record.get("whole_to"):
        return []
    said = (
        f"Prompts of more than {record['whole_to']:,} tokens were not read as a whole: {TIMED} chunks at even "
        "distances and the last were timed, each behind a KV cache of the length that it would find there, and the "
        "others taken from straight lines between."
    )
    if checks:
        ends = f"{min(checks):.2f} to {max(checks):.2f}"
        said += f" At {record['whole_to']:,} tokens both were done: that gave {ends} of the time of the whole."
    return ["", said]


def _complete(record: Record) -> bool:
    return {r["length"] for r in record["rows"]} == {r["length"] for r in record["rows"] if r["rate"] is None}


def _sorted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By length; text first, then rates from the lowest."""
    return sorted(rows, key=lambda row: (row["length"], row["rate"] or 0))


def plot(record: Record) -> Any:
    """Prefill over the context, a line for text and for each rate."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    panel = figure.subplots()
    rows = _sorted(record["rows"])
    for rate in [None, *sorted({row["rate"] for row in rows if row["rate"] is not None})]:
        line = [row for row in rows if row["rate"] == rate]
        name = "text" if rate is None else f"concepts, rate {rate:g}"
        x, y = [row["length"] for row in line], [row["prefill_s"] for row in line]
        panel.plot(x, y, marker="o", markersize=4, label=name, color="black" if rate is None else None)
    contexts = sorted({row["length"] for row in rows})
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(contexts, [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in contexts])
    panel.minorticks_off()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # one decade has labels, too
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xlabel("context (source tokens)")
    panel.set_ylabel("prefill (s)")
    panel.legend(frameon=False, fontsize="small")
    return figure
