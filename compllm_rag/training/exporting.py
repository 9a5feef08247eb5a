"""The target LLM with its reader merged as a checkpoint: an ordinary one, or one by which vLLM reads deep concepts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compllm_rag.compression.loading import AUTO, load_compressor_for, shipped_adapter
from compllm_rag.errors import ConfigurationError
from compllm_rag.generation.vllm.deep_checkpoint import write_deep_checkpoint
from compllm_rag.models.llm import TargetLLM


def export_checkpoint(
    folder: Path,
    llm: str,
    *,
    reader: str | Path | None = AUTO,
    dtype: str = "float32",
    progress: Callable[[str, float | None], None] | None = None,
) -> Path:
    """Write an LLM with its reader merged (in fp32) in transformers' own format.

    Args:
        folder: Must not exist, or be empty.
        llm: Alias, folder or `org/name@revision`.
        reader: Folder of a reader adapter, `auto` for the shipped one, None for the LLM as it is.
        dtype: Of the weights on disk.
        progress: Called with a message and the share that is done.

    Returns:
        The folder.

    Raises:
        ConfigurationError: The folder is not empty.
        UnsupportedDtypeError, UnknownModelError, ModelFetchError: See `TargetLLM.from_pretrained`.
    """
    _require_empty(folder)
    adapter = shipped_adapter(llm, "reader") if reader == AUTO else (Path(reader) if reader is not None else None)
    target = TargetLLM.from_pretrained(llm, reader=adapter, dtype=dtype, device="cpu", progress=progress)
    if progress:
        progress(f"writing {folder}", None)
    target.model.save_pretrained(folder, safe_serialization=True)
    target.tokenizer.save_pretrained(folder)
    return folder


def export_deep_checkpoint(
    folder: Path,
    llm: str,
    *,
    reader: str | Path | None = AUTO,
    compressor: str | Path | None = AUTO,
    dtype: str = "float32",
    progress: Callable[[str, float | None], None] | None = None,
) -> Path:
    """Write an LLM as vLLM serves it with this package's plugin; see `write_deep_checkpoint`.

    Args:
        folder: See `export_checkpoint`.
        llm: See `export_checkpoint`.
        reader: See `export_checkpoint`.
        compressor: Folder of a compressor of deep concepts; `auto` for the shipped one, None for untrained ones.
        dtype: See `export_checkpoint`.
        progress: See `export_checkpoint`.

    Returns:
        The folder.

    Raises:
        ConfigurationError: The folder is not empty, or the compressor's concepts enter at the input embeddings.
        UnsupportedModelError: The plugin has no LLM of this kind.
        FingerprintMismatchError: The compressor is of another LLM or reader.
        UnsupportedDtypeError, UnknownModelError, ModelFetchError: See `TargetLLM.from_pretrained`.
    """
    _require_empty(folder)
    made = load_compressor_for(llm, reader=reader, compressor=compressor, dtype=dtype, device="cpu", progress=progress)
    if made.halves is None:
        raise ConfigurationError(
            "this is no compressor of deep concepts",
            got=str(compressor),
            expected="a folder of `train deep`",
            next_step="name another --compressor; for concepts at the input embeddings leave --deep out",
        )
    if progress:
        progress(f"writing {folder}", None)
    return write_deep_checkpoint(folder, made.halves)


def _require_empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(
            "folder is not empty",
            got=str(folder),
            expected="a new or an empty folder",
            next_step="choose another folder; nothing is written over a checkpoint",
        )
