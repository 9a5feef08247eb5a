"""How long until the first token, and how large is the KV cache: text against concepts, and the least it could be.

This is the benchmark of concepts at the input embeddings, `--codec input`; without it `ttft_deep` is run.

For contexts of several lengths, all settings in turns in a new order each round: the context as text; as concepts from
a warm store on disk; as concepts that are compressed in line (cold). Fetching, laying out and prefill are timed apart.
Passages that were asked for before are remembered as token ids, for text and concepts alike; `fetch_first_s` is the
fetch of passages that were not, with their tokenising. The *bound* is the prefill alone of as many random embeddings.
The crossover is the context length from which compressing in line takes no longer than reading text, measured, and by
the arithmetic (flops.py).

`--shape qwen3-4b --dtype bfloat16 --device cuda --lengths 8192 32768 131072` measures an LLM of that shape with random
weights (benchmarks/shapes.py), without LlamaIndex and without weights to download. Lengths that are done are kept
beside the JSON (OUT.records.jsonl) and not measured again.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.shapes import SHAPES, attention_for, noisy_compressor, random_llm, tokenizer_of
from benchmarks.ttft import ttft_deep
from benchmarks.ttft.case import Case, Setting
from benchmarks.ttft.flops import LayerShape, crossover, layers_of, prefill, speed_up
from benchmarks.ttft.peak import resident_peak
from compllm_rag.compression.compressor import Compressor
from compllm_rag.config import CompressorConfig
from compllm_rag.errors import ConfigurationError

PARTS = ("compress_s", "fetch_s", "layout_s", "prefill_s", "ttft_s")


def measure(case: Case, rates: list[float], rounds: int, decode: int, cold: bool) -> dict[str, Any]:
    """All settings in turns; medians, and round by round quotients over text and over the bound."""
    settings = [Setting("text"), *(Setting("concepts", rate) for rate in rates)]
    settings += [Setting("cold", rate) for rate in rates] if cold else []
    first = {setting: case.run(setting, decode) for setting in settings}  # warms up, and tells the positions
    counts = {int(first[s]["positions"]) for s in settings}
    bounds = {n: Setting("bound", None, n) for n in sorted(counts)}
    runs: dict[Setting, list[dict[str, float]]] = {s: [] for s in [*settings, *bounds.values()]}
    order = list(runs)
    for round_ in range(rounds):
        random.Random(round_).shuffle(order)
        for setting in order:
            taken = case.run(setting, 0 if setting.mode == "bound" else decode)
            if setting.mode in ("text", "concepts"):
                taken["fetch_first_s"] = case.first_fetch(setting)
            runs[setting].append(taken)
            common.progress(f"  round {round_ + 1} of {rounds}: {setting}, {runs[setting][-1]['ttft_s']:.3f} s")
    text, on_gpu = [run["ttft_s"] for run in runs[settings[0]]], case.llm.device.type == "cuda"
    rows = []
    for setting in settings:
        mine, positions = runs[setting], int(first[setting]["positions"])
        bound = [run["prefill_s"] for run in runs[bounds[positions]]]
        total = [run["ttft_s"] for run in mine]
        medians = {name: statistics.median(run[name] for run in mine) for name in (*PARTS, "per_token_s")}
        firsts = [run["fetch_first_s"] for run in mine if "fetch_first_s" in run]
        rows.append(
            {
                "mode": setting.mode,
                "rate": setting.rate,
                "positions": positions,
                **medians,
                "fetch_first_s": statistics.median(firsts) if firsts else None,
                "thousand_tokens_s": medians["ttft_s"] + 999 * medians["per_token_s"] if decode else None,
                "bound_s": statistics.median(bound),
                "ttft_over_bound": common.median_of_quotients(total, bound),
                "ttft_over_text": common.median_of_quotients(total, text),
                "kv_bytes": int(mine[0]["kv_bytes"]),
                # On a CPU a process that has answered before tells nothing: `main` asks new ones.
                "peak_bytes": int(max(run["peak_bytes"] for run in mine)) if on_gpu else None,
                "ttft_all_s": total,
            }
        )
    tokens = sum(len(case.compressor.segmenter.tokenize(text).ids) for text in case.chunks)
    return {"source_tokens": tokens, "chunks": len(case.chunks), "rows": rows}


def measured_crossover(lengths: dict[str, Any], rate: float) -> dict[str, Any] | None:
    """Where TTFT of compressing in line meets that of text, between two measured lengths, linear in their logarithm.

    Returns:
        `tokens`, or `below` or `above` with the shortest or longest length measured; None without cold measurements.
    """
    points = []
    for found in sorted(lengths.values(), key=lambda found: found["source_tokens"]):
        row = next((r for r in found["rows"] if (r["mode"], r["rate"]) == ("cold", rate)), None)
        if row is not None:
            points.append((found["source_tokens"], math.log(row["ttft_over_text"]["median"])))
    if not points:
        return None
    if points[-1][1] > 0:
        return {"above": points[-1][0]}
    if all(gain <= 0 for _, gain in points):
        return {"below": points[0][0]}
    at = max(i for i, (_, gain) in enumerate(points) if gain > 0)
    (a, high), (b, low) = points[at], points[at + 1]
    share = high / (high - low)
    return {"tokens": round(math.exp(math.log(a) + share * (math.log(b) - math.log(a))))}


def load(args: Any) -> Compressor:
    """The compressor of an LLM, or of a shape with random weights."""
    if args.shape is None:
        return common.trained_like(args.llm)
    attention = args.attention or attention_for(args.shape, args.device)
    llm = random_llm(args.shape, tokenizer_of(args.llm), dtype=args.dtype, device=args.device, attention=attention)
    return noisy_compressor(llm, CompressorConfig(layers=min(12, llm.model.config.num_hidden_layers)))


def asked_codec(words: Sequence[str]) -> str:
    """The codec that options name, the product's default where they name none."""
    option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    option.add_argument("--codec", default="deep")
    return str(option.parse_known_args(words)[0].codec)


