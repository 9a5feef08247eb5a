"""What reading, compressing, fetching and loading cost on the LLM at hand: what `reuse` adds up."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import compressed, in_turns, timed
from benchmarks.ttft.case import CHUNK
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.errors import ConfigurationError
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.library import ConceptLibrary
from compllm_rag.models.halves import Halves
from compllm_rag.prompt import PromptInputs
from compllm_rag.store import DiskStore

_FEW = 10  # chunks a call fetches, compresses, stores or loads


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes, measured.

    Attributes:
        prefill: (constant, per position, per position squared).
        compress: Per source token, written to a store on disk.
        fetch: Of one chunk's concepts from disk.
        kv_load: Of one chunk's KV cache from disk into the cache of a prompt.
        kv_store: Of one chunk's KV cache to disk.
        kv_bytes: Of the KV cache of one position, kept in fp16 as concepts are.
        concept_bytes: Of one concept in fp16.
        lower: As `prefill`, of the layers below the entry layer of deep concepts; None at the input embeddings.
        upper: As `prefill`, of the layers from it on.
        share: Of the LLM's layers that a concept passes, and keeps keys and values in.
    """

    prefill: tuple[float, float, float]
    compress: float
    fetch: float
    kv_load: float
    kv_store: float
    kv_bytes: float
    concept_bytes: float
    lower: tuple[float, float, float] | None = None
    upper: tuple[float, float, float] | None = None
    share: float = 1.0

    def read(self, positions: int, known: int = 0) -> float:
        """Seconds to prefill a prompt of which the first `known` positions are in a KV cache."""
        return _seconds(self.prefill, positions, known)

    def read_deep(self, tokens: float, positions: int, known_tokens: float = 0, known: int = 0) -> float:
        """The same with deep concepts: the lower layers see the prompt's own tokens, the upper ones all positions.

        Raises:
            ConfigurationError: These are costs of concepts at the input embeddings.
        """
        if self.lower is None or self.upper is None:
            raise ConfigurationError(
                "there are no costs of two halves", expected="costs of deep concepts", next_step="measure them anew"
            )
        return _seconds(self.lower, tokens, known_tokens) + _seconds(self.upper, positions, known)


def _seconds(cost: tuple[float, float, float], positions: float, known: float) -> float:
    constant, linear, squared = cost
    return constant + linear * (positions - known) + squared * (positions**2 - known**2)


def measure(
    compressor: ConceptCompressor, chunks: list[str], rate: float, lengths: list[int], repeats: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """All costs, each the median of its rounds; everything in turns, in a new order each round.

    Returns:
        Fields of `Costs`, and the seconds of every round of each call, `_FEW` chunks at a time.
    """
    generator, llm = LocalGenerator(compressor.llm), compressor.llm
    few = chunks[:_FEW]

    def inputs(n: int) -> PromptInputs:
        return PromptInputs(
            torch.randn(1, n, llm.hidden_size, device=llm.device, dtype=llm.dtype) * 0.02, None, None, [[]]
        )

    def prefill(n: int) -> Callable[[], object]:
        ready = inputs(n)
        return lambda: generator.prefill(ready)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = DiskStore(folder / "concepts", hidden_size=compressor.spec.width)
        library = ConceptLibrary(compressor, store, rate=rate)
        library.ensure(few)
        store.flush()
        passages = [library.passage(text) for text in few]
        _, cache = generator.prefill(inputs(CHUNK))
        kept = {
            f"{kind}{i}": tensor.half().contiguous()
            for i, layer in enumerate(cache.layers)
            for kind, tensor in (("k", layer.keys), ("v", layer.values))
        }
        paths = [folder / f"{i}.safetensors" for i in range(len(few))]
        calls: dict[str, Callable[[], object]] = {f"prefill {n}": prefill(n) for n in lengths}
        halves = compressor.halves.merged() if compressor.halves else None
        if halves is not None:
            calls |= {f"{half} {n}": half_prefill(halves, half, n) for half in ("lower", "upper") for n in lengths}
        calls["fetch"] = lambda: [library.fetch(text, missing="error") for text in few]
        calls["compress"] = lambda: compressed(compressor, few, rate)
        calls["kv_store"] = lambda: [save_file(kept, path) for path in paths]
        calls["kv_load"] = lambda: load_cache(paths, llm.dtype, llm.device)
        timed(calls["kv_store"])  # so that there is something to load
        seconds = in_turns(calls, repeats, new_order=True)
        store.close()
    medians = {name: statistics.median(took) for name, took in seconds.items()}
    costs = Costs(
        fit(lengths, [medians[f"prefill {n}"] for n in lengths]),
        medians["compress"] / sum(len(passage.ids) for passage in passages),
        medians["fetch"] / len(few),
        medians["kv_load"] / len(few),
        medians["kv_store"] / len(few),
        sum(t.numel() * t.element_size() for t in kept.values()) / CHUNK,
        2 * compressor.spec.width,
        **_of_halves(compressor, lengths, medians),
    )
    return vars(costs), seconds


def _of_halves(compressor: ConceptCompressor, lengths: list[int], medians: dict[str, float]) -> dict[str, Any]:
    """Fields of `Costs` that deep concepts have."""
    if compressor.halves is None:
        return {}
    fits = {half: fit(lengths, [medians[f"{half} {n}"] for n in lengths]) for half in ("lower", "upper")}
    return {**fits, "share": compressor.spec.prefill_cost(1.0)}


def half_prefill(halves: Halves, half: str, n: int) -> Callable[[], object]:
    """One half of the LLM over n random states, with a KV cache of its own, from the first position on."""
    llm = halves.llm
    states = torch.randn(1, n, llm.hidden_size, device=llm.device, dtype=llm.dtype)
    mask, at = torch.ones(1, n, dtype=torch.long, device=llm.device), torch.arange(n, device=llm.device)[None]

    @torch.inference_mode()
    def run() -> object:
        low, high = halves.caches()
        if half == "lower":
            return halves.below(states, mask, at, low)
        return halves.above(states, mask, at, high, keep=1)

    return run


def load_cache(paths: list[Path], dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Keys and values (1, heads, positions, head_dim) of several chunks' files, joined into one cache.

    Joining copies everything once, which is what it takes to have it in memory: what is mapped and never touched is
    not loaded.
    """
    files = [load_file(path) for path in paths]
    return {name: torch.cat([file[name] for file in files], dim=2).to(device, dtype) for name in files[0]}


def fit(lengths: list[int], seconds: list[float]) -> tuple[float, float, float]:
    """Constant, linear and squared cost of a prefill, none of them negative."""
    from scipy.optimize import nnls

    n = np.array(lengths, dtype=np.float64)
    rows = np.stack([np.ones_like(n), n, n**2], axis=1) / np.array(seconds)[:, None]  # relative errors count
    found, _ = nnls(rows, np.ones(len(n)))
    return float(found[0]), float(found[1]), float(found[2])
