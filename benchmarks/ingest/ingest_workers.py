"""What does a second worker bring, and what would a terabyte of text take?

Runs `pipelines/ingest_ray.py` on this machine with one worker and with two, a thread each, into new storages. Workers
load their models first; what is compared is the time they work on parts. Seconds of a CPU, which other work on the
machine changes little, tell what a token costs a worker and the driver; bytes are those of the storage. From these the
page reckons hours, bytes and money for more text. Prices are options: they were not measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import number, source, table
from benchmarks.common import Record, parsed, parser, progress, texts, written
from compllm_rag.compression.loading import load_compressor_for
from compllm_rag.config import DEFAULT_EMBEDDER
from compllm_rag.errors import ConfigurationError, WorkersFailedError
from compllm_rag.store.encodings import ENCODINGS, deep_encoding, encoding_named

JOB = Path(__file__).parents[2] / "pipelines" / "ingest_ray.py"
RATES = (1, 2, 4)
KEPT = ("source_tokens", "chunks", "parts", "workers", "plan_s", "encode_s", "merge_s")
KEPT += ("driver_cpu_s", "workers_s", "workers_cpu_s")


def corpus(folder: Path, sources: list[str], n_chars: int, part_chars: int) -> int:
    """Write texts as documents of half a part each; tells their bytes."""
    size, whole = part_chars // 2, "\n\n".join(sources)
    whole *= -(-n_chars // len(whole))
    written_bytes = 0
    for i in range(0, n_chars, size):
        text = f"Copy {i}.\n\n{whole[i : min(i + size, n_chars)]}"
        written_bytes += (folder / f"{i:09d}.txt").write_bytes(text.encode())
    return written_bytes


def measure(args: Any, workers: int, folder: Path, data: Path) -> dict[str, Any]:
    """One run: what the job reports, and the bytes of its storage."""
    storage = folder / f"storage-{workers}"
    command = [sys.executable, str(JOB), "--data", str(data), "--storage", str(storage), "--workers", str(workers)]
    command += ["--llm", args.llm, "--embedder", args.embedder, "--part-chars", str(args.part_chars)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise WorkersFailedError("the job failed", got=f"exit code {done.returncode}", next_step="see above")
    report = json.loads(done.stdout)
    row = {name: report[name] for name in KEPT}
    row["concepts_bytes"] = _bytes(storage / "concepts")
    row["text_and_vectors_bytes"] = sum(path.stat().st_size for path in storage.iterdir() if path.is_file())
    progress(f"{workers} workers: {row['workers_s']:.1f} s of work, {row['encode_s']:.1f} s with their start")
    return row


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it.

    Raises:
        ConfigurationError: There is no job here: only the wheel is installed.
    """
    options = parser("ingest_workers", __doc__, "llm texts embedder", embedder=DEFAULT_EMBEDDER)
    options.add_argument("--chars", type=int, default=100_000, help="characters of the corpus")
    options.add_argument("--part-chars", type=int, default=10_000, help="characters of a part")
    options.add_argument("--core-hour", type=float, default=0.05, help="price of an hour of a core")
    options.add_argument("--terabyte-month", type=float, default=25.0, help="price of a terabyte on disk for a month")
    args = parsed(options, argv)
    if not JOB.exists():
        raise ConfigurationError("this benchmark runs a job of the repository", got=f"no {JOB}", next_step="clone it")
    width = load_compressor_for(args.llm).spec.width
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        data.mkdir()
        n_bytes = corpus(data, texts(args.texts), args.chars, args.part_chars)
        rows = {str(n): measure(args, n, Path(scratch), data) for n in (1, 2)}
    one, two = rows["1"], rows["2"]
    result = {
        "llm": args.llm,
        "width": width,
        "text_bytes": n_bytes,
        "prices": {"core_hour": args.core_hour, "terabyte_month": args.terabyte_month},
        "runs": rows,
        # Tokens in the time that each of them worked, two at once over one alone.
        "throughput_of_two_over_one": 2 * one["workers_s"] / two["workers_s"],
    }
    return written(args, result)


def plan(record: Record, text_bytes: float = 1e12) -> dict[str, Any]:
    """What more text would take, by what a token took.

    Args:
        record: The benchmark's.
        text_bytes: Of the text, in UTF-8.
    """
    runs = list(record["runs"].values())
    tokens = sum(run["source_tokens"] for run in runs)
    worker, driver = (sum(run[name] for run in runs) / tokens for name in ("workers_cpu_s", "driver_cpu_s"))
    per_token = record["text_bytes"] / runs[0]["source_tokens"]
    total = text_bytes / per_token
    beside = runs[0]["text_and_vectors_bytes"] / runs[0]["source_tokens"]
    sizes = {
        name: {rate: encoding_named(deep_encoding(name)).nbytes(1, record["width"]) / rate * total for rate in RATES}
        for name in ENCODINGS
    }
    return {
        "tokens": total,
        "bytes_per_token": per_token,
        "worker_tokens_per_s": 1 / worker,
        "driver_tokens_per_s": 1 / driver,
        "core_hours": total * worker / 3600,
        "driver_hours": total * driver / 3600,
        "workers_per_driver": worker / driver,
        "price": total * worker / 3600 * record["prices"]["core_hour"],
        "text_and_vectors_bytes": beside * total,
        "concepts_bytes": sizes,
    }


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    made, prices = plan(record), record["prices"]
    runs = [
        [n, f"{run['source_tokens']:,}", str(run["parts"]), number(run["workers_s"]), number(run["merge_s"], 2)]
        for n, run in record["runs"].items()
    ]
    sizes = [
        [
            name,
            *(
                f"{nbytes / 1e12:,.0f} TB, {nbytes / 1e12 * prices['terabyte_month']:,.0f} a month"
                for nbytes in by.values()
            ),
        ]
        for name, by in made["concepts_bytes"].items()
    ]
    return [
        "## Ingestion by many workers",
        "",
        "The same texts by `pipelines/ingest_ray.py` with one worker and with two, a thread each, on one machine; how "
        "it works is told in [ingest](guide/ingest.md#many-workers).",
        "",
        *table(["workers", "tokens", "parts", "they worked (s, together)", "merge and commit (s)"], runs),
        f"In the time that they worked, two workers did {record['throughput_of_two_over_one']:.2f} times what one did "
        "alone. A core does "
        f"{made['worker_tokens_per_s']:,.0f} tokens in a second of its own as a worker (chunk, embed, compress, write) "
        f"and {made['driver_tokens_per_s']:,.0f} as the driver (read, plan, merge, commit): the driver keeps up with "
        f"about {made['workers_per_driver']:,.0f} such workers.",
        "",
        f"{source(record)}.",
        "",
        f"A terabyte of text, by these figures: {made['tokens'] / 1e9:,.0f} billion tokens at "
        f"{made['bytes_per_token']:.2f} bytes; {made['core_hours']:,.0f} hours of a core, which at "
        f"{prices['core_hour']:g} an hour cost {made['price']:,.0f}; {made['driver_hours']:,.0f} hours of drivers, so "
        "the corpus goes into several storages, each with a driver of its own, until these hours are short enough. "
        f"Text, vectors and catalog take {made['text_and_vectors_bytes'] / 1e12:,.1f} TB, and concepts, by rate "
        f"(at {prices['terabyte_month']:g} a terabyte and month; prices were given, not measured):",
        "",
        *table(["encoding", *(f"rate {rate}" for rate in RATES)], sizes),
        "While it runs the staging folder holds concepts and text once more.",
        "",
    ]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
