"""The retrieval embedder: a sentence-transformers model from a verified folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compllm_rag.config import DEFAULT_EMBEDDER
from compllm_rag.errors import UnsupportedModelError
from compllm_rag.fingerprint import mapping_digest, tagged_digest
from compllm_rag.models import resolve_model
from compllm_rag.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedEmbedder:
    """An embedder that was loaded by name, so that several storages share it and each can be opened by that name.

    Attributes:
        embedder: The embedder.
        source: How it is named again.
        identity: Of its files.
    """

    embedder: BaseEmbedding
    source: str
    identity: str


def load_embedder(
    spec: str = DEFAULT_EMBEDDER,
    *,
    device: str | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
    progress: Callable[[str, float | None], None] | None = None,
) -> tuple[BaseEmbedding, str, str]:
    """Load a sentence-transformers model.

    Args:
        spec: Alias, local folder, or `org/name@revision`.
        device: A torch device; None lets sentence-transformers pick.
        cache_dir: Where fetched models lie.
        offline: Never touch the network.
        progress: See `resolve_model`.

    Returns:
        The embedder, how to name it again, and its identity (a digest of its files).

    Raises:
        UnsupportedModelError: The folder is not a sentence-transformers model.
        UnknownModelError, ModelFetchError, DigestMismatchError, UnsafeModelError: See `resolve_model`.
    """
    begun = time.perf_counter()
    files = resolve_model(spec, cache_dir=cache_dir, offline=offline, progress=progress)
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    try:
        with quiet_transformers():
            embedder = HuggingFaceEmbedding(
                model_name=str(files.path), device=device, embed_batch_size=32, trust_remote_code=False
            )
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModelError(
            "this is not a sentence-transformers model",
            got=f"{files.path} ({type(error).__name__}: {str(error).splitlines()[0][:200]})",
            expected="a folder that sentence-transformers loads",
            next_step="name another embedder",
        ) from error
    logger.info("loaded embedder %s in %.1f s", files.source, time.perf_counter() - begun)
    return embedder, files.source, mapping_digest("compllm-rag/embedder", files.digests)


def embedder_identity(embedder: BaseEmbedding) -> tuple[str, str]:
    """Name and identity of somebody's own embedder: its class and model name are all there is to go by."""
    name = f"{type(embedder).__name__}:{embedder.model_name}"
    return name, tagged_digest("compllm-rag/embedder-object", name=name)
