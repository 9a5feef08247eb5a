"""The compressor and the concepts of a storage, without its text and vectors."""

from __future__ import annotations

from pathlib import Path

from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.choices import Choices
from compllm_rag.compression.rate_policies.choosing import chooser_of
from compllm_rag.compression.rate_policies.measures import TextMeasures
from compllm_rag.compression.spec import ConceptCompressor, DeferredCompressor
from compllm_rag.config import IngestConfig
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.settling import open_price
from compllm_rag.llamaindex.storage_parts import defer_own_compressor
from compllm_rag.storage.manifest import CONCEPTS, has_manifest, read_manifest
from compllm_rag.storage.stores import open_store
from compllm_rag.store import ConceptStore, DiskStore


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
    kept = None
    if not isinstance(manifest.ingest.rate, float) or manifest.ingest.guard != "off":
        kept = Choices(Catalog.open(folder, read_only=True))  # open as long as the library is
    return library_of(made, store, manifest.ingest, kept)


def library_of(
    compressor: ConceptCompressor | DeferredCompressor, store: ConceptStore, config: IngestConfig, kept: Choices | None
) -> ConceptLibrary:
    """The library that the settings of a storage describe.

    Args:
        compressor: Its own.
        store: Its concepts.
        config: Its settings.
        kept: What was chosen for the texts in it; None where their length alone decides.

    Raises:
        ConfigurationError, RateOutOfReachError: See `chooser_of`.
    """
    measures = TextMeasures(lambda: compressor.get() if isinstance(compressor, DeferredCompressor) else compressor)
    chooser = chooser_of(config, measures, compressor.spec.config.longest_unit)
    made = ConceptLibrary(compressor, store, rate=chooser, namespace=config.namespace, kept=kept)
    if kept is not None:
        kept.took = made.took
        open_price(made, kept.catalog)
    return made
