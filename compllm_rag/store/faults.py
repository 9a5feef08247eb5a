"""Turn what the operating system and SQLite raise into errors that say what to do, for the store and the catalog."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR}
_RESTORE = "restore the folder from a copy, or delete it and ingest again"


@dataclass(frozen=True)
class Subject:
    """What errors are about.

    Attributes:
        files: The whole of it, in words.
        database: Its SQLite file, in words.
        when_full: What to do once there is space again.
    """

    files: str
    database: str
    when_full: str


CONCEPT_STORE = Subject(
    "the concept store",
    "the index of the concept store",
    "free space or raise the file size limit, then put again; what was flushed before is intact",
)


@contextmanager
def translated_errors(path: Path, *, writing: bool, subject: Subject = CONCEPT_STORE) -> Iterator[None]:
    """Run a block that touches `path`; raise this package's errors instead of bare ones.

    Args:
        path: What is touched, for the message.
        writing: Whether the block writes.
        subject: What `path` is part of, for the message.

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
        raise  # StoreFullError and others are OSErrors, too
    except diskcache.Timeout as error:
        raise _busy(path, subject) from error
    except OSError as error:
        if error.errno in _FULL:
            raise _full(path, error, subject) from error
        if error.errno in _FORBIDDEN:
            raise _denied(path, error, writing, subject) from error
        raise
    except sqlite3.Error as error:
        replacement = _from_sqlite(path, error, writing, subject)
        if replacement is None:
            raise
        raise replacement from error


def _from_sqlite(path: Path, error: sqlite3.Error, writing: bool, subject: Subject) -> CompLLMError | None:
    # A failed ROLLBACK hides the error that made it necessary, hence the walk along the contexts.
    cause: BaseException | None = error
    coded = False
    while cause is not None:
        code = getattr(cause, "sqlite_errorcode", None)
        if code is not None:
            coded = True
            made = _from_code(code, path, cause, writing, subject)
            if made is not None:
                return made
        cause = cause.__context__
    # Python raises a bare OperationalError, without a code, for TEXT that is not UTF-8.
    return None if coded or not isinstance(error, sqlite3.OperationalError) else damaged_database(path, error, subject)


def _from_code(code: int, path: Path, cause: BaseException, writing: bool, subject: Subject) -> CompLLMError | None:
    primary = code & 0xFF
    if primary == sqlite3.SQLITE_FULL or (writing and code == sqlite3.SQLITE_IOERR_WRITE):
        return _full(path, cause, subject)
    if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return _denied(path, cause, writing, subject)
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return _busy(path, subject)
    if primary in _DAMAGED or code == sqlite3.SQLITE_IOERR_SHORT_READ:
        return damaged_database(path, cause, subject)
    if primary == sqlite3.SQLITE_IOERR:
        return UnreadableFileError(
            f"{subject.files} cannot be used",
            got=f"{cause} at {path}",
            next_step="free some space if the disk is full; look at the disk otherwise",
        )
    return None


def damaged_database(path: Path, cause: object, subject: Subject = CONCEPT_STORE) -> CorruptRecordError:
    """The error for a file that is no database, or lacks what it should hold."""
    return CorruptRecordError(f"{subject.database} is damaged", got=f"{cause} in {path}", next_step=_RESTORE)


def _full(path: Path, error: BaseException, subject: Subject) -> StoreFullError:
    return StoreFullError(f"{subject.files} cannot grow", got=f"{error} at {path}", next_step=subject.when_full)


def _denied(path: Path, error: BaseException, writing: bool, subject: Subject) -> CompLLMError:
    if writing:
        return StoreReadOnlyError(
            f"{subject.files} cannot be written",
            got=f"{error} at {path}",
            next_step="open it with read_only=True, or give this user the right to write there",
        )
    return UnreadableFileError(
        f"{subject.files} cannot be read", got=f"{error} at {path}", next_step="give this user the right to read there"
    )


def _busy(path: Path, subject: Subject) -> StoreLockedError:
    return StoreLockedError(
        f"{subject.database} is busy",
        got=f"a lock held by another process on {path}",
        next_step="close other programs that have this database open",
    )
