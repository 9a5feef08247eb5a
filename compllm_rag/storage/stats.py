"""What a storage holds, in numbers, told without loading any model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compllm_rag.catalog.accounts import Accounts
from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.choices import SLOW_S, ChosenRates
from compllm_rag.catalog.kv import KeyValues
from compllm_rag.catalog.pending import PendingChunks
from compllm_rag.compression.pretrained import saved_config
from compllm_rag.compression.rate_policies.guard import guard_words, limit_of
from compllm_rag.config import IngestConfig
from compllm_rag.errors import UnsupportedFormatError
from compllm_rag.storage.adapter_files import COMPRESSOR
from compllm_rag.storage.manifest import CONCEPTS, META_KEY, Manifest, require_storage
from compllm_rag.storage.stores import open_store
from compllm_rag.store.base import StoreStats


def storage_stats(folder: Path) -> dict[str, Any]:
    """What a storage holds, told without loading any model; the fields of `stats --json` (docs/results.md).

    Raises:
        StorageNotFoundError: There is no storage here.
        UnsupportedFormatError, CorruptRecordError: The storage is damaged or too new.
    """
    require_storage(folder)
    with Catalog.open(folder, read_only=True) as catalog:
        manifest, values = Manifest.parse(catalog.get_meta(META_KEY)), KeyValues(catalog)
        with open_store(manifest, folder / CONCEPTS, read_only=True) as store:
            trained = _trained(folder)
            return stats_fields(Accounts(values), len(PendingChunks(values)), store.stats(), manifest, trained=trained)


def _trained(folder: Path) -> bool | None:
    try:
        return saved_config(folder / COMPRESSOR).trained
    except UnsupportedFormatError:
        return None  # `verify` says what is wrong with it


def stats_fields(
    accounts: Accounts, pending: int, stored: StoreStats, manifest: Manifest, *, trained: bool | None
) -> dict[str, Any]:
    """Counts, rates and identities as plain values; `trained` is None where the compressor cannot be read."""
    documents, total = accounts.total()
    chosen = accounts.choices.summary()
    compressed = total.source_tokens - chosen.text_tokens
    rate = compressed / total.concepts if total.concepts else None
    return {
        "documents": documents,
        "chunks": total.chunks,
        "segments": total.segments,
        "unique_segments": stored.records,
        "source_tokens": total.source_tokens,
        "concepts": total.concepts,
        "achieved_rate": rate,
        "entry_layer": manifest.entry_layer,
        "prefill_cost": _prefill_cost(manifest, rate, compressed, chosen.text_tokens),
        "concept_bytes": stored.payload_bytes,
        "encoding": manifest.ingest.encoding,
        "bytes_per_source_token": stored.payload_bytes / total.source_tokens if total.source_tokens else None,
        "fingerprint": manifest.fingerprint,
        "compressor": None if trained is None else "trained" if trained else "untrained",
        "llm": manifest.llm,
        "embedder": manifest.embedder,
        "rate": manifest.ingest.rate,
        "chunk_size": manifest.ingest.chunk_size,
        "namespace": manifest.ingest.namespace,
        **_rate_fields(manifest.ingest, chosen, total.chunks),
        "metrics": accounts.measures.fields(total.chunks - sum(chosen.by_reason.values()), pending),
    }


def _prefill_cost(manifest: Manifest, rate: float | None, compressed: int, as_text: int) -> float | None:
    """Of a passage token, what stays text included; None where that is not known, or there is none."""
    cost = None if rate is None else manifest.prefill_cost(rate)
    if rate is None or cost is None:
        return 1.0 if rate is None and as_text else None
    return (cost * compressed + as_text) / (compressed + as_text)


def _rate_fields(config: IngestConfig, chosen: ChosenRates, chunks: int) -> dict[str, Any]:
    """Rates that were asked for and achieved; the latter are None in a storage that an earlier release made."""
    known = chosen.chunks == chunks
    return {
        "also_rates": list(config.also_rates),
        "budget": config.budget_positions if config.budget_bytes is None else f"{config.budget_bytes} bytes",
        "guard": config.guard,
        "guard_limit": limit_of(config),
        "chunks_by_rate": dict(sorted(chosen.by_rate.items())) if known else None,
        "rate_fluctuation": chosen.fluctuation if known else None,
        "chunks_as_text": chosen.by_reason if known else None,
        "tokens_as_text": chosen.text_tokens if known else None,
        "guard_expected": chosen.expected if known else None,
        "slow_chunks": chosen.slow,
        "slowest_chunks": chosen.slowest,
    }


_STABLE = 0.05  # what achieved rates may differ from the wished ones


def _measured(stats: Mapping[str, Any]) -> str:
    found = stats["guard_expected"]
    if found is None or stats["guard_limit"] is None:
        return ""
    words = guard_words({"by": stats["guard"], "expected": found["mean"], "limit": stats["guard_limit"]})
    return f"; mean of the {words} ({found['least']:.2f} to {found['most']:.2f})"


def rate_notes(stats: Mapping[str, Any]) -> list[str]:
    """What a user should know of the rates and times in `storage_stats`, in words."""
    notes = []
    if stats["rate_fluctuation"] is not None and stats["rate_fluctuation"] > _STABLE:
        notes.append(
            f"note: achieved rates differ from the wished ones by {100 * stats['rate_fluctuation']:.1f} % "
            f"(goal: {100 * _STABLE:g} %): chunks are too short for the rate; --chunk-size makes longer ones"
        )
    for reason, n in (stats["chunks_as_text"] or {}).items():
        notes.append(
            f"note: {n} chunks stay text ({reason}): compression would lose too much of their numbers, identifiers and "
            f"code; they are read as text, at the cost of text{_measured(stats)}"
        )
    if stats["slow_chunks"]:
        worst = stats["slowest_chunks"][0]
        notes.append(
            f"note: {stats['slow_chunks']} chunks took longer than {1000 * SLOW_S:g} ms to compress where they were "
            f"made, the slowest {1000 * worst['seconds']:.0f} ms ({worst['tokens']} tokens of "
            f"{worst['doc_id']!r:.60}); a lower --chunk-size in a new storage makes them faster"
        )
    return notes
