"""What does a second worker bring?

Runs `pipelines/ingest_ray.py` on this machine with one worker and with two, a thread each, into new storages. Workers
load their models first; what is compared is the time they work on parts. Seconds of a CPU, which other work on the
machine changes little, tell what a token costs a worker and the driver.
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
from compllm_rag.config import DEFAULT_EMBEDDER
from compllm_rag.errors import ConfigurationError, WorkersFailedError

JOB = Path(__file__).parents[2] / "pipelines" / "ingest_ray.py"
_SECONDS = ("plan_s", "encode_s", "merge_s", "driver_cpu_s", "workers_s", "workers_cpu_s")
KEPT = ("source_tokens", "chunks", "parts", "workers", *_SECONDS)


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
    args = parsed(options, argv)
    if not JOB.exists():
        raise ConfigurationError("this benchmark runs a job of the repository", got=f"no {JOB}", next_step="clone it")
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        data.mkdir()
        n_bytes = corpus(data, texts(args.texts), args.chars, args.part_chars)
        rows = {str(n): measure(args, n, Path(scratch), data) for n in (1, 2)}
    one, two = rows["1"], rows["2"]
    result = {
        "llm": args.llm,
        "text_bytes": n_bytes,
        "runs": rows,
        # Tokens in the time that each of them worked, two at once over one alone.
        "throughput_of_two_over_one": 2 * one["workers_s"] / two["workers_s"],
    }
    return written(args, result)


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    runs = [
        [
            n,
            f"{run['source_tokens']:,}",
            str(run["parts"]),
            number(run["workers_s"]),
            f"{100 * run['workers_cpu_s'] / run['workers_s']:.0f} %",
            number(run["merge_s"], 2),
        ]
        for n, run in record["runs"].items()
    ]
    tokens = sum(run["source_tokens"] for run in record["runs"].values())
    worker, driver = (sum(run[name] for run in record["runs"].values()) for name in ("workers_cpu_s", "driver_cpu_s"))
    return [
        "## Ingestion by many workers",
        "",
        "The same texts by `pipelines/ingest_ray.py` with one worker and with two, a thread each, on one machine; how "
        "it works is told in [ingest](guide/ingest.md#many-workers).",
        "",
        *table(
            [
                "workers",
                "tokens",
                "parts",
                "they worked (s, together)",
                "share of a core that each had",
                "merge and commit (s)",
            ],
            runs,
        ),
        f"In the time that they worked, two workers did {record['throughput_of_two_over_one']:.2f} times what one did "
        f"alone. Of a core's own time, a thousand tokens took workers {1000 * worker / tokens:.2f} s (chunk, embed, "
        f"compress, write) and the driver {1000 * driver / tokens:.3f} s (read, plan, merge, commit), which then keeps "
        f"up with about {worker / driver:,.0f} such workers.",
        "",
        f"{source(record)}.",
        "",
    ]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
