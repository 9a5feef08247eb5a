"""What a storage holds, in numbers, told without loading any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compllm_rag.catalog.accounts import Accounts
from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.kv import KeyValues
from compllm_rag.catalog.pending import PendingChunks
from compllm_rag.compression.pretrained import saved_config
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
    rate = total.source_tokens / total.concepts if total.concepts else None
    return {
        "documents": documents,
        "chunks": total.chunks,
        "segments": total.segments,
        "unique_segments": stored.records,
        "source_tokens": total.source_tokens,
        "concepts": total.concepts,
        "achieved_rate": rate,
        "entry_layer": manifest.entry_layer,
        "prefill_cost": None if rate is None else manifest.prefill_cost(rate),
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
        "metrics": accounts.measures.fields(total.chunks, pending),
    }
