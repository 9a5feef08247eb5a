"""Small ingests with other settings, timed in turns: what benchmarks.ingest_scale ends with. Nothing is embedded."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import compllm_rag.compression.compressor as compression
from benchmarks.common import in_turns
from benchmarks.ingest import ensure
from compllm_rag.compression.compressor import Compressor
from compllm_rag.library import ConceptLibrary
from compllm_rag.store import DiskStore

RATE = 2.0


def variant(compressor: Compressor, **changed: Any) -> Compressor:
    """An untrained compressor with the shipped one's LoRA, which costs what a trained one costs, and other settings."""
    return Compressor(compressor.llm, compressor.config.model_copy(update=changed))


def sweep(calls: dict[str, Compressor], chunks: list[str], repeats: int) -> dict[str, Any]:
    """Compressing alone, in turns: tokens/s, and bytes of concepts per source token."""
    per_token: dict[str, float] = {}

    def call(name: str, compressor: Compressor) -> Any:
        def run() -> None:
            with (
                tempfile.TemporaryDirectory() as folder,
                DiskStore(Path(folder) / "concepts", hidden_size=compressor.hidden_size) as store,
            ):
                report = ConceptLibrary(compressor, store, rate=RATE).ensure(chunks)
                store.flush()
                per_token[name] = store.stats().payload_bytes / report.source_tokens

        return run

    seconds = in_turns({name: call(name, compressor) for name, compressor in calls.items()}, repeats)
    tokens = sum(len(next(iter(calls.values())).segmenter.tokenize(text).ids) for text in chunks)
    return {
        name: {
            "tokens_per_s": statistics.median(tokens / s for s in series),
            "bytes_per_token": per_token[name],
            "seconds": series,
        }
        for name, series in seconds.items()
    }


def batch_sizes(compressor: Compressor, chunks: list[str], sizes: list[int], repeats: int) -> dict[str, Any]:
    """Tokens/s of compressing alone by the most positions of one batch."""
    device = "cpu" if compressor.llm.device.type == "cpu" else "cuda"
    before = compression.BATCH_POSITIONS[device]
    tokens = sum(len(compressor.segmenter.tokenize(text).ids) for text in chunks)

    def call(size: int) -> Any:
        def run() -> None:
            compression.BATCH_POSITIONS[device] = size
            ensure(compressor, chunks, RATE)

        return run

    try:
        seconds = in_turns({str(size): call(size) for size in sizes}, repeats)
    finally:
        compression.BATCH_POSITIONS[device] = before
    return {
        name: {"tokens_per_s": statistics.median(tokens / s for s in series), "seconds": series}
        for name, series in seconds.items()
    }
