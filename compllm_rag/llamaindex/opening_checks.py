"""What is asked of a storage, checked before anything is made, and against what it was made with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import ValidationError

from compllm_rag.catalog.faults import damaged
from compllm_rag.catalog.pending import count_pending
from compllm_rag.catalog.references import count_keys
from compllm_rag.catalog.tracked import vectors_elsewhere
from compllm_rag.compression.loading import AUTO
from compllm_rag.compression.pretrained import saved_config, weights_digest
from compllm_rag.compression.rate_policies.choosing import chooser_of, learned_losses
from compllm_rag.compression.rate_policies.measures import TextMeasures
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import Codec, CompressorConfig, GenerationConfig, IngestConfig, RateOptions, checked
from compllm_rag.errors import ConfigurationError, StorageMismatchError, UntrainedCompressorWarning
from compllm_rag.fingerprint import file_digest
from compllm_rag.llamaindex.embedding import LoadedEmbedder
from compllm_rag.llamaindex.vector_store import FaissTextVectorStore
from compllm_rag.models.adapters import ADAPTER_FILE
from compllm_rag.storage.adapter_files import COMPRESSOR, READER
from compllm_rag.store import DiskStore

_LOOKS = 10  # a writer would have to commit, or a compaction to end, between each two of them


def check_parts(compressor: object, generation: object, embedder: object, settings: dict[str, Any]) -> None:
    """Refuse what is of another kind, and settings of an LLM that is loaded already."""
    if not isinstance(generation, GenerationConfig | None):
        raise ConfigurationError(
            "generation says no limits of answers",
            got=f"a {type(generation).__name__}",
            expected="a GenerationConfig",
            next_step="write GenerationConfig(max_new_tokens=...)",
        )
    if isinstance(compressor, str | Path | None):
        return
    if not hasattr(compressor, "spec"):
        raise ConfigurationError("this is no compressor", got=f"a {type(compressor).__name__}")
    late = {name for name in ("dtype", "device", "device_map") if settings.get(name) is not None}
    if not isinstance(embedder, BaseEmbedding | LoadedEmbedder):
        late -= {"device"}  # it is heeded, where the embedder is loaded
    if late:
        raise ConfigurationError(
            "the LLM of this compressor is loaded already",
            got=", ".join(sorted(late)),
            expected="none",
            next_step="leave it out, and load the LLM that way: load_compressor_for(llm, dtype=...)",
        )


def check_adapters(folder: Path, reader: str | Path | None, compressor: Path | None, asked: str | Path | None) -> None:
    """Refuse adapters that a user names and a storage was not made with.

    Args:
        folder: The storage.
        reader: Folder of a reader, `auto` for whichever it has, None for none.
        compressor: The folder that `asked` means; None where it means an untrained one.
        asked: What was said of the compressor; `auto` for whichever it has.

    Raises:
        StorageMismatchError: It has others.
        ConfigurationError, UnsupportedFormatError: What is named is not there, or not an adapter.
    """
    if reader != AUTO:
        kept, named = folder / READER / ADAPTER_FILE, None if reader is None else Path(reader) / ADAPTER_FILE
        if named is not None and not named.is_file():
            raise ConfigurationError("there is no reader here", got=reader, expected=f"a folder with {ADAPTER_FILE}")
        has = file_digest(kept) if kept.is_file() else None
        _check_same("reader", reader, has, None if named is None else file_digest(named))
    if asked != AUTO:
        own = folder / COMPRESSOR
        has = weights_digest(own) if compressor is not None or saved_config(own).trained else None
        _check_same("compressor", asked, has, None if compressor is None else weights_digest(compressor))


def _check_same(what: str, asked: str | Path | None, has: str | None, wanted: str | None) -> None:
    if has != wanted:
        raise StorageMismatchError(
            f"the storage was made with another {what}",
            got="none" if asked is None else asked,
            expected=f"no trained {what}" if has is None else f"the {what} that it keeps",
            next_step="leave it out, or ingest into a new storage",
        )


def check_elsewhere(vectors: FaissTextVectorStore, elsewhere: str | None) -> None:
    """Refuse to open a storage as if its vectors lay in another vector store than they do."""
    where = vectors_elsewhere(vectors.catalog)
    if where != elsewhere:
        raise StorageMismatchError(
            "the vectors of this storage do not lie there",
            got=elsewhere or "the storage alone",
            expected=where or "the storage alone, which keeps its own vectors and text",
            next_step="open it in Python with ConceptIndex.from_vector_store(vector_store, storage_dir=...)"
            if where
            else "open it with ConceptIndex.load(storage_dir), or give another storage_dir",
        )


def check_complete(vectors: FaissTextVectorStore, store: DiskStore) -> None:
    """Refuse a concept store that holds fewer records than text refers to; it is closed then."""
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


def ingest_config(**asked: Any) -> IngestConfig:
    """Settings of a new storage; what is None takes its default."""
    try:
        return IngestConfig(**{name: value for name, value in asked.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigurationError(
            f"{' '.join(map(str, first['loc'][:1])).replace('_', ' ')} makes no sense".lstrip(),
            got=repr(first["input"]),
            expected=first["msg"].removeprefix("Input should be ").removeprefix("Value error, "),
            next_step="change it, or leave it out for the default",
        ) from error


def check_rate(config: IngestConfig, compressor: ConceptCompressor, elsewhere: str | None) -> None:
    """Refuse rates that cannot be kept, and policies without the means for them, before anything is made."""
    measures = TextMeasures(lambda: compressor)
    chooser_of(config, measures, compressor.config.longest_unit)
    if config.rate == "learned" or config.guard == "loss":
        learned_losses(measures)
    if config.rate == "budget" and elsewhere is not None:
        raise ConfigurationError(
            "a budget needs a storage that keeps its own text",
            got=f"text and vectors in {elsewhere}",
            expected="ConceptIndex.create or ConceptIndex.from_documents",
            next_step="choose another policy here",
        )


def rate_options_of(given: RateOptions | Mapping[str, Any]) -> RateOptions:
    """Options of a rate policy, from themselves or from their fields."""
    if isinstance(given, RateOptions):
        return given
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            "options of a rate policy make no sense", got=f"a {type(given).__name__}", expected="RateOptions, or a dict"
        )
    return checked(RateOptions, **given)


def warn_untrained(compressor: ConceptCompressor) -> None:
    """Say once that nothing was trained for the LLM of a new storage."""
    kind = "deep" if compressor.config.deep else "compressor"
    what = "the LLM's own states" if compressor.config.deep else "hard pruning: the embeddings of the tokens kept"
    warnings.warn(
        f"no trained compressor for {compressor.llm.source}: its concepts are {what}, which lose more than trained "
        f"ones, the more so at higher rates. Next step: `compllm-rag train {kind}`, or pass `compressor=`",
        UntrainedCompressorWarning,
        stacklevel=5,
    )


def check_compressor(
    own: CompressorConfig, codec: Codec | str | None, entry_layer: int | None, unit_length: int | None
) -> None:
    """Refuse another codec, entry layer or length of units than the compressor's; None asks for none."""
    for name, asked, has in (
        ("codec", codec, "deep" if own.deep else "input"),
        ("entry layer", entry_layer, own.entry_layer),
        ("unit length", unit_length, own.unit_length if own.deep else None),
    ):
        if asked is not None and asked != has:
            raise StorageMismatchError(
                f"the compressor has another {name}",
                got=asked,
                expected="none: its concepts enter at the input embeddings" if has is None else has,
                next_step="leave it out, or ingest into a new storage with another compressor",
            )
