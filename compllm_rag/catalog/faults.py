"""Errors of a catalog: damage, and what the operating system and SQLite raise around it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from compllm_rag.errors import CorruptRecordError
from compllm_rag.store.faults import Subject
from compllm_rag.store.faults import translated_errors as _translated_errors

_CATALOG = Subject(
    "the catalog",
    "the catalog",
    "free space or raise the file size limit, then ingest again; the last commit is intact",
)


def damaged(what: str, *, got: object = None, expected: object = None) -> CorruptRecordError:
    """An error for stored bytes that cannot be right."""
    return CorruptRecordError(
        what,
        got=got,
        expected=expected,
        next_step="run repair, which rebuilds it, or restore the folder from a copy, or delete it and ingest again",
    )


def translated_errors(path: Path, *, writing: bool) -> AbstractContextManager[None]:
    """Run a block that touches `path` of a catalog; see `store.faults.translated_errors`, also for what it raises."""
    return _translated_errors(path, writing=writing, subject=_CATALOG)
