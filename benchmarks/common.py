"""What the benchmarks share: models and texts to run on, timing, and the record they write."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.loading import load_compressor_for
from compllm_rag.config import DEFAULT_LLM

_PACKAGES = ("compllm-rag", "torch", "transformers", "llama-index-core", "faiss-cpu", "diskcache")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the result there")
    made.add_argument("--llm", default=DEFAULT_LLM, help="alias, folder or org/name@revision")
    made.add_argument("--repeats", type=int, default=5, help="timed rounds; medians are reported")
    made.add_argument("--texts", type=Path, help="folder of .md or .txt to run on (default: the sample corpus)")
    return made


def texts(folder: Path | None) -> list[str]:
    """Whole texts to run on."""
    # Here, because the sample corpus comes with parts that want LlamaIndex; some benchmarks run without it.
    from compllm_rag.cli.demo import sample_corpus

    source = folder or sample_corpus() / "articles"
    return [path.read_text(encoding="utf-8") for path in sorted(source.iterdir()) if path.suffix in (".md", ".txt")]


def trained_like(llm: str) -> Compressor:
    """The LLM's compressor; an untrained head is filled with small noise so that nothing can be skipped."""
    compressor = load_compressor_for(llm)
    if not bool(compressor.head.weight.any()):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            noise = torch.randn(compressor.head.weight.shape, generator=generator) * 1e-3
            compressor.head.weight.copy_(noise)
    return compressor


def timed(call: Callable[[], object]) -> float:
    """Seconds one call takes."""
    begun = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Time several calls in turns, after one round that is not counted: a noisy machine then bothers all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            took = timed(call)
            if round_:
                seconds[name].append(took)
        progress(f"round {round_} of {repeats}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items() if s))
    return seconds


def median_of_quotients(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Round by round quotients: median, least and most."""
    quotients = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": statistics.median(quotients), "min": min(quotients), "max": max(quotients)}


def progress(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def write(result: dict[str, Any], path: Path | None) -> None:
    """Print the result and write it where asked, with what it was measured on."""
    record = {"command": command(sys.argv), "environment": environment(), **result}
    text = json.dumps(record, indent=1)
    print(text)
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")


def environment() -> dict[str, Any]:
    """Machine, versions and commit; no names and no paths."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    git, root = shutil.which("git"), Path(__file__).parents[1]
    commit = ""
    if git and (root / ".git").exists():  # of this checkout; an installed package may lie within somebody's repository
        found = subprocess.run([git, "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
        commit = found.stdout.strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES if _installed(name)},
        "commit": commit,
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def reworded(sources: Sequence[str], copies: int = 10_000) -> Iterator[str]:
    """Texts over and over, from the second time on with other words.

    Every seventh word gets the number of the copy, so that hardly any segment occurs twice and nothing is deduplicated.
    """
    for copy in range(copies):
        for text in sources:
            words = text.split(" ")
            yield " ".join(f"{word}{copy}" if copy and at % 7 == 3 else word for at, word in enumerate(words))


def command(argv: Sequence[str]) -> str:
    """What to type to measure it again; where the result was written is nobody's business."""
    words = list(argv[1:])
    if "--json" in words:
        at = words.index("--json")
        del words[at : at + 2]
    return shlex.join(["python", "-m", f"benchmarks.{Path(argv[0]).stem}", *words])
