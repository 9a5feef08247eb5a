"""What the benchmarks share: models and texts to run on, timing, and the record they write."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.loading import load_compressor_for
from compllm_rag.compression.segmentation import chunk_texts
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import DEFAULT_LLM
from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.journal import Journal
from compllm_rag.library import ConceptLibrary
from compllm_rag.store import DiskStore

Record = dict[str, Any]
_PACKAGES = ("compllm-rag", "torch", "transformers", "llama-index-core", "faiss-cpu", "diskcache")


_OPTIONS: dict[str, dict[str, Any]] = {
    "llm": {"default": DEFAULT_LLM, "help": "alias, folder or org/name@revision"},
    "repeats": {"type": int, "default": 5, "help": "timed rounds; medians are reported"},
    "texts": {"type": Path, "help": "folder of .md or .txt to run on (default: the sample corpus)"},
    "data-dir": {"type": Path, "help": "folder of evaluation sets and plain texts"},
    "limit": {"type": int, "help": "questions, the first of a seeded order"},
    "rate": {"type": float, "default": 2.0, "help": "source tokens per concept"},
    "rates": {"type": float, "nargs": "+", "default": [2.0, 4.0], "help": "source tokens per concept"},
    "reader": {"default": "auto", "help": "folder of a reader, auto or none"},
    "compressor": {"default": "auto", "help": "folder of a compressor, auto or none"},
    "codec": {"default": "deep", "choices": ["deep", "input"], "help": "where concepts enter, unless a folder says so"},
    "entry-layer": {"type": int, "help": "of the compressor that ships for it, or of untrained deep concepts"},
    "dtype": {"help": "of the LLM: float32, bfloat16 or float16 (default: float32 on a CPU)"},
    "embedder": {"help": "retrieval embedder; default: the embedded one"},
    "batch-size": {"type": int, "default": 16, "help": "questions of a batch"},
}


def parser(name: str, description: str | None, shared: str, **defaults: Any) -> argparse.ArgumentParser:
    """Options of a benchmark: `--json`, and those that several have.

    Args:
        name: The benchmark's.
        description: Its module's docstring.
        shared: Names of `_OPTIONS`.
        defaults: Of these options, where they differ from those there.
    """
    made = argparse.ArgumentParser(
        f"compllm-rag bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, help="write the result there")
    for option in shared.split():
        made.add_argument(f"--{option}", **_OPTIONS[option])
    made.set_defaults(**defaults)
    return made


def parsed(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options given, None being those of the process, and as `command` what to type to measure it again."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = options.parse_args(words)
    if "--json" in words:  # where the result was written is nobody's business
        at = words.index("--json")
        del words[at : at + 2]
    args.command = shlex.join([*options.prog.split(), *words])
    return args


def record_of(args: argparse.Namespace, result: Mapping[str, Any]) -> Record:
    """A result with the command and the machine it was measured by."""
    return {"command": args.command, "environment": environment(), **result}


def written(args: argparse.Namespace, result: Mapping[str, Any]) -> Record:
    """The record of a result, in a file too where asked."""
    record = record_of(args, result)
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def journal_of(path: Path | None, run: Mapping[str, Any]) -> Journal:
    """The journal of a run, beside its JSON file (NAME.records.jsonl).

    Raises:
        ConfigurationError: The file there is of another run.
    """
    return Journal(path.with_suffix(".records.jsonl") if path else None, run)


def part(journal: Journal, name: str, make: Callable[[], Any], **what: Any) -> Any:
    """A part of a run: made now, or before if the journal has it.

    Args:
        journal: Of the run.
        name: Of the part.
        make: Makes it, as JSON can hold it.
        what: What it depends on besides the run.
    """
    found = journal.get({"part": name, **what})
    if found is not None:
        progress(f"{name}: done before")
        return found
    made = json.loads(json.dumps(make()))  # the same whether it was made now or before
    journal.put({"part": name, **what}, made)
    return made


def texts(folder: Path | None) -> list[str]:
    """Whole texts to run on."""
    # Here, because the sample corpus comes with parts that want LlamaIndex; some benchmarks run without it.
    from compllm_rag.cli.demo import sample_corpus

    source = folder or sample_corpus() / "articles"
    return [path.read_text(encoding="utf-8") for path in sorted(source.iterdir()) if path.suffix in (".md", ".txt")]


def chunks_of(compressor: ConceptCompressor, sources: list[str], n_tokens: int) -> list[str]:
    """Chunks of the texts, about `n_tokens` in all."""
    segmenter = compressor.spec.segmenter
    out: list[str] = []
    total = 0
    for source in itertools.cycle(sources):
        for text, _, _ in chunk_texts(segmenter.tokenize(source), 200):
            if total >= n_tokens:
                return out
            out.append(text)
            total += len(segmenter.tokenize(text).ids)
    return out


def compressed(compressor: ConceptCompressor, chunks: list[str], rate: float) -> float:
    """Compress chunks into a new store on disk, down to the disk; bytes of concepts per source token."""
    with (
        tempfile.TemporaryDirectory() as folder,
        DiskStore(Path(folder) / "concepts", hidden_size=compressor.spec.width) as store,
    ):
        report = ConceptLibrary(compressor, store, rate=rate).ensure(chunks)
        store.flush()
        return store.stats().payload_bytes / report.source_tokens


def input_compressor(llm: str, **options: Any) -> Compressor:
    """The LLM's compressor of concepts at the input embeddings; options as of `load_compressor_for`.

    Raises:
        ConfigurationError: The folder named holds another.
    """
    made = load_compressor_for(llm, codec="input", **options)
    if not isinstance(made, Compressor):
        raise ConfigurationError(
            "this benchmark measures concepts at the input embeddings", got="deep concepts", next_step="name another"
        )
    return made


def trained_like(llm: str) -> Compressor:
    """The LLM's compressor; an untrained head is filled with small noise so that nothing can be skipped."""
    compressor = input_compressor(llm)
    if not bool(compressor.head.weight.any()):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            noise = torch.randn(compressor.head.weight.shape, generator=generator) * 1e-3
            compressor.head.weight.copy_(noise)
    return compressor


