"""The keyword arguments by which storages are made and opened, for type checkers and for refusing others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from compllm_rag.errors import ConfigurationError

if TYPE_CHECKING:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.callbacks.base import CallbackManager
    from llama_index.core.schema import TransformComponent

    from compllm_rag.compression.compressor import Compressor
    from compllm_rag.compression.deep import DeepCompressor
    from compllm_rag.compression.spec import ConceptCompressor
    from compllm_rag.config import Codec, GenerationConfig, RateOptions
    from compllm_rag.llamaindex.embedding import LoadedEmbedder


class ModelOptions(TypedDict, total=False):
    """How the target LLM is loaded; see `TargetLLM.from_pretrained`."""

    dtype: str | None
    device: str | None
    device_map: str | dict[str, Any] | None
    cache_dir: Path | None
    offline: bool


class StockNames(TypedDict, total=False):
    """Of LlamaIndex's; see `stock.StockOptions`."""

    embed_model: str | BaseEmbedding | None
    transformations: Sequence[TransformComponent] | None
    insert_batch_size: int
    callback_manager: CallbackManager | None
    use_async: bool
    show_progress: bool


class LoadOptions(ModelOptions, StockNames, total=False):
    """Of `ConceptIndex.load`; see `load_index`."""

    llm: str | None
    embedder: str | BaseEmbedding | LoadedEmbedder | None
    compressor: ConceptCompressor | None
    generation: GenerationConfig | None
    read_only: bool
    progress: Callable[[str, float | None], None] | None
    codec: Codec | str | None
    entry_layer: int | None
    unit_length: int | None
    concept_store: str | None


class CreateOptions(ModelOptions, StockNames, total=False):
    """Of `ConceptIndex.create`; see `create_index`."""

    llm: str | None
    embedder: str | BaseEmbedding | LoadedEmbedder | None
    reader: str | Path | None
    compressor: str | Path | Compressor | DeepCompressor | None
    rate: float | str | None
    rates: Sequence[float | str] | None
    rate_options: RateOptions | Mapping[str, Any] | None
    budget: float | str | None
    guard: str | None
    guard_limit: float | None
    chunk_size: int | None
    encoding: str | None
    concept_store: str | None
    codec: Codec | str | None
    entry_layer: int | None
    unit_length: int | None
    generation: GenerationConfig | None
    progress: Callable[[str, float | None], None] | None


def known_options(given: ModelOptions, known: Iterable[str]) -> dict[str, Any]:
    """Options of the LLM as a plain dictionary; what no part of a storage would heed is refused before any work.

    Args:
        given: What is left for the LLM.
        known: Names of all that would be heeded.

    Raises:
        ConfigurationError: There is no such option.
    """
    if unknown := sorted(set(given) - ModelOptions.__optional_keys__):
        raise ConfigurationError(
            "opening a storage has no such option",
            got=", ".join(unknown),
            expected=", ".join(sorted(known)),
            next_step="leave it out",
        )
    return {**given}
