"""From names to a ready compressor: target LLM, reader adapter and compressor that belong together."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

from compllm_rag.compression.compressor import Compressor
from compllm_rag.config import DEFAULT_LLM
from compllm_rag.models.llm import TargetLLM

AUTO = "auto"


def shipped_adapter(llm: str, kind: str) -> Path | None:
    """Folder of the adapter that ships for an LLM, None where there is none.

    Args:
        llm: The LLM's alias.
        kind: `reader` or `compressor`.
    """
    if "/" in llm or llm in (".", ".."):
        return None
    folder = Path(str(resources.files("compllm_rag"))) / "data" / "adapters" / llm / kind
    return folder if folder.is_dir() else None


def load_compressor_for(
    llm: str = DEFAULT_LLM,
    *,
    reader: str | Path | None = AUTO,
    compressor: str | Path | None = AUTO,
    dtype: str | None = None,
    device: str | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
    progress: Callable[[str, float | None], None] | None = None,
) -> Compressor:
    """Load an LLM with its reader and its compressor.

    Args:
        llm: Alias, local folder, or `org/name@revision`.
        reader: Folder of a reader adapter; `auto` takes the shipped one where there is one, None none.
        compressor: Folder of a compressor; `auto` takes the shipped one where there is one and the reader is the
            shipped one too, else the untrained one; None takes the untrained one.
        dtype: See `TargetLLM.from_pretrained`.
        device: See `TargetLLM.from_pretrained`.
        cache_dir: Where fetched models lie.
        offline: Never touch the network.
        progress: See `resolve_model`.

    Raises:
        FingerprintMismatchError: The compressor was made for another LLM or reader.
        UnknownModelError, ModelFetchError, DigestMismatchError, UnsafeModelError: See `resolve_model`.
    """
    own = shipped_adapter(llm, "reader") if reader == AUTO else (Path(reader) if reader is not None else None)
    target = TargetLLM.from_pretrained(
        llm, reader=own, dtype=dtype, device=device, cache_dir=cache_dir, offline=offline, progress=progress
    )
    folder = Path(compressor) if compressor not in (AUTO, None) else None
    if compressor == AUTO and reader == AUTO:
        folder = shipped_adapter(llm, "compressor")
    return Compressor.from_pretrained(folder, target) if folder else Compressor(target)
