"""Turn what the operating system and SQLite raise into errors that say what to do."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diskcache  # type: ignore[import-untyped, unused-ignore]

from compllm_rag.errors import (
    CompLLMError,
    CorruptRecordError,
    StoreFullError,
    StoreLockedError,
    StoreReadOnlyError,
    UnreadableFileError,
)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def explained(path: Path, *, writing: bool) -> Iterator[None]:
    """Run a block that touches `path`; raise this package's errors instead of bare ones.

    Args:
        path: What is touched, for the message.
        writing: Whether the block writes.

    Raises:
        StoreFullError: No space, a quota, or a file size limit.
        StoreReadOnlyError: `path` cannot be written.
        UnreadableFileError: `path` cannot be read.
        StoreLockedError: Another process keeps the index busy.
        CorruptRecordError: The index is not a database, or a damaged one.
    """
    try:
        yield
    except CompLLMError:
        raise  # StoreFullError and others are OSErrors, too
    except diskcache.Timeout as error:
        raise _busy(path) from error
    except OSError as error:
        if error.errno in _FULL:
            raise _full(path, error) from error
        if error.errno in _FORBIDDEN:
            raise (_read_only(path, error) if writing else _unreadable(path, error)) from error
        raise
    except sqlite3.Error as error:
        replacement = _from_sqlite(path, error, writing)
        if replacement is None:
            raise
        raise replacement from error


def _from_sqlite(path: Path, error: sqlite3.Error, writing: bool) -> CompLLMError | None:
    # A failed ROLLBACK hides the error that made it necessary, hence the walk along the contexts.
    cause: BaseException | None = error
    while cause is not None:
        code = getattr(cause, "sqlite_errorcode", None)
        if code is not None:
            primary = code & 0xFF
            if primary == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR_WRITE and writing):
                return _full(path, cause)
            if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
                return _read_only(path, cause) if writing else _unreadable(path, cause)
            if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                return _busy(path)
            if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                return damaged_index(path, cause)
        cause = cause.__context__
    return damaged_index(path, error) if str(error).startswith("no such ") else None


def damaged_index(path: Path, cause: object) -> CorruptRecordError:
    """The error for an index that is no database, or lacks what it should hold."""
    return CorruptRecordError(
        "the index of the concept store is damaged",
        got=f"{cause} in {path}",
        next_step="restore the folder from a copy, or delete it and ingest again",
    )


def _full(path: Path, error: BaseException) -> StoreFullError:
    return StoreFullError(
        "the concept store cannot grow",
        got=f"{error} at {path}",
        next_step="free space or raise the file size limit, then put again; what was flushed before is intact",
    )


def _read_only(path: Path, error: BaseException) -> StoreReadOnlyError:
    return StoreReadOnlyError(
        "the concept store cannot be written",
        got=f"{error} at {path}",
        next_step="open it with read_only=True, or give this user the right to write there",
    )


def _unreadable(path: Path, error: BaseException) -> UnreadableFileError:
    return UnreadableFileError(
        "the concept store cannot be read",
        got=f"{error} at {path}",
        next_step="give this user the right to read there",
    )


def _busy(path: Path) -> StoreLockedError:
    return StoreLockedError(
        "the index of the concept store is busy",
        got=f"a lock held by another process on {path}",
        next_step="close other programs that have this database open",
    )
