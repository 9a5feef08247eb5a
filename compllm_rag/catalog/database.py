"""The SQLite side of a catalog: how its file is opened, and what tables it has."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compllm_rag.catalog.faults import damaged, translated_errors
from compllm_rag.catalog.generations import VectorGeneration
from compllm_rag.errors import ConfigurationError, StoreLockedError, StoreReadOnlyError, UnsupportedFormatError
from compllm_rag.store.lock import WriterLock
from compllm_rag.store.sqlite import connect

CATALOG_VERSION = 1
LOG_VERSION = 2  # while the vectors have a log, which earlier releases would not see
BUSY_S = 5.0  # only a checkpoint or a foreign program makes us wait
_SCHEMA = """
CREATE TABLE state (
    one INTEGER PRIMARY KEY CHECK (one = 1), format_version INTEGER NOT NULL,
    generation INTEGER NOT NULL, dim INTEGER NOT NULL, ntotal INTEGER NOT NULL, file TEXT NOT NULL, sha256 TEXT NOT NULL
);
-- AUTOINCREMENT: an id that was given once is never given again, deletes and restarts included.
CREATE TABLE nodes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, node_id TEXT NOT NULL UNIQUE, ref_doc_id TEXT NOT NULL,
    text TEXT NOT NULL, node TEXT NOT NULL, text_sha256 TEXT NOT NULL, row_sha256 TEXT NOT NULL
);
CREATE INDEX nodes_by_document ON nodes (ref_doc_id);
CREATE TABLE kv (
    id INTEGER PRIMARY KEY, collection TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, UNIQUE (collection, key)
);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
# Of a catalog of version 2: what of the log belongs to its state. Made when it is needed first.
_LOG = """CREATE TABLE IF NOT EXISTS vector_log (
    one INTEGER PRIMARY KEY CHECK (one = 1), in_file INTEGER NOT NULL, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL
)"""
REFERENCES = "CREATE TABLE refs (key BLOB PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID"  # see `references`


@contextmanager
def connected(database: Path, *, writing: bool) -> Iterator[sqlite3.Connection]:
    """Open a database file; the connection outlives the block, unless the block raises.

    Raises:
        StoreReadOnlyError, UnreadableFileError: The file or its folder does not allow it.
        CorruptRecordError: It is no database.
    """
    with translated_errors(database, writing=writing):
        if database.is_symlink():
            raise damaged("the catalog is a link to another file", got=database, expected="a plain file")
        if writing and not (os.access(database, os.W_OK) and os.access(database.parent, os.W_OK)):
            # SQLite would open it for reading, and complain at the first write.
            raise StoreReadOnlyError(
                "the catalog cannot be written", got=database, next_step="open it with read_only=True"
            )
        connection, _ = connect(database, writing=writing, busy_s=BUSY_S)
        try:
            if writing:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA secure_delete = ON")  # deleted text must not linger in free pages
            yield connection
        except BaseException:
            connection.close()
            raise


def has_tables(connection: sqlite3.Connection) -> bool:
    """Whether the creation of the catalog was ever committed."""
    row = connection.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'state'").fetchone()
    return bool(row[0])


def make_tables(connection: sqlite3.Connection, dim: int) -> None:
    """Create all tables, for an empty catalog of `dim` dimensions."""
    for statement in [*_SCHEMA.split(";"), REFERENCES]:
        connection.execute(statement)
    connection.execute("INSERT INTO state VALUES (1, ?, 0, ?, 0, '', '')", (CATALOG_VERSION, dim))


def read_state(connection: sqlite3.Connection) -> VectorGeneration:
    """Which vectors the catalog names.

    Raises:
        UnsupportedFormatError: Written in another format version.
        CorruptRecordError: The row is missing or damaged.
    """
    row = connection.execute("SELECT * FROM state").fetchone()
    if row is not None and row[1] not in (CATALOG_VERSION, LOG_VERSION):
        raise UnsupportedFormatError(
            "the catalog was written in another format version",
            got=row[1],
            expected=f"{CATALOG_VERSION} or {LOG_VERSION}",
            next_step="use a release that reads it, or ingest again into a new folder",
        )
    if row is None or [type(value) for value in row[2:]] != [int, int, int, str, str]:
        raise damaged("the catalog does not say which vectors it has", got=row)
    if row[1] == CATALOG_VERSION:
        return VectorGeneration(*row[2:])
    log = connection.execute("SELECT in_file, bytes, sha256 FROM vector_log").fetchone()
    if log is None or [type(value) for value in log] != [int, int, str] or min(log[:2]) < 0:
        raise damaged("the catalog does not say what of the vector log it has", got=log)
    return VectorGeneration(*row[2:], *log)


def write_state(connection: sqlite3.Connection, state: VectorGeneration) -> None:
    """Say which vectors the catalog has from now on."""
    version = LOG_VERSION if state.log_bytes else CATALOG_VERSION
    named = (state.number, state.dim, state.ntotal, state.file, state.sha256)
    connection.execute("DELETE FROM state")
    connection.execute("INSERT INTO state VALUES (1, ?, ?, ?, ?, ?, ?)", (version, *named))
    if state.log_bytes:
        connection.execute(_LOG)
        log = (state.in_file, state.log_bytes, state.log_sha256)
        connection.execute("INSERT OR REPLACE INTO vector_log VALUES (1, ?, ?, ?)", log)


def storable(text: str) -> str:
    """Pass text on that SQLite can keep.

    Raises:
        ConfigurationError: It holds a lone surrogate, which UTF-8 cannot express. (NUL and any length are fine.)
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            "this text is not valid Unicode",
            got=f"{text[:40]!r} with a lone surrogate at {error.start}",
            next_step="decode the source with errors='replace'",
        ) from error
    return text


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The writer's lock of a catalog whose vectors may be damaged, for a block.

    Raises:
        StoreLockedError: Another writer has uncommitted work.
    """
    lock = locked(folder)
    try:
        yield
    finally:
        lock.release()


def locked(folder: Path) -> WriterLock:
    """Take the lock.

    Raises:
        StoreLockedError: Another writer has uncommitted work.
    """
    try:
        return WriterLock(folder / "catalog.lock")
    except StoreLockedError as error:
        raise StoreLockedError(
            "another writer has uncommitted work in this catalog",
            got=error.got,
            next_step="wait for its commit, or open the catalog with read_only=True",
        ) from error


def has_tracked(connection: sqlite3.Connection) -> bool:
    """Whether a catalog knows nodes whose vectors lie in another store: they have a table of their own."""
    query = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'tracked'"
    return bool(connection.execute(query).fetchone()[0])
