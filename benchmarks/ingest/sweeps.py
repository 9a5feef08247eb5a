"""Small ingests with other settings, timed in turns: what ingest_scale ends with. Nothing is embedded."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import compllm_rag.compression.compressor as compression
from benchmarks.common import compressed, in_turns
from compllm_rag.compression.compressor import Compressor

RATE = 2.0


def variant(compressor: Compressor, **changed: Any) -> Compressor:
    """An untrained compressor with the shipped one's LoRA, which costs what a trained one costs, and other settings."""
    return Compressor(compressor.llm, compressor.config.model_copy(update=changed))


def sweep(calls: dict[str, Compressor], chunks: list[str], repeats: int) -> dict[str, Any]:
    """Compressing alone, in turns: tokens/s, and bytes of concepts per source token."""
    per_token: dict[str, float] = {}

    def run(name: str) -> None:
        per_token[name] = compressed(calls[name], chunks, RATE)

    found = _speeds(next(iter(calls.values())), chunks, {name: partial(run, name) for name in calls}, repeats)
    return {name: row | {"bytes_per_token": per_token[name]} for name, row in found.items()}


def batch_sizes(compressor: Compressor, chunks: list[str], sizes: list[int], repeats: int) -> dict[str, Any]:
    """Tokens/s of compressing alone by the most positions of one batch."""
    device = "cpu" if compressor.llm.device.type == "cpu" else "cuda"
    before = compression.BATCH_POSITIONS[device]

    def run(size: int) -> None:
        compression.BATCH_POSITIONS[device] = size
        compressed(compressor, chunks, RATE)

    try:
        return _speeds(compressor, chunks, {str(size): partial(run, size) for size in sizes}, repeats)
    finally:
        compression.BATCH_POSITIONS[device] = before


def _speeds(
    compressor: Compressor, chunks: list[str], calls: dict[str, Callable[[], None]], repeats: int
) -> dict[str, Any]:
    tokens = sum(len(compressor.segmenter.tokenize(text).ids) for text in chunks)
    return {
        name: {"tokens_per_s": statistics.median(tokens / s for s in series), "seconds": series}
        for name, series in in_turns(calls, repeats).items()
    }
