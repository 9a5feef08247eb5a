"""`compllm-rag doctor`: what this machine has, how fast it computes, and what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from compllm_rag.cli.base import STORAGE_VARIABLE, AsJson, print_json, reported
from compllm_rag.cli.storage import UNSOUND
from compllm_rag.config import DEFAULT_EMBEDDER, DEFAULT_LLM
from compllm_rag.errors import CompLLMError

_PACKAGES = (
    "torch",
    "transformers",
    "llama-index-core",
    "sentence-transformers",
    "faiss-cpu",
    "tokenizers",
    "diskcache",
)
_SIZE, _ROUNDS = 768, 5  # of the matrices that are multiplied, and how often
_ROOM = 2 << 30  # bytes that the two defaults and a conversion take


@dataclass(frozen=True)
class Diagnosis:
    """One thing that was looked at.

    Attributes:
        part: What.
        found: What was found.
        good: False where something needs doing.
        advice: One line.
    """

    part: str
    found: dict[str, Any]
    good: bool
    advice: str


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(reported(doctor))


def doctor(
    storage: Annotated[
        Path | None,
        typer.Option("--storage", envvar=STORAGE_VARIABLE, help="Folder of a storage to look at, too."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what this machine has and how it suits: versions, device, threads, dtypes, model cache, storage.

    Ends with 1 when a storage is damaged. Example: compllm-rag doctor --storage storage
    """
    found = [_versions(), _device(), _threads(), _dtypes(), _cache()]
    if storage is not None:
        found.append(_storage(storage))
    if as_json:
        print_json({one.part: {key: value for key, value in asdict(one).items() if key != "part"} for one in found})
    else:
        for one in found:
            values = ", ".join(f"{name} {value}" for name, value in one.found.items())
            typer.echo(f"{'ok  ' if one.good else 'LOOK'}  {one.part}: {values}\n      {one.advice}")
    if not found[-1].good and found[-1].part == "storage":
        raise typer.Exit(UNSOUND)


def _versions() -> Diagnosis:
    found = {"compllm-rag": _version("compllm-rag"), "python": platform.python_version()}
    found |= {name: _version(name) for name in _PACKAGES}
    missing = [name for name, number in found.items() if number == "missing"]
    advice = f"Install what is missing: {', '.join(missing)}." if missing else "Name these when you report a problem."
    return Diagnosis("versions", found, not missing, advice)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _device() -> Diagnosis:
    import torch

    from compllm_rag.models.checkpoints import default_device

    name = default_device()
    found: dict[str, Any] = {"device": name}
    if name == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"name": torch.cuda.get_device_name(), "free_bytes": free, "total_bytes": total}
        return Diagnosis("device", found, True, "Used by default, in bfloat16; --dtype changes that.")
    if name == "mps":
        return Diagnosis("device", found, True, "Apple's GPU is used by default, in bfloat16.")
    hidden = shutil.which("nvidia-smi") is not None
    advice = (
        "An NVIDIA driver is there, but torch has no CUDA: install torch's CUDA build."
        if hidden
        else ("No GPU: small LLMs (up to about 1B) answer in seconds; torch's CPU build is enough and 4 GB smaller.")
    )
    return Diagnosis("device", found, not hidden, advice)


def _threads() -> Diagnosis:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used = torch.get_num_threads()
    found = {"used": used, "cores": cores, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set")}
    if used < cores // 2:
        return Diagnosis("threads", found, False, f"Most cores stand idle: set OMP_NUM_THREADS={cores // 2} or more.")
    if used > cores:
        return Diagnosis("threads", found, False, f"More threads than cores are slower: set OMP_NUM_THREADS={cores}.")
    return Diagnosis("threads", found, True, "As many threads as suit; several processes should share them out.")


def _dtypes() -> Diagnosis:
    """Time products of matrices as an LLM has them, in the two dtypes."""
    import torch

    from compllm_rag.models.checkpoints import default_device

    device = default_device()
    seconds = {name: _product_s(getattr(torch, name), device) for name in ("float32", "bfloat16")}
    faster = seconds["float32"] / seconds["bfloat16"]
    found: dict[str, Any] = {f"{name}_gflops": round(2e-9 * _SIZE**3 / s, 1) for name, s in seconds.items()}
    found["bfloat16_speedup"] = round(faster, 2)
    if device == "cpu" and faster > 1.2:
        return Diagnosis("dtypes", found, True, "bfloat16 is the faster one here: pass --dtype bfloat16.")
    if device == "cpu":
        return Diagnosis("dtypes", found, True, "float32, the default here, suits; bfloat16 would halve memory only.")
    return Diagnosis("dtypes", found, faster > 1, "bfloat16 is the default here; --dtype float32 is the exact one.")


def _product_s(dtype: Any, device: str) -> float:
    import torch

    a = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    times = []
    for _ in range(_ROUNDS + 1):
        begun = time.perf_counter()
        float((a @ a)[0, 0])  # the number is waited for
        times.append(time.perf_counter() - begun)
    return max(statistics.median(times[1:]), 1e-9)


def _cache() -> Diagnosis:
    from compllm_rag.models import default_cache_dir, list_models

    try:
        folder = default_cache_dir()
        fetched = [model.alias for model in list_models(folder) if model.fetched]
        free = shutil.disk_usage(folder).free
    except CompLLMError as error:
        return Diagnosis("model cache", {"trouble": str(error)}, False, "Set COMPLLM_CACHE to a folder of your own.")
    found = {"folder": str(folder), "fetched": fetched, "free_bytes": free}
    missing = [alias for alias in (DEFAULT_LLM, DEFAULT_EMBEDDER) if alias not in fetched]
    if free < _ROOM and missing:
        return Diagnosis("model cache", found, False, "Too little room: free some, or set COMPLLM_CACHE elsewhere.")
    if missing:
        return Diagnosis("model cache", found, True, "The first command fetches them, or compllm-rag models fetch")
    return Diagnosis("model cache", found, True, "The two default models are here; --offline works.")


def _storage(folder: Path) -> Diagnosis:
    from compllm_rag.storage.verification import verify_storage

    try:
        check = verify_storage(folder)
    except CompLLMError as error:
        trouble = " ".join(str(error).split())
        return Diagnosis("storage", {"folder": str(folder), "trouble": trouble}, False, "Name another folder.")
    found = {"folder": str(folder), "documents": check.documents, "chunks": check.chunks, "records": check.records}
    found |= {"bytes": check.pack_bytes, "dead_bytes": check.dead_bytes, "dead_records": check.dead_records}
    found |= {"findings": check.n_findings}
    if not check.sound:
        return Diagnosis("storage", found, False, f"Damaged: compllm-rag repair {folder}")
    dead = check.dead_records or 0  # of text that was deleted or replaced: their bytes are none that no record uses
    if check.dead_bytes * 2 > check.pack_bytes > 0 or dead * 2 > check.records > 0:
        return Diagnosis("storage", found, True, f"Half of it is dead: compllm-rag compact {folder}")
    return Diagnosis("storage", found, True, "Sound; compllm-rag verify --deep proves every digest.")


def show_version(asked: bool) -> None:
    """Print the version and end, for `--version`."""
    if asked:
        typer.echo(f"compllm-rag {_version('compllm-rag')}, Python {platform.python_version()}, {sys.platform}")
        raise typer.Exit
