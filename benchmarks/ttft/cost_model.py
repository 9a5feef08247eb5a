"""What deep concepts cost by arithmetic alone: FLOPs, KV bytes and stored bytes, for shapes of LLMs up to 128k tokens.

Operations as `flops.py` counts them, attention included, window by window; bytes of the KV cache, of the weights and of
the records. A prompt is passages of 200 source tokens with a marker each, behind an opening and in front of a question,
as the product's default prompt has them. `--measured` puts the ratios that `bench ttft_deep` measured beside those that
the arithmetic gives for the same prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import number, table
from benchmarks.common import Record, parsed, parser, written
from benchmarks.shapes import SHAPES, config_of
from benchmarks.ttft.flops import LayerShape, deep_kv_bytes, deep_prefill, kv_bytes, layers_of, prefill, weight_bytes
from compllm_rag.models.halves import default_entry_layer
from compllm_rag.store.encodings import deep_encoding, encoding_named

LENGTHS = (250, 1000, 4096, 8192, 32768, 131072)
ENCODINGS = ("fp16", "int8", "int4")
PASSAGE, MARKER, AROUND = 200, 6, 54  # tokens of a passage, of what marks it, and of opening and question together
_BF16 = 2


def own_tokens(length: int) -> int:
    """Tokens of a prompt over that many source tokens that are no passage's."""
    return AROUND + MARKER * -(-length // PASSAGE)


def shape_rows(config: Any, entry: int, lengths: Sequence[int], rates: Sequence[float]) -> list[dict[str, Any]]:
    """A row for text and for each rate, at each length.

    Args:
        config: Of the LLM.
        entry: L.
        lengths: Source tokens.
        rates: C, source tokens per concept.
    """
    layers, rows = layers_of(config), []
    for length in lengths:
        own = own_tokens(length)
        text, text_kv = prefill(layers, own + length), kv_bytes(layers, own + length)
        rows.append(
            {"length": length, "rate": None, "flops": text, "of_text": 1.0, "kv_bytes": text_kv, "kv_of_text": 1.0}
        )
        for rate in rates:
            flops = deep_prefill(layers, entry, own, length / rate)
            kv = deep_kv_bytes(layers, entry, own, length / rate)
            rows.append(
                {
                    "length": length,
                    "rate": rate,
                    "flops": flops,
                    "of_text": flops / text,
                    "kv_bytes": kv,
                    "kv_of_text": kv / text_kv,
                }
            )
    return rows


def stored_bytes(hidden_size: int, rates: Sequence[float]) -> dict[str, dict[str, float]]:
    """Bytes of a record per source token, by encoding and rate; keys and index are not in it."""
    concept = {name: encoding_named(deep_encoding(name)).nbytes(1, hidden_size + 1) for name in ENCODINGS}
    return {name: {f"{rate:g}": size / rate for rate in rates} for name, size in concept.items()}


def beside_measured(layers: list[LayerShape], measured: Record) -> list[dict[str, Any]]:
    """What `ttft_deep` measured beside the arithmetic for the very same prompts: prefill as concepts over as text."""
    rows = []
    for found in measured["lengths"].values():
        text = next(row for row in found["rows"] if row["rate"] is None)
        own = text["positions"] - found["source_tokens"]
        for row in found["rows"]:
            if row["rate"] is None:
                continue
            made = deep_prefill(layers, measured["entry_layer"], own, row["positions"] - own)
            rows.append(
                {
                    "source_tokens": found["source_tokens"],
                    "rate": row["rate"],
                    "arithmetic": made / prefill(layers, text["positions"]),
                    "measured": row["prefill_s"] / text["prefill_s"],
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser("cost_model", __doc__, "rates", rates=[1.0, 2.0, 4.0])
    shapes = [name for name in SHAPES if name != "tiny"]
    options.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=shapes)
    options.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="source tokens")
    options.add_argument("--entry-layer", type=int, help="L of all shapes (default: half the layers of each)")
    options.add_argument("--measured", type=Path, help="JSON of `bench ttft_deep` on the shape smollm2-135m")
    args = parsed(options, argv)
    found = {}
    for name in args.shapes:
        config = config_of(name)
        layers = layers_of(config)
        entry = default_entry_layer(len(layers)) if args.entry_layer is None else args.entry_layer
        if not 0 <= entry < len(layers):
            options.error(f"--entry-layer {entry}: {name} has layers 0 to {len(layers) - 1}")
        found[name] = {
            "depth": len(layers),
            "entry_layer": entry,
            "windows": sum(layer.window is not None for layer in layers),
            "window": next((layer.window for layer in layers if layer.window is not None), None),
            "weight_bytes": weight_bytes(config, _BF16),
            "stored_bytes": stored_bytes(config.hidden_size, args.rates),
            "rows": shape_rows(config, entry, args.lengths, args.rates),
        }
    measured = []
    if args.measured is not None:
        record = json.loads(args.measured.read_text(encoding="utf-8"))
        measured = beside_measured(layers_of(config_of("smollm2-135m")), record)
    return written(args, {"rates": args.rates, "lengths": args.lengths, "shapes": found, "measured": measured})


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    lines = [
        "## Cost of deep concepts by arithmetic",
        "",
        "FLOPs of a prefill with attention, and bytes of the KV cache in bf16, counted and not measured (`flops.py` "
        f"has the formulas): text, and deep concepts of passages of {PASSAGE} source tokens with their markers, an "
        f"opening and a question around them. `{record['command']}`.",
        "",
    ]
    head = ["source tokens", "text, TFLOP", "text, KV MiB"]
    for rate in record["rates"]:
        head += [f"C = {rate:g}: prefill", f"C = {rate:g}: KV"]
    for name, shape in record["shapes"].items():
        windows = f", {shape['windows']} with a window of {shape['window']:,}" if shape["windows"] else ""
        stored = "; ".join(
            f"{encoding} " + ", ".join(number(value, 0) for value in by_rate.values())
            for encoding, by_rate in shape["stored_bytes"].items()
        )
        rows = []
        for length in record["lengths"]:
            text, *concepts = (row for row in shape["rows"] if row["length"] == length)
            cells = [number(length, 0), number(text["flops"] / 1e12, 2), number(text["kv_bytes"] / 2**20, 0)]
            for row in concepts:
                cells += [number(row["of_text"], 3), number(row["kv_of_text"], 3)]
            rows.append(cells)
        lines += [
            f"### {name}: concepts enter at layer {shape['entry_layer']} of {shape['depth']}{windows}",
            "",
            f"Weights {number(shape['weight_bytes'] / 2**30, 2)} GiB in bf16. Stored bytes per source token at "
            f"C = {', '.join(f'{rate:g}' for rate in record['rates'])}: {stored}. As shares of text:",
            "",
            *table(head, rows),
        ]
    if record["measured"]:
        rows = [
            [
                number(row["source_tokens"], 0),
                f"{row['rate']:g}",
                number(row["arithmetic"], 3),
                number(row["measured"], 3),
            ]
            for row in record["measured"]
        ]
        lines += [
            "Beside what `bench ttft_deep` measured on the embedded LLM, prefill as concepts over prefill as text. "
            "Short prompts take longer than their operations: a few rows do not fill the matrix products, and the "
            "weights have to be read for each prompt.",
            "",
            *table(["source tokens", "rate", "by arithmetic", "measured"], rows),
        ]
    return lines