def timed_compressor(llm: str, codec: str) -> ConceptCompressor:
    """What is timed: the LLM's deep concepts, or those at the input embeddings with nothing that can be skipped."""
    return load_compressor_for(llm) if codec == "deep" else trained_like(llm)


def any_compressor_of(args: argparse.Namespace) -> ConceptCompressor:
    """The compressor and reader that the options name, of the codec that they name."""
    reader, compressor = (None if word == "none" else word for word in (args.reader, args.compressor))
    return load_compressor_for(
        args.llm,
        reader=reader,
        compressor=compressor,
        codec=args.codec,
        entry_layer=args.entry_layer,
        dtype=args.dtype,
    )


def dtype_of(compressor: ConceptCompressor) -> str:
    """The name of the dtype in which its LLM runs."""
    return str(compressor.llm.dtype).removeprefix("torch.")


def timed(call: Callable[[], object]) -> float:
    """Seconds one call takes."""
    begun = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def in_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, *, new_order: bool = False
) -> dict[str, list[float]]:
    """Time several calls in turns, after one round that is not counted: a noisy machine then bothers all alike.

    Args:
        calls: By name.
        repeats: Rounds that count.
        new_order: In every round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name in random.Random(round_).sample(list(calls), len(calls)) if new_order else calls:
            took = timed(calls[name])
            seconds[name] += [took] if round_ else []
        progress(f"round {round_} of {repeats}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items() if s))
    return seconds


def median_of_quotients(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Round by round quotients: median, least and most."""
    quotients = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": statistics.median(quotients), "min": min(quotients), "max": max(quotients)}


def waits(seconds: Sequence[float]) -> dict[str, float | int | None]:
    """How long many waited: how many they are, median, 95th percentile and longest; None where nobody did."""
    ordered = sorted(seconds)
    if not ordered:
        return {"n": 0, "p50": None, "p95": None, "most": None}
    p50, p95 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.95))
    return {"n": len(ordered), "p50": p50, "p95": p95, "most": ordered[-1]}


def progress(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


class Tenths:
    """Progress of an evaluation: a line whenever a setting begins and a tenth of it is done."""

    def __init__(self) -> None:
        self._last = ("", -1)

    def __call__(self, message: str, share: float | None) -> None:
        """Take the message and the share that is done."""
        now = (message.split(",")[0], int(10 * (share or 0)))
        if now != self._last:
            self._last = now
            progress(f"{message}, {10 * now[1]} %")


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
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": commit,
    }


def _version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def reworded(sources: Sequence[str], copies: int = 10_000) -> Iterator[str]:
    """Texts over and over, from the second time on with other words.

    Every seventh word gets the number of the copy, so that hardly any segment occurs twice and nothing is deduplicated.
    """
    for copy in range(copies):
        for text in sources:
            words = text.split(" ")
            yield " ".join(f"{word}{copy}" if copy and at % 7 == 3 else word for at, word in enumerate(words))
