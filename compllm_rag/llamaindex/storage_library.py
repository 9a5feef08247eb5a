"""The compressor and the concepts of a storage, without its text and vectors."""

from __future__ import annotations

from pathlib import Path

from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.storage_parts import defer_own_compressor
from compllm_rag.storage.manifest import CONCEPTS, has_manifest, read_manifest
from compllm_rag.storage.stores import open_store
from compllm_rag.store import DiskStore


def storage_of(library: ConceptLibrary) -> Path | None:
    """The storage folder that a library's store belongs to; None for a store in memory or by itself."""
    store = library.store
    if not isinstance(store, DiskStore) or store.path.name != CONCEPTS or not has_manifest(store.path.parent):
        return None
    return store.path.parent


def open_library(folder: Path) -> ConceptLibrary:
    """Load the LLM of a storage and open its concepts; the compressor is loaded when something is to be compressed.

    Raises:
        StorageNotFoundError, UnsupportedFormatError, CorruptRecordError: See `read_manifest`.
        FingerprintMismatchError: The LLM is not the one the storage was made by.
    """
    manifest = read_manifest(folder)
    made = defer_own_compressor(folder, manifest, None, None, {})
    manifest.check_compressor(made.spec.fingerprint, made.llm.source)
    store = open_store(manifest, folder / CONCEPTS)
    return ConceptLibrary(made, store, rate=manifest.ingest.rate, namespace=manifest.ingest.namespace)
