"""What would a terabyte of text take: hours, bytes, money?

On paper, from records of other benchmarks: seconds a token from `ingest_scale` (one process), bytes a token of text
from `storage_size`, bytes of deep concepts from `cost_model`. What of an ingest is neither embedding nor compressing is
taken for the work of the driver of `pipelines/ingest_ray.py`, the rest for that of its workers. Prices are options:
nobody measured them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import number, table
from benchmarks.common import Record, parsed, parser, written
from compllm_rag.errors import ConfigurationError

RESULTS = Path(__file__).parents[1] / "results"
SOURCES = ("ingest_scale", "storage_size", "cost_model")
LLM, SHAPE = "smollm2-135m-instruct", "smollm2-135m"
WORKERS = (1, 16, 256, 1024)


def constants(found: Mapping[str, Record]) -> dict[str, Any]:
    """What was measured of one process and one storage.

    Args:
        found: The records of `SOURCES`, by name.

    Returns:
        Seconds and bytes for a token; threads and cores of the machine; bytes of deep concepts by encoding and rate.
    """
    growth = found["ingest_scale"]["growth"]
    rows = growth["rows"]
    tokens, seconds, embedding, compressing = (
        sum(row[name] for row in rows) for name in ("slice_tokens", "seconds", "embed_s", "compress_s")
    )
    size = growth["bytes_per_token"]
    return {
        "worker_s": (embedding + compressing) / tokens,
        "driver_s": (seconds - embedding - compressing) / tokens,
        "threads": found["ingest_scale"]["environment"]["torch_threads"],
        "text_bytes": found["storage_size"]["llms"][LLM]["text_per_token"],
        "other_bytes": size["disk"] - size["concepts"],
        "concepts_bytes": size["concepts"],
        "deep_bytes": found["cost_model"]["shapes"][SHAPE]["stored_bytes"],
    }


def plan(measured: Mapping[str, Any], text_bytes: float, prices: Mapping[str, float]) -> dict[str, Any]:
    """What so much text would take.

    Args:
        measured: See `constants`.
        text_bytes: Bytes of the text, in UTF-8.
        prices: In dollars, of an hour of a machine with `threads` threads, and of a terabyte for a month.
    """
    tokens = text_bytes / measured["text_bytes"]
    hours, driving = tokens * measured["worker_s"] / 3600, tokens * measured["driver_s"] / 3600
    sizes = {"input, rate 2": {"fp16": measured["concepts_bytes"]}} | {
        f"deep, rate {rate}": {encoding: by[rate] for encoding, by in measured["deep_bytes"].items()}
        for rate in ("1", "2", "4")
    }
    return {
        "tokens": tokens,
        "worker_hours": hours,
        "driver_hours": driving,
        "workers_per_driver": measured["worker_s"] / measured["driver_s"],
        "price": hours * prices["machine_hour"],
        "rows": [
            {"workers": n, "hours": hours / n, "storages": max(1, -(-n * measured["driver_s"] // measured["worker_s"]))}
            for n in WORKERS
        ],
        "other_bytes": tokens * measured["other_bytes"],
        "concepts_bytes": {name: {e: tokens * n for e, n in by.items()} for name, by in sizes.items()},
    }


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it.

    Raises:
        ConfigurationError: A record is not there, or a number makes no sense.
    """
    options = parser("ingest_plan", __doc__, "")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    options.add_argument("--terabytes", type=float, default=1.0, help="of text")
    options.add_argument(
        "--machine-hour", type=float, default=0.20, help="dollars for an hour of a machine as measured on"
    )
    options.add_argument(
        "--terabyte-month", type=float, default=25.0, help="dollars for a terabyte on disk and a month"
    )
    args = parsed(options, argv)
    if min(args.terabytes, args.machine_hour, args.terabyte_month) <= 0:
        raise ConfigurationError("a plan needs numbers above 0", got=args.command)
    found = {}
    for name in SOURCES:
        path = args.results / f"{name}.json"
        try:
            found[name] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigurationError(
                "a record that the plan goes by is not there", got=path, next_step=f"compllm-rag bench {name} --json"
            ) from error
    measured = constants(found)
    prices = {"machine_hour": args.machine_hour, "terabyte_month": args.terabyte_month}
    result = {
        "sources": {name: {"command": r["command"], "commit": r["environment"]["commit"]} for name, r in found.items()},
        "terabytes": args.terabytes,
        "prices": prices,
        "constants": measured,
        "plan": plan(measured, args.terabytes * 1e12, prices),
    }
    return written(args, result)


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    made, measured, prices = record["plan"], record["constants"], record["prices"]
    threads, month = measured["threads"], prices["terabyte_month"]
    times = [
        [f"{row['workers']:,}", number(row["hours"], 0), number(row["hours"] / 24, 1), number(row["storages"], 0)]
        for row in made["rows"]
    ]
    sizes = [
        [name, encoding, number(nbytes / 1e12, 0), number(nbytes / 1e12 * month, 0)]
        for name, by in made["concepts_bytes"].items()
        for encoding, nbytes in by.items()
    ]
    by = "; ".join(f"`{one['command']}`, commit {one['commit'][:9]}" for one in record["sources"].values())
    return [
        "## A terabyte of text",
        "",
        f"On paper, for {record['terabytes']:g} TB of text by [many workers](guide/ingest.md#many-workers) that are as "
        f"fast as the machine measured on ({threads} threads; the embedded LLM, concepts at its input embeddings, rate "
        f"2): {made['tokens'] / 1e9:,.0f} billion tokens of {measured['text_bytes']:.2f} bytes, "
        f"{1 / measured['worker_s']:,.0f} a second to embed and compress, {1 / measured['driver_s']:,.0f} a second for "
        f"all else, which is taken for the driver's work: a driver keeps up with {made['workers_per_driver']:,.0f} "
        "such workers, so the corpus goes into more storages, each with a driver of its own, when there are more. "
        f"All workers together take {made['worker_hours']:,.0f} hours of such a machine, at "
        f"{prices['machine_hour']:.2f} dollars an hour {made['price']:,.0f} dollars.",
        "",
        *table(["workers", "hours", "days", "storages at least"], times),
        f"A worker that is k times as fast, on a GPU say, divides hours by k and multiplies storages by it. Text, "
        f"vectors and catalog take {made['other_bytes'] / 1e12:,.0f} TB; concepts ({month:g} dollars a terabyte and "
        "month):",
        "",
        *table(["concepts", "encoding", "TB", "dollars a month"], sizes),
        "While it runs, the staging folders hold all that once more. Vectors lie in memory while a storage is "
        "searched, which sets how many storages there must be. Prices were given, not measured.",
        "",
        f"`{record['command']}`, from {by}.",
        "",
    ]
