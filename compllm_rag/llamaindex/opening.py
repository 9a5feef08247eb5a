"""Opening and making the storage of a `ConceptIndex`.

A storage folder holds `catalog.db` and `vectors-N.faiss` (text and vectors, one commit), `concepts/` (the concept
store), and `compressor/` and `reader/` (the adapters the concepts need), so that it can be moved as a whole; only the
target LLM and the embedder are named, not copied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from llama_index.core.base.embeddings.base import BaseEmbedding

from compllm_rag.catalog.tracked import TrackedNodes
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import (
    AUTO,
    compressor_folder,
    load_compressor_for,
    with_room_for_chunks,
    with_unit_length,
)
from compllm_rag.compression.rate_policies.asked import check_heeded, rate_settings
from compllm_rag.compression.rate_policies.choosing import resolved
from compllm_rag.compression.spec import ConceptCompressor, DeferredCompressor
from compllm_rag.config import (
    DEFAULT_EMBEDDER,
    DEFAULT_LLM,
    DEFAULT_RATES,
    Codec,
    GenerationConfig,
    RateOptions,
)
from compllm_rag.errors import CompLLMError, ConfigurationError
from compllm_rag.llamaindex.embedding import LoadedEmbedder
from compllm_rag.llamaindex.opening_checks import (
    check_adapters,
    check_complete,
    check_compressor,
    check_elsewhere,
    check_parts,
    check_rate,
    ingest_config,
    rate_options_of,
    warn_untrained,
)
from compllm_rag.llamaindex.options import CreateOptions, LoadOptions, ModelOptions, known_options
from compllm_rag.llamaindex.settling import REFIT_KEY
from compllm_rag.llamaindex.storage_parts import (
    defer_own_compressor,
    embedder_named,
    keep_adapters,
    load_embedder_of,
    new_vectors,
    open_vectors,
)
from compllm_rag.llamaindex.tracked_store import NodeStore
from compllm_rag.llamaindex.vector_store import FaissTextVectorStore
from compllm_rag.storage.adapter_files import FILES_KEY, kept_digests
from compllm_rag.storage.manifest import CONCEPTS, META_KEY, Manifest, has_manifest
from compllm_rag.storage.stores import open_store, shared_store
from compllm_rag.store import ConceptStore, DiskStore

_LOOKS = 10  # a writer would have to commit, or a compaction to end, between each two of them


@dataclass(frozen=True)
class IndexParts:
    """What a `ConceptIndex` is joined from.

    Attributes:
        compressor: Makes concepts; of a storage that is opened, on the first miss only.
        store: Keeps them.
        vectors: Vectors and text.
        embedder: Makes vectors.
        manifest: What the storage was made with.
        generation: Limits of the answers.
        folder: The storage; None in memory.
    """

    compressor: ConceptCompressor | DeferredCompressor
    store: ConceptStore
    vectors: NodeStore
    embedder: BaseEmbedding
    manifest: Manifest
    generation: GenerationConfig | None
    folder: Path | None


def create_index(
    folder: Path | None,
    *,
    llm: str | None = None,
    embedder: str | BaseEmbedding | LoadedEmbedder | None = None,
    reader: str | Path | None = AUTO,
    compressor: str | Path | Compressor | DeepCompressor | None = AUTO,
    rate: float | str | None = None,
    rates: Sequence[float | str] | None = None,
    rate_options: RateOptions | Mapping[str, Any] | None = None,
    budget: float | str | None = None,
    guard: str | None = None,
    guard_limit: float | None = None,
    chunk_size: int | None = None,
    namespace: str | None = None,
    encoding: str | None = None,
    concept_store: str | None = None,
    codec: Codec | str | None = None,
    entry_layer: int | None = None,
    unit_length: int | None = None,
    generation: GenerationConfig | None = None,
    progress: Callable[[str, float | None], None] | None = None,
    elsewhere: str | None = None,
    holds: int | str | None = None,
    **model_options: Unpack[ModelOptions],
) -> IndexParts:
    """Make an empty storage, or open an existing one for writing.

    Args:
        folder: The storage; None keeps everything in memory.
        llm: Alias, folder or `org/name@revision` of the target LLM; None takes the default.
        embedder: The same for the embedder, or a LlamaIndex embedder.
        reader: Folder of a reader adapter, `auto` or None; see `load_compressor_for`.
        compressor: The same for the compressor, or one that is loaded already (then `llm` and `reader` are its own).
        rate: Source tokens per concept, or a policy that chooses them by the text: `information`, `learned`, or `auto`
            for the better of these that the compressor has the means for (docs/rates.md). None takes 1 for deep
            concepts and 2 for those at the input embeddings.
        rates: In place of `rate`: several to keep side by side. The first is the one that queries read.
        rate_options: Of the policy: `RateOptions`, or its fields.
        budget: In place of both: how much the storage may hold, in positions (200000) or bytes ("40MB"). Another one
            may be given later; chunks share it at the end of the next ingest.
        guard: Chunks that stay text: `exact`, those of digits, identifiers and symbols; `loss`, those whose predicted
            loss is too high; `off`, the default, none.
        guard_limit: From which share of such characters, or which loss, on; None takes the guard's own.
        chunk_size: Target tokens per chunk, about; None takes 200.
        namespace: Tenant.
        encoding: How concepts are kept: `fp16`, `int8` or `int4`; None takes fp16. No part of their identity.
        concept_store: `redis://HOST:PORT/NUMBER` of a store that several storages share; None keeps concepts in the
            folder.
        codec: `deep` (the default) for concepts that enter the LLM at a middle layer, `input` for those of CompLLM
            at its input embeddings; a compressor that is given says it itself.
        entry_layer: Of deep concepts: L; see `load_compressor_for`.
        unit_length: Of deep concepts: most tokens that they are made of at once, see `with_unit_length`. None makes
            room for a chunk of `chunk_size` where the compressor is named and its own units are shorter; one that is
            given loaded keeps its own.
        generation: Limits of the answers.
        progress: Called with messages while models are fetched.
        elsewhere: Class of the vector store that keeps vectors and text in the storage's place; None for none.
        holds: The longest chunk that others will cut, as text or in tokens: room is made for it as for `chunk_size`.
        **model_options: `dtype`, `device`, `cache_dir`, `offline` of `TargetLLM.from_pretrained`.

    Raises:
        ConfigurationError: A setting makes no sense or is not known, or `folder` is a file.
        StorageMismatchError: The storage exists and was made with other settings.
        StoreLockedError: Another process writes to it.
    """
    settings = known_options(model_options, CreateOptions.__optional_keys__)
    asked = rate_settings(rate, rates, budget, guard)
    if rate_options is not None:
        asked["rate_options"] = rate_options_of(rate_options)
    if guard_limit is not None:
        asked["guard_limit"] = guard_limit
    check_parts(compressor, generation, embedder, settings)
    if folder is not None and os.path.exists(folder) and not folder.is_dir():  # noqa: PTH110 - says no to any name
        raise ConfigurationError(
            "storage is not a folder", got=folder, expected="a folder, or a path where one can be made"
        )
    if folder is not None and has_manifest(folder):
        budget_asked: dict[str, int] = {
            name: asked.pop(name) for name in ("budget_positions", "budget_bytes") if name in asked
        }
        if isinstance(rate_options, Mapping):  # what is not named may be as it is
            asked["rate_options"] = rate_options
        parts = load_index(
            folder,
            llm=llm,
            embedder=embedder,
            compressor=compressor if isinstance(compressor, Compressor | DeepCompressor) else None,
            generation=generation,
            progress=progress,
            codec=codec,
            entry_layer=entry_layer,
            unit_length=unit_length,
            elsewhere=elsewhere,
            concept_store=concept_store,
            expect={**asked, "chunk_size": chunk_size, "namespace": namespace, "encoding": encoding},
            **settings,
        )
        return _as_asked(parts, folder, llm, reader, compressor, budget_asked)
    default = DEFAULT_RATES["deep"]  # any number: only a policy heeds options
    check_heeded(rate_options, guard_limit, asked.get("rate", default), asked.get("guard", "off"))
    room = 0 if chunk_size is None else ingest_config(chunk_size=chunk_size).chunk_size
    made: ConceptCompressor
    if isinstance(compressor, Compressor | DeepCompressor):
        made = compressor
    else:
        made = load_compressor_for(
            llm or DEFAULT_LLM,
            reader=reader,
            compressor=compressor,
            codec=codec or "deep",
            entry_layer=entry_layer,
            progress=progress,
            **settings,
        )
        if unit_length is None:
            made = with_room_for_chunks(made, max(room, _tokens(holds, made)))
    check_compressor(made.config, codec, entry_layer, None)
    if unit_length is not None and (unit_length != made.config.unit_length or not made.config.deep):
        made = with_unit_length(made, unit_length)
    asked["rate"] = resolved(asked.get("rate", DEFAULT_RATES["deep" if made.config.deep else "input"]), made)
    check_heeded(rate_options, guard_limit, asked["rate"], asked.get("guard", "off"))
    if not made.config.trained:
        warn_untrained(made)
    config = ingest_config(chunk_size=chunk_size, namespace=namespace, encoding=encoding, **asked)
    check_rate(config, made, elsewhere)
    embed, source, identity = embedder_named(embedder or DEFAULT_EMBEDDER, progress, settings)
    dimension = len(embed.get_text_embedding("dimension"))
    shared = shared_store(concept_store, folder)
    manifest = Manifest.of(made.spec, made.llm, source, identity, dimension, config, shared)
    if folder is None:
        vectors = FaissTextVectorStore(dim=dimension)
        _begin_elsewhere(vectors, elsewhere)
        return IndexParts(made, open_store(manifest, None), vectors, embed, manifest, generation, None)
    vectors = new_vectors(folder, dimension)
    keep_adapters(folder, made, llm or DEFAULT_LLM, reader)
    store = open_store(manifest, folder / CONCEPTS, url=concept_store)
    vectors.catalog.set_meta(FILES_KEY, kept_digests(folder))
    vectors.catalog.set_meta(META_KEY, manifest.to_json())
    _begin_elsewhere(vectors, elsewhere)
    vectors.commit()
    return IndexParts(made, store, vectors, embed, manifest, generation, folder)


def load_index(
    folder: Path,
    *,
    llm: str | None = None,
    embedder: str | BaseEmbedding | LoadedEmbedder | None = None,
    compressor: ConceptCompressor | None = None,
    generation: GenerationConfig | None = None,
    read_only: bool = False,
    progress: Callable[[str, float | None], None] | None = None,
    expect: dict[str, Any] | None = None,
    complete: bool = True,
    codec: Codec | str | None = None,
    entry_layer: int | None = None,
    unit_length: int | None = None,
    elsewhere: str | None = None,
    concept_store: str | None = None,
    **model_options: Unpack[ModelOptions],
) -> IndexParts:
    """Open a storage that exists.

    Args:
        folder: The storage.
        llm: Where the target LLM lies now; None takes the name the storage keeps. It must be the same model.
        embedder: The same for the embedder, or a LlamaIndex embedder.
        compressor: The storage's compressor, if it is loaded already.
        generation: Limits of the answers.
        read_only: Never write; several processes may read while one writes.
        progress: Called with messages while models are fetched.
        expect: Settings that must be the storage's own.
        codec: Must be the storage's own; None asks for none.
        entry_layer: The same.
        unit_length: The same.
        elsewhere: Class of the vector store that keeps vectors and text in the storage's place; None for none.
        concept_store: Where the server of its shared concept store is now, with a password if it needs one; None takes
            what the environment says (`COMPLLM_CONCEPT_STORE`), else the address the storage was made with.
        complete: Refuse a concept store that holds fewer records than text refers to; repair does not.
        **model_options: `dtype`, `device`, `cache_dir`, `offline` of `TargetLLM.from_pretrained`.

    Raises:
        ConfigurationError: There is no such option.
        StorageNotFoundError: There is no storage here.
        FingerprintMismatchError: The LLM or compressor is not the one the storage was made by.
        EmbedderMismatchError: The same for the embedder.
        StorageMismatchError: Its vectors lie in another vector store, or do not.
        UnsupportedFormatError, CorruptRecordError: The storage is damaged or too new.
    """
    settings = known_options(model_options, LoadOptions.__optional_keys__)
    if isinstance(compressor, str | Path):
        raise ConfigurationError(
            "a storage has its own compressor",
            got=ascii(str(compressor))[:80],
            expected="the one that was loaded from it, as an object",
            next_step="leave compressor out",
        )
    check_parts(compressor, generation, embedder, settings)
    vectors = open_vectors(folder, read_only=read_only)
    try:
        manifest = Manifest.parse(vectors.catalog.get_meta(META_KEY))
        check_elsewhere(vectors, elsewhere)
        manifest.check_ingest(**(expect or {}))
        made = compressor or defer_own_compressor(folder, manifest, llm, progress, settings)
        manifest.check_compressor(made.spec.fingerprint, made.llm.source)
        check_compressor(made.spec.config, codec, entry_layer, unit_length)
        embed = load_embedder_of(manifest, embedder, progress, settings)
        store = open_store(manifest, folder / CONCEPTS, read_only=read_only, url=concept_store)
        if complete and isinstance(store, DiskStore):  # what others put into a shared one says nothing about this
            check_complete(vectors, store)
    except CompLLMError:
        vectors.close()
        raise
    return IndexParts(made, store, vectors, embed, manifest, generation, folder)


def _tokens(holds: int | str | None, compressor: ConceptCompressor) -> int:
    return len(compressor.spec.segmenter.tokenize(holds).ids) if isinstance(holds, str) else holds or 0


def _begin_elsewhere(vectors: FaissTextVectorStore, elsewhere: str | None) -> None:
    if elsewhere is not None:
        TrackedNodes(vectors.catalog).begin(elsewhere)


def _as_asked(
    parts: IndexParts,
    folder: Path,
    llm: str | None,
    reader: str | Path | None,
    compressor: str | Path | Compressor | DeepCompressor | None,
    budget: dict[str, int],
) -> IndexParts:
    """A storage that was opened, with this budget, if the adapters that were named are its own; else it is closed."""
    manifest = parts.manifest
    try:
        if isinstance(compressor, str | Path | None):
            codec: Codec = "deep" if manifest.entry_layer else "input"
            own = compressor_folder(llm or manifest.llm, compressor, codec, manifest.entry_layer or None)
            check_adapters(folder, reader, own, compressor)
        return _with_budget(parts, budget) if budget else parts
    except CompLLMError:
        parts.vectors.close()
        parts.store.close()
        raise


def _with_budget(parts: IndexParts, asked: dict[str, int]) -> IndexParts:
    """The storage with this budget, which it keeps; its chunks share it at the end of the next ingest.

    Raises:
        StoreLockedError, StoreReadOnlyError: The storage cannot be written.
    """
    budget = {"budget_positions": None, "budget_bytes": None, **asked}
    ingest = parts.manifest.ingest.model_copy(update=budget)
    if ingest == parts.manifest.ingest:
        return parts
    manifest = parts.manifest.model_copy(update={"ingest": ingest})
    catalog = parts.vectors.catalog
    catalog.set_meta(META_KEY, manifest.model_dump_json())
    catalog.set_meta(REFIT_KEY, "yes")
    catalog.commit()
    return replace(parts, manifest=manifest)
