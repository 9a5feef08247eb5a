"""Compression as a step of a LlamaIndex ingestion pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent

from compllm_rag.compression.rate_policies.choosing import described
from compllm_rag.errors import ConfigurationError, StorageMismatchError
from compllm_rag.library import ConceptLibrary, EnsureReport
from compllm_rag.llamaindex.storage_library import open_library, storage_of
from compllm_rag.llamaindex.tracing import traced_ensure
from compllm_rag.storage.manifest import read_manifest


class ConceptTransform(TransformComponent):
    """Compresses the text of every node that passes and keeps the concepts in the store; nodes pass unchanged.

    The fingerprint is a declared field: LlamaIndex keys its ingestion cache by a component's fields, and weights that
    do not show there would let stale results through.

    `from_dict` opens the storage that the dictionary names, and loads its LLM at the first call.

    Args:
        library: Compressor, store and rate.
    """

    fingerprint: str = Field(description="identity of the compressor")
    rate: str = Field(description="rate policy, for the cache key")
    namespace: str = Field(description="tenant")
    storage: str | None = Field(default=None, description="folder of the storage that keeps the concepts")
    _given: ConceptLibrary | None = PrivateAttr(default=None)
    _last: EnsureReport | None = PrivateAttr(default=None)

    def __init__(self, library: ConceptLibrary | None = None, **fields: Any) -> None:
        super().__init__(**(fields if library is None else _fields_of(library)))
        self._given = library

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's serialised form."""
        return "ConceptTransform"

    @classmethod
    def from_dict(cls, data: dict[str, Any], library: ConceptLibrary | None = None, **kwargs: Any) -> Self:
        """What `to_dict` described.

        Args:
            data: The description.
            library: Compressor and store; None opens the storage that `data` names.
            **kwargs: Fields to change.

        Raises:
            ConfigurationError: No storage is named: the store lay in memory, or by itself.
            StorageNotFoundError: It is not there any more.
            StorageMismatchError: It keeps other concepts than the transform made, or `library` does.
        """
        fields = {name: value for name, value in (data | kwargs).items() if name != "class_name"}
        if library is None and not fields.get("storage"):
            raise ConfigurationError(
                "this dictionary names no storage that could be opened",
                got="a transform whose store lay in memory, or by itself",
                expected="the library of a ConceptIndex with a storage_dir",
                next_step="pass library= to from_dict",
            )
        own = _fields_of(library) if library is not None else _fields_of_storage(Path(fields["storage"]))
        for name in ("fingerprint", "rate", "namespace"):
            if own[name] != fields[name]:
                raise StorageMismatchError(
                    f"the storage has another {name} than this transform",
                    got=own[name],
                    expected=fields[name],
                    next_step="make the transform anew: ConceptTransform(index.library)",
                )
        return cls(library, **fields)

    @property
    def _library(self) -> ConceptLibrary:
        if self._given is None:
            self._given = open_library(Path(str(self.storage)))
        return self._given

    @property
    def last_report(self) -> EnsureReport | None:
        """What the last call compressed and reused."""
        return self._last

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Compress and keep; durable when this returns."""
        self._last = traced_ensure(self._library, (node.get_content(metadata_mode=MetadataMode.NONE) for node in nodes))
        self._library.store.flush()
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """The same in a thread, so that the event loop stays free."""
        return await asyncio.to_thread(self.__call__, nodes, **kwargs)

    def __getstate__(self) -> NoReturn:
        """Refuse to travel: a store has one writer, and each worker would load the model again.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "ConceptTransform cannot be sent to worker processes",
            got="IngestionPipeline.run(num_workers > 1), or a copy",
            expected="one process that compresses",
            next_step="run the pipeline without num_workers; compression is batched inside",
        )


def _fields_of(library: ConceptLibrary) -> dict[str, Any]:
    folder = storage_of(library)
    return {
        "fingerprint": library.spec.fingerprint,
        "rate": library.chooser.name,
        "namespace": library.namespace,
        "storage": None if folder is None else str(folder),
    }


def _fields_of_storage(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    return {
        "fingerprint": manifest.fingerprint,
        "rate": described(manifest.ingest),
        "namespace": manifest.ingest.namespace,
    }
