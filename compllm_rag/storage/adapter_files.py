"""The adapters that lie in a storage, and the digests it keeps of their files."""

from __future__ import annotations

import json
from pathlib import Path

from compllm_rag.fingerprint import file_digest

FILES_KEY = "compllm/files"
COMPRESSOR, READER = "compressor", "reader"


def kept_digests(folder: Path) -> str:
    """SHA-256 of every adapter file of a storage, by its path in it, as JSON."""
    files = sorted(path for part in (COMPRESSOR, READER) for path in (folder / part).glob("*") if path.is_file())
    return json.dumps({path.relative_to(folder).as_posix(): file_digest(path) for path in files})


def damaged_adapters(folder: Path, kept: str | None) -> list[str]:
    """What is wrong with the adapter files of a storage, in words.

    Args:
        folder: The storage.
        kept: What `kept_digests` gave when it was made; None for a storage that kept nothing.
    """
    wrong = []
    for name, digest in dict(json.loads(kept or "{}")).items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name}: the file is gone")
        elif file_digest(path) != digest:
            wrong.append(f"{name}: fails its SHA-256")
    return wrong
