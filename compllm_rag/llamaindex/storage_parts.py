"""The parts that a storage is opened from: catalog, adapters and models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding

from compllm_rag.compression.late_interaction import LateInteraction
from compllm_rag.compression.loading import AUTO, load_compressor, load_compressor_for, shipped_adapter
from compllm_rag.compression.pretrained import load_reading, load_spec
from compllm_rag.compression.rate_policies.losses import LossPredictor
from compllm_rag.compression.spec import ConceptCompressor, DeferredCompressor
from compllm_rag.errors import StorageMismatchError, StorageNotFoundError
from compllm_rag.llamaindex.embedding import LoadedEmbedder, embedder_identity, load_embedder
from compllm_rag.llamaindex.vector_store import FaissTextVectorStore
from compllm_rag.models.llm import TargetLLM
from compllm_rag.storage.adapter_files import COMPRESSOR, READER
from compllm_rag.storage.manifest import Manifest, require_storage


def open_vectors(folder: Path, *, read_only: bool) -> FaissTextVectorStore:
    """Text and vectors of a storage.

    Raises:
        StorageNotFoundError: There is no storage here.
    """
    require_storage(folder)
    return FaissTextVectorStore.open(folder, read_only=read_only)


def new_vectors(folder: Path, dimension: int) -> FaissTextVectorStore:
    """An empty catalog; one that an interrupted making left behind without manifest is taken up."""
    try:
        left = FaissTextVectorStore.open(folder)
    except StorageNotFoundError:
        return FaissTextVectorStore.create(folder, dimension)
    nodes, dim = left.n_nodes, left.dim
    if dim == dimension and not nodes:
        return left
    left.close()
    raise StorageMismatchError(
        "folder holds vectors that are no storage of compllm-rag",
        got=f"{nodes} nodes of {dim} dimensions without a manifest in {folder}",
        expected="an empty or new folder",
        next_step="choose another folder",
    )


def load_own_compressor(
    folder: Path,
    manifest: Manifest,
    llm: str | None,
    progress: Callable[[str, float | None], None] | None,
    model_options: dict[str, Any],
) -> ConceptCompressor:
    """Load the compressor that lies in a storage, with its reader and the LLM it names."""
    kept = folder / READER
    return load_compressor_for(
        llm or manifest.llm,
        reader=kept if kept.is_dir() else None,
        compressor=folder / COMPRESSOR,
        progress=progress,
        **model_options,
    )


def defer_own_compressor(
    folder: Path,
    manifest: Manifest,
    llm: str | None,
    progress: Callable[[str, float | None], None] | None,
    model_options: dict[str, Any],
) -> DeferredCompressor:
    """Load the LLM of a storage with its reader; the compressor that lies there is loaded on the first miss."""
    kept = folder / READER
    target = TargetLLM.from_pretrained(
        llm or manifest.llm, reader=kept if kept.is_dir() else None, progress=progress, **model_options
    )
    spec = load_spec(folder / COMPRESSOR, target)
    halves = load_reading(folder / COMPRESSOR, target, spec.config) if spec.config.deep else None
    return DeferredCompressor(
        spec,
        target,
        lambda: load_compressor(folder / COMPRESSOR, target),
        halves,
        lambda: LossPredictor.load(folder / COMPRESSOR),
        lambda: LateInteraction.load(folder / COMPRESSOR),
    )


def load_embedder_of(
    manifest: Manifest,
    embedder: str | BaseEmbedding | LoadedEmbedder | None,
    progress: Callable[[str, float | None], None] | None,
    model_options: dict[str, Any],
) -> BaseEmbedding:
    """Load the embedder of a storage.

    Raises:
        EmbedderMismatchError: It is not the one the storage was made by.
    """
    embed, source, identity = embedder_named(embedder or manifest.embedder, progress, model_options)
    manifest.check_embedder(source, identity, len(embed.get_text_embedding("dimension")))
    return embed


def embedder_named(
    embedder: str | BaseEmbedding | LoadedEmbedder,
    progress: Callable[[str, float | None], None] | None,
    model_options: dict[str, Any],
) -> tuple[BaseEmbedding, str, str]:
    """An embedder with its source and identity: one that is given, or the one of a name."""
    if isinstance(embedder, LoadedEmbedder):
        return embedder.embedder, embedder.source, embedder.identity
    if isinstance(embedder, BaseEmbedding):
        return embedder, *embedder_identity(embedder)
    known = {k: v for k, v in model_options.items() if k in ("device", "cache_dir", "offline")}
    return load_embedder(embedder, progress=progress, **known)


def keep_adapters(folder: Path, compressor: ConceptCompressor, llm: str, reader: str | Path | None) -> None:
    """Copy compressor and reader into a storage, so that it can be moved as a whole."""
    compressor.save_pretrained(folder / COMPRESSOR)
    own = shipped_adapter(llm, "reader") if reader == AUTO else reader
    if own is not None and any(name.startswith("reader/") for name in compressor.llm.digests):
        shutil.copytree(own, folder / READER, dirs_exist_ok=True)