def main(argv: Sequence[str] | None = None) -> common.Record:
    """Run it."""
    words = list(sys.argv[1:] if argv is None else argv)
    if asked_codec(words) == "deep":
        if any(word.split("=")[0] == "--shape" for word in words):
            raise ConfigurationError(
                "shapes with random weights have no stores of deep concepts here",
                got="--shape without --codec input",
                next_step="bench ttft_long for deep concepts, or add --codec input",
            )
        return ttft_deep.main(words, "ttft")
    options = common.parser("ttft", __doc__, "llm codec repeats texts rates", repeats=3)
    options.add_argument("--lengths", type=int, nargs="+", default=[250, 1000, 4000, 7500], help="source tokens")
    options.add_argument("--decode", type=int, default=16, help="tokens after the first that are timed; 0: none")
    options.add_argument("--no-cold", dest="cold", action="store_false", help="nothing that is compressed in line")
    options.add_argument("--shape", choices=list(SHAPES), help="random weights of this shape, --llm's tokenizer")
    options.add_argument("--dtype", default="float32", help="of a shape: float32 or bfloat16")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of a shape")
    options.add_argument(
        "--attention", help="of a shape, for text and concepts alike (default: sdpa, with windows the best)"
    )
    options.add_argument("--memory", choices=["longest", "all", "none"], default="longest", help="peaks on a CPU")
    args = common.parsed(options, words)
    compressor = load(args)
    config = compressor.llm.model.config.get_text_config()
    layers, depth = layers_of(config), compressor.config.layers or config.num_hidden_layers
    same = {
        "llm": compressor.llm.source,
        "layers": depth,
        "dtype": str(compressor.llm.dtype).removeprefix("torch."),
        "attention": getattr(config, "_attn_implementation", None),
        "rates": args.rates,
        "decode": args.decode,
        "repeats": args.repeats,
        "cold": args.cold,
        "device": compressor.llm.device.type,
        "threads": torch.get_num_threads(),
        "fingerprint": compressor.fingerprint,
    }
    if args.shape:
        same["shape"] = SHAPES[args.shape]
    journal = common.journal_of(args.json, same)
    with tempfile.TemporaryDirectory() as folder:

        def one(length: int) -> dict[str, Any]:
            common.progress(f"context of {length} tokens")
            case = Case(compressor, common.texts(args.texts), length, args.rates, Path(folder))
            found = measure(case, args.rates, args.repeats, args.decode, args.cold)
            add_bounds(found, layers)
            if args.memory == "all" or (args.memory == "longest" and length == max(args.lengths)):
                _peaks(args, compressor, length, Path(folder), found["rows"])
            return found

        found = {str(length): common.part(journal, f"{length} tokens", partial(one, length)) for length in args.lengths}
    crossovers = [
        {
            "rate": rate,
            "measured": measured_crossover(found, rate),
            "arithmetic": crossover(layers, depth, rate, compressor.config.segment_length),
        }
        for rate in args.rates
    ]
    return common.written(args, {**same, "lengths": found, "crossover": crossovers})


def add_bounds(found: dict[str, Any], layers: list[LayerShape]) -> None:
    """Put beside concepts how much faster than text the arithmetic allows them to be.

    `flop_bound` takes the rate at its word; `flop_bound_positions` counts the positions that were prefilled, those of
    the question and the lines in front of passages too, and as many concepts as there are.
    """
    text = found["rows"][0]["positions"]
    for row in found["rows"]:
        if row["mode"] == "concepts":
            row["flop_bound"] = speed_up(layers, found["source_tokens"], row["rate"])
            row["flop_bound_positions"] = prefill(layers, text) / prefill(layers, row["positions"])


def _peaks(args: Any, compressor: Compressor, length: int, folder: Path, rows: list[dict[str, Any]]) -> None:
    """Give each row the resident peak of a process that reads it so; a GPU's allocator has told its own."""
    if compressor.llm.device.type == "cuda":
        return
    asked = {name: getattr(args, name) for name in ("llm", "shape", "dtype", "device", "attention")}
    shared = {"args": asked, "texts": str(args.texts) if args.texts else None, "length": length, "rates": args.rates}
    for row in rows:
        found = resident_peak({**shared, "folder": str(folder), "mode": row["mode"], "rate": row["rate"]})
        row["peak_bytes"] = found["peak_bytes"] - found["before_bytes"]
        row["resident_peak_bytes"] = found["peak_bytes"]
        common.progress(f"  peak of {Setting(row['mode'], row['rate'])}: {row['peak_bytes'] / 2**20:,.0f} MiB")
