"""The concept store of a storage, opened in one place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import overload

from compllm_rag.errors import ConfigurationError
from compllm_rag.storage.manifest import Manifest
from compllm_rag.store import ConceptStore, DiskStore, MemoryStore

_URL = re.compile(r"([A-Za-z][\w+.-]*)://")


@overload
def open_store(manifest: Manifest, where: None) -> MemoryStore: ...
@overload
def open_store(manifest: Manifest, where: Path, *, read_only: bool = False, counted: bool = True) -> DiskStore: ...
@overload
def open_store(manifest: Manifest, where: str, *, read_only: bool = False, counted: bool = True) -> ConceptStore: ...
def open_store(
    manifest: Manifest, where: str | Path | None, *, read_only: bool = False, counted: bool = True
) -> ConceptStore:
    """Open the store that a storage keeps its concepts in, or make it.

    Args:
        manifest: Of the storage; says how wide concepts are and how they are written.
        where: The store's folder; None keeps concepts in memory.
        read_only: Write nothing; see `DiskStore`.
        counted: Refuse an index that holds more or fewer records than were written; see `DiskStore`.

    Raises:
        ConfigurationError: A URL, of which this release knows none.
        StorageMismatchError, CorruptRecordError, UnsupportedFormatError: See `DiskStore`.
    """
    if where is None:
        return MemoryStore(manifest.width, encoding=manifest.encoding)
    scheme = _URL.match(where) if isinstance(where, str) else None
    if scheme is not None:
        raise ConfigurationError(
            "this kind of concept store is not known",
            got=f"{scheme[1]}://",
            expected="a folder",
            next_step="name a folder",
        )
    return DiskStore(
        where,
        hidden_size=manifest.width,
        read_only=read_only,
        encoding=manifest.encoding,
        counted=counted,
    )
