"""A `ConceptIndex` beside any LlamaIndex vector store: how it is opened, and how its garbage is collected."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import BasePydanticVectorStore

from compllm_rag.compression.rate_policies.asked import rate_settings
from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.opening import IndexParts, create_index, load_index
from compllm_rag.llamaindex.tracked_store import NodeStore, TrackedVectorStore
from compllm_rag.llamaindex.vector_store import FaissTextVectorStore
from compllm_rag.storage.namespaces import existing_namespace, namespace_folder, prepare_namespace
from compllm_rag.store.compaction import CompactReport

_ADOPTED_AT_ONCE = 256


@dataclass(frozen=True)
class GarbageReport:
    """What a collection found.

    Attributes:
        nodes_forgotten: Nodes that the other vector store did not have any more.
        concepts: Of the concept store: how many records were dropped, and how many stayed.
    """

    nodes_forgotten: int
    concepts: CompactReport


class Collected(Protocol):
    """What garbage is collected of: a `ConceptIndex`."""

    @property
    def faiss(self) -> NodeStore:
        """Vectors and text."""
        ...

    def bulk(self) -> AbstractContextManager[None]:
        """One commit for a block."""
        ...

    def reclaim(self, progress: Callable[[str, float | None], None] | None) -> CompactReport:
        """Drop concepts that nothing refers to."""
        ...


def parts_beside(
    vector_store: BasePydanticVectorStore,
    storage_dir: str | Path | None,
    *,
    namespace: str | None = None,
    read_only: bool = False,
    **options: Any,
) -> IndexParts:
    """Open or make a storage for the concepts of a vector store; see `ConceptIndex.from_vector_store`.

    Raises:
        ConfigurationError: This is no such vector store, or options exclude each other.
        StorageMismatchError: The storage keeps its own vectors, or those of another kind of store.
    """
    if isinstance(vector_store, FaissTextVectorStore | TrackedVectorStore) or not isinstance(
        vector_store, BasePydanticVectorStore
    ):
        raise ConfigurationError(
            "this is no vector store that concepts can be kept beside",
            got=type(vector_store).__name__,
            expected="a LlamaIndex vector store, such as QdrantVectorStore",
            next_step="for vectors of this package, use ConceptIndex.create or ConceptIndex.load",
        )
    options["elsewhere"] = type(vector_store).__name__
    if storage_dir is None:
        parts = create_index(None, namespace=namespace, **options)
    elif read_only:
        options.pop("holds", None)  # of a storage that is made
        # As where it is opened for writing: settings that are given must be the storage's own.
        expected = {name: options.pop(name, None) for name in ("chunk_size", "encoding", "guard_limit", "rate_options")}
        expected |= rate_settings(*(options.pop(name, None) for name in ("rate", "rates", "budget", "guard")))
        folder = existing_namespace(storage_dir, namespace)
        parts = load_index(folder, read_only=True, expect=expected, **options)
    else:
        folder = namespace_folder(storage_dir, namespace)
        prepare_namespace(Path(storage_dir), folder)
        parts = create_index(folder, namespace=namespace, **options)
    return replace(parts, vectors=TrackedVectorStore(vector_store, parts.vectors.catalog))


def collect_garbage(index: Collected, progress: Callable[[str, float | None], None] | None = None) -> GarbageReport:
    """Drop concepts that no node refers to; see `ConceptIndex.collect_garbage`."""
    gone: list[str] = []
    if isinstance(index.faiss, TrackedVectorStore):
        with index.bulk():
            gone = index.faiss.absent()
            if gone:
                index.faiss.forget(gone)
    return GarbageReport(len(gone), index.reclaim(progress))


def adopt(index: Collected, progress: Callable[[str, float | None], None] | None = None) -> int:
    """Make the concepts of nodes that others brought into the vector store; see `ConceptIndex.adopt`."""
    if not isinstance(index.faiss, TrackedVectorStore):
        raise ConfigurationError(
            "this index knows all nodes of its vector store",
            got=type(index.faiss).__name__,
            expected="an index of ConceptIndex.from_vector_store",
        )
    nodes: list[BaseNode] = index.faiss.unknown()
    for start in range(0, len(nodes), _ADOPTED_AT_ONCE):
        with index.bulk():
            index.faiss.adopt(nodes[start : start + _ADOPTED_AT_ONCE])
        if progress:
            progress("making concepts", min(1.0, (start + _ADOPTED_AT_ONCE) / len(nodes)))
    return len(nodes)
