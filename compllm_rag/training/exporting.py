"""The target LLM with its reader merged, as an ordinary checkpoint that any other software reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compllm_rag.compression.loading import AUTO, shipped_adapter
from compllm_rag.errors import ConfigurationError
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
    if folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(
            "folder is not empty",
            got=str(folder),
            expected="a new or an empty folder",
            next_step="choose another folder; nothing is written over a checkpoint",
        )
    adapter = shipped_adapter(llm, "reader") if reader == AUTO else (Path(reader) if reader is not None else None)
    target = TargetLLM.from_pretrained(llm, reader=adapter, dtype=dtype, device="cpu", progress=progress)
    if progress:
        progress(f"writing {folder}", None)
    target.model.save_pretrained(folder, safe_serialization=True)
    target.tokenizer.save_pretrained(folder)
    return folder
