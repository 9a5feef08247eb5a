"""Opening and making the storage of a `ConceptIndex`.

A storage folder holds `catalog.db` and `vectors-N.faiss` (text and vectors, one commit), `concepts/` (the concept
store), and `compressor/` and `reader/` (the adapters the concepts need), so that it can be moved as a whole; only the
target LLM and the embedder are named, not copied.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import ValidationError

from compllm_rag.catalog.faults import damaged
from compllm_rag.catalog.pending import count_pending
from compllm_rag.catalog.references import count_keys
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.loading import AUTO, load_compressor_for
from compllm_rag.config import DEFAULT_EMBEDDER, DEFAULT_LLM, GenerationConfig, IngestConfig
from compllm_rag.errors import CompLLMError, ConfigurationError
from compllm_rag.llamaindex.storage_parts import (
    embedder_named,
    is_made,
    keep_adapters,
    load_embedder_of,
    load_own_compressor,
    new_vectors,
    open_vectors,
)
from compllm_rag.llamaindex.uploads import UploadQueue
from compllm_rag.llamaindex.vector_store import FaissTextVectorStore
from compllm_rag.storage.adapter_files import FILES_KEY, adapter_digests
from compllm_rag.storage.manifest import CONCEPTS, META_KEY, Manifest
from compllm_rag.store import DiskStore, MemoryStore

if TYPE_CHECKING:
    from compllm_rag.llamaindex.index import ConceptIndex

Index = TypeVar("Index", bound="ConceptIndex")
_LOOKS = 10  # a writer would have to commit, or a compaction to end, between each two of them


def create_index(
    cls: type[Index],
    folder: Path | None,
    *,
    llm: str | None = None,
    embedder: str | BaseEmbedding | None = None,
    reader: str | Path | None = AUTO,
    compressor: str | Path | Compressor | None = AUTO,
    rate: float | None = None,
    chunk_size: int | None = None,
    namespace: str | None = None,
    encoding: str | None = None,
    generation: GenerationConfig | None = None,
    progress: Callable[[str, float | None], None] | None = None,
    resume: bool = True,
    **model_options: Any,
) -> Index:
    """Make an empty storage, or open an existing one for writing.

    Args:
        cls: `ConceptIndex`, or a class derived from it.
        folder: The storage; None keeps everything in memory.
        llm: Alias, folder or `org/name@revision` of the target LLM; None takes the default.
        embedder: The same for the embedder, or a LlamaIndex embedder.
        reader: Folder of a reader adapter, `auto` or None; see `load_compressor_for`.
        compressor: The same for the compressor, or one that is loaded already (then `llm` and `reader` are its own).
        rate: Source tokens per concept; None takes 2.
        chunk_size: Target tokens per chunk, about; None takes 200.
        namespace: Tenant.
        encoding: How concepts are kept: `fp16`, `int8` or `int4`; None takes fp16. No part of their identity.
        generation: Limits of the answers.
        progress: Called with messages while models are fetched.
        resume: See `load_index`.
        **model_options: `dtype`, `device`, `cache_dir`, `offline` of `TargetLLM.from_pretrained`.

    Raises:
        ConfigurationError: A setting makes no sense, or `folder` is a file.
        StorageMismatchError: The storage exists and was made with other settings.
        StoreLockedError: Another process writes to it.
    """
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ConfigurationError(
            "storage is not a folder", got=folder, expected="a folder, or a path where one can be made"
        )
    if folder is not None and is_made(folder):
        return load_index(
            cls,
            folder,
            llm=llm,
            embedder=embedder,
            compressor=compressor if isinstance(compressor, Compressor) else None,
            generation=generation,
            progress=progress,
            resume=resume,
            expect={"rate": rate, "chunk_size": chunk_size, "namespace": namespace, "encoding": encoding},
            **model_options,
        )
    config = _config(rate=rate, chunk_size=chunk_size, namespace=namespace, encoding=encoding)
    made = (
        compressor
        if isinstance(compressor, Compressor)
        else load_compressor_for(
            llm or DEFAULT_LLM, reader=reader, compressor=compressor, progress=progress, **model_options
        )
    )
    _check_rate(config, made)
    embed, source, identity = embedder_named(embedder or DEFAULT_EMBEDDER, progress, model_options)
    dimension = len(embed.get_text_embedding("dimension"))
    manifest = Manifest.of(made, source, identity, dimension, config)
    if folder is None:
        memory = MemoryStore(made.hidden_size, encoding=config.encoding)
        vectors = FaissTextVectorStore(dim=dimension)
        return _join(cls, made, memory, vectors, embed, manifest, generation, None)
    vectors = new_vectors(folder, dimension)
    keep_adapters(folder, made, llm or DEFAULT_LLM, reader)
    disk = DiskStore(folder / CONCEPTS, hidden_size=made.hidden_size, encoding=config.encoding)
    vectors.catalog.set_meta(FILES_KEY, adapter_digests(folder))
    vectors.catalog.set_meta(META_KEY, manifest.model_dump_json())
    vectors.commit()
    return _join(cls, made, disk, vectors, embed, manifest, generation, folder)


def load_index(
    cls: type[Index],
    folder: Path,
    *,
    llm: str | None = None,
    embedder: str | BaseEmbedding | None = None,
    compressor: Compressor | None = None,
    generation: GenerationConfig | None = None,
    read_only: bool = False,
    progress: Callable[[str, float | None], None] | None = None,
    expect: dict[str, Any] | None = None,
    complete: bool = True,
    resume: bool = True,
    **model_options: Any,
) -> Index:
    """Open a storage that exists.

    Args:
        cls: `ConceptIndex`, or a class derived from it.
        folder: The storage.
        llm: Where the target LLM lies now; None takes the name the storage keeps. It must be the same model.
        embedder: The same for the embedder, or a LlamaIndex embedder.
        compressor: The storage's compressor, if it is loaded already.
        generation: Limits of the answers.
        read_only: Never write; several processes may read while one writes.
        progress: Called with messages while models are fetched.
        expect: Settings that must be the storage's own.
        complete: Refuse a concept store that holds fewer records than text refers to; repair does not.
        resume: Go on, in the background, with uploads that an earlier process left without concepts.
        **model_options: `dtype`, `device`, `cache_dir`, `offline` of `TargetLLM.from_pretrained`.

    Raises:
        StorageNotFoundError: There is no storage here.
        FingerprintMismatchError: The LLM or compressor is not the one the storage was made by.
        EmbedderMismatchError: The same for the embedder.
        UnsupportedFormatError, CorruptRecordError: The storage is damaged or too new.
    """
    vectors = open_vectors(folder, read_only=read_only)
    try:
        manifest = Manifest.parse(vectors.catalog.get_meta(META_KEY))
        manifest.check_ingest(**(expect or {}))
        made = compressor or load_own_compressor(folder, manifest, llm, progress, model_options)
        manifest.check_compressor(made.fingerprint, made.llm.source)
        embed = load_embedder_of(manifest, embedder, progress, model_options)
        store = DiskStore(
            folder / CONCEPTS,
            hidden_size=made.hidden_size,
            read_only=read_only,
            encoding=manifest.ingest.encoding,
        )
        if complete:
            _check_complete(vectors, store)
    except CompLLMError:
        vectors.close()
        raise
    index = _join(cls, made, store, vectors, embed, manifest, generation, folder)
    if resume and complete and not read_only and len(index.pending):
        UploadQueue(index)
    return index


def _check_complete(vectors: FaissTextVectorStore, store: DiskStore) -> None:
    for _ in range(_LOOKS):
        with vectors.catalog.reading() as connection:
            referred = count_keys(connection) - count_pending(connection)
        records = store.stats().records
        if records >= referred:
            return
    store.close()
    raise damaged(
        "the concept store does not belong to the text",
        got=f"{records} records in {store.path}",
        expected=f"the {referred} that text refers to, at least",
    )


def _config(**asked: Any) -> IngestConfig:
    try:
        return IngestConfig(**{name: value for name, value in asked.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigurationError(
            f"{' '.join(map(str, first['loc'])).replace('_', ' ')} makes no sense",
            got=repr(first["input"]),
            expected=first["msg"].removeprefix("Input should be "),
            next_step="change it, or leave it out for the default",
        ) from error


def _check_rate(config: IngestConfig, compressor: Compressor) -> None:
    from compllm_rag.compression.rates import FixedRate

    FixedRate(config.rate, compressor.config.segment_length)


def _join(
    cls: type[Index],
    compressor: Compressor,
    store: DiskStore | MemoryStore,
    vectors: FaissTextVectorStore,
    embed: BaseEmbedding,
    manifest: Manifest,
    generation: GenerationConfig | None,
    folder: Path | None,
) -> Index:
    return cls(
        compressor,
        store,
        vectors,
        embed,
        config=manifest.ingest,
        generation=generation,
        storage_dir=folder,
        manifest=manifest,
    )
