"""The database of a disk store's index: diskcache for writing, a read-only connection of our own for reading.

diskcache's defaults lose data and run code: it evicts silently at 1 GiB, syncs lazily, and loads pickles on reading.
So it is opened with eviction off and full syncing, str keys and bytes values only, and a `Disk` that refuses pickles
and value files both ways. It also writes its settings whenever it opens, so readers do not use it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diskcache  # type: ignore[import-untyped, unused-ignore]

from compllm_rag.errors import ConfigurationError, UnsupportedFormatError
from compllm_rag.store.faults import damaged_database
from compllm_rag.store.index_rows import RAW, planted
from compllm_rag.store.sqlite import connect

_SETTINGS = {
    "eviction_policy": "none",
    "cull_limit": 0,
    "statistics": 0,
    "tag_index": 0,
    "sqlite_auto_vacuum": 0,
    "sqlite_cache_size": 2**13,
    "sqlite_journal_mode": "wal",
    "sqlite_mmap_size": 0,  # a shortened, mapped database would end the process
    "sqlite_synchronous": 2,
    "disk_min_file_size": 2**15,
}


class PlainDisk(diskcache.Disk):  # type: ignore[misc, unused-ignore]
    """Takes str keys and small bytes values, and never loads or writes a pickle or a value file."""

    def put(self, key: object) -> tuple[str, bool]:
        """Pass a str key on."""
        if type(key) is not str:
            raise UnsupportedFormatError("index keys are texts", got=f"a {type(key).__name__}", expected="str")
        return key, True

    def get(self, key: object, raw: object) -> str:
        """Give a str key back."""
        if not raw or type(key) is not str:
            raise planted(repr(key)[:80], f"a key of type {type(key).__name__}, raw {raw}")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, bytes]:
        """Pass a bytes value on."""
        if type(value) is not bytes or read or len(value) >= self.min_file_size:
            raise UnsupportedFormatError("index values are short bytes", got=f"a {type(value).__name__}")
        return 0, RAW, None, value

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> bytes:
        """Give a bytes value back."""
        if mode != RAW or type(value) is not bytes or filename is not None:
            raise planted("of the index", f"a value of mode {mode}, type {type(value).__name__}, file {filename}")
        return value


def make_private(database: Path) -> None:
    """Make an SQLite file before SQLite does, with the mode that its journals will inherit; one that is there stays.

    It must not be opened and closed: that would drop the locks of every connection this process has to it, another
    process would take itself for the last one and remove the journal, and what is written into it then is lost.

    Raises:
        CorruptRecordError: A link lies in its place.
    """
    try:
        os.close(os.open(database, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        if database.is_symlink():
            raise damaged_database(database, "a link to another file") from None


def open_cache(database: Path) -> diskcache.Cache:
    """Open a database for writing, and make it where it is missing.

    Raises:
        ConfigurationError: diskcache would take another path for it.
        CorruptRecordError: A link lies in its place.
    """
    folder = database.parent
    if os.path.expandvars(folder) != str(folder):
        raise ConfigurationError(
            "diskcache would replace a variable in the path of the store",
            got=folder,
            expected="a path without the names of environment variables",
        )
    make_private(database)
    return diskcache.Cache(str(folder), disk=PlainDisk, **_SETTINGS)


class IndexReader:
    """A connection for reading that opens when it is needed and writes nothing. Not safe between threads by itself.

    Args:
        database: The file; it is there.
    """

    def __init__(self, database: Path) -> None:
        self._database = database
        self._connection: sqlite3.Connection | None = None
        self._lasting = True

    @property
    def is_open(self) -> bool:
        """Whether the connection of the last query is still there."""
        return self._connection is not None

    def select(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """The rows of one statement.

        Raises:
            sqlite3.Error: What SQLite says; `translated_errors` makes errors of this package of it.
        """
        if self._connection is None:
            self._connection, self._lasting = self._connect()
        rows = self._connection.execute(query, values).fetchall()
        if not self._lasting:
            self.close()
        return rows

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """One state of all rows for a block, whatever is written meanwhile; something was selected before."""
        connection = self._connection
        if connection is None:  # on a medium that nobody can write
            yield
            return
        connection.execute("BEGIN")
        try:
            yield
        finally:
            connection.execute("ROLLBACK")

    def close(self) -> None:
        """Close the connection; the next query opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> tuple[sqlite3.Connection, bool]:
        """A read-only connection, and whether it will see what is written after it."""
        reader, lasting = connect(self._database, writing=False, busy_s=60)
        try:
            for pragma in ("query_only = 1", "cell_size_check = 1", "mmap_size = 0"):
                reader.execute(f"PRAGMA {pragma}")
            reader.execute("SELECT COUNT(*) FROM Settings")
        except BaseException:
            reader.close()
            raise
        return reader, lasting
