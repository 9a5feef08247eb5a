"""Turn what the operating system and SQLite raise around a catalog into errors that say what to do."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR}
_RESTORE = "restore the folder from a copy, or delete it and ingest again"


def damaged(what: str, *, got: object = None, expected: object = None) -> CorruptRecordError:
    """An error for stored bytes that cannot be right."""
    return CorruptRecordError(
        what, got=got, expected=expected, next_step="run repair, which rebuilds it, or " + _RESTORE
    )


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
        StoreLockedError: Another program keeps the database busy.
        CorruptRecordError: The database is damaged, or no database.
    """
    try:
        yield
    except CompLLMError:
        raise  # some of ours are OSErrors, too
    except OSError as error:
        if error.errno in _FULL:
            raise _full(path, error) from error
        if error.errno in _FORBIDDEN or error.errno == errno.ELOOP:
            raise _denied(path, error, writing) from error
        raise
    except sqlite3.Error as error:
        replacement = _from_sqlite(path, error, writing)
        if replacement is None:
            raise
        raise replacement from error


def _from_sqlite(path: Path, error: sqlite3.Error, writing: bool) -> CompLLMError | None:
    # Python raises a bare OperationalError, without a code, for TEXT that is not UTF-8.
    code = getattr(error, "sqlite_errorcode", None)
    if code is None and not isinstance(error, sqlite3.OperationalError):
        return None
    code = sqlite3.SQLITE_CORRUPT if code is None else code
    primary = code & 0xFF
    if primary == sqlite3.SQLITE_FULL or (writing and code == sqlite3.SQLITE_IOERR_WRITE):
        return _full(path, error)
    if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return _denied(path, error, writing)
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreLockedError(
            "the catalog is busy",
            got=f"{error} at {path}",
            next_step="close other programs that have this database open",
        )
    if primary in _DAMAGED or code == sqlite3.SQLITE_IOERR_SHORT_READ:
        return CorruptRecordError("the catalog is damaged", got=f"{error} in {path}", next_step=_RESTORE)
    return None


def _full(path: Path, error: BaseException) -> StoreFullError:
    return StoreFullError(
        "the catalog cannot grow",
        got=f"{error} at {path}",
        next_step="free space or raise the file size limit, then ingest again; the last commit is intact",
    )


def _denied(path: Path, error: BaseException, writing: bool) -> CompLLMError:
    if writing:
        return StoreReadOnlyError(
            "the catalog cannot be written",
            got=f"{error} at {path}",
            next_step="open it with read_only=True, or give this user the right to write there",
        )
    return UnreadableFileError(
        "the catalog cannot be read", got=f"{error} at {path}", next_step="give this user the right to read there"
    )
