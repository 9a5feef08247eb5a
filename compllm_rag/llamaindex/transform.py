"""Compression as a step of a LlamaIndex ingestion pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NoReturn

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent

from compllm_rag.errors import ConfigurationError
from compllm_rag.library import ConceptLibrary, EnsureReport
from compllm_rag.llamaindex.tracing import traced_ensure


class ConceptTransform(TransformComponent):
    """Compresses the text of every node that passes and keeps the concepts in the store; nodes pass unchanged.

    The fingerprint is a declared field: LlamaIndex keys its ingestion cache by a component's fields, and weights that
    do not show there would let stale results through.

    Args:
        library: Compressor, store and rate.
    """

    fingerprint: str = Field(description="identity of the compressor")
    rate: str = Field(description="rate policy, for the cache key")
    namespace: str = Field(description="tenant")
    _library: ConceptLibrary = PrivateAttr()
    _last: EnsureReport | None = PrivateAttr(default=None)

    def __init__(self, library: ConceptLibrary) -> None:
        policy = library.policy
        fields: dict[str, Any] = {
            "fingerprint": library.spec.fingerprint,
            "rate": f"{type(policy).__name__}({getattr(policy, 'rate', '')})",
            "namespace": library.namespace,
        }
        super().__init__(**fields)
        self._library = library

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's serialised form."""
        return "ConceptTransform"

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
