"""How SQLite files are opened, by the catalog and by the index of a disk store."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

# What SQLite says where it cannot lay out its journal's index beside the file: the disk is full, or not to be written.
_NO_JOURNAL = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}


class Connection(sqlite3.Connection):
    """A connection that knows how long it may be used.

    Attributes:
        lasting: Whether it will see what others write after it was opened.
    """

    lasting: bool = True


def connect(database: Path, *, writing: bool, busy_s: float) -> tuple[Connection, bool]:
    """Open a database file that is there; transactions begin and end by statements only.

    Reading takes no space: where SQLite cannot put the index of its journal beside the file, since the disk is full or
    nobody can write there, and no journal is left that would have to be read, it is told that the file does not change.

    Args:
        database: The file.
        writing: Whether it may be written.
        busy_s: Seconds to wait for another connection's lock.

    Returns:
        The connection, and whether it will see what others write after it. Of one that does not, a writer may still
        come along: open another for the next look.

    Raises:
        sqlite3.Error: What SQLite says; `translated_errors` makes errors of this package of it.
    """
    address = f"file:{quote(os.fsencode(database))}?mode={'rw' if writing else 'ro'}"
    if writing:
        return connect_uri(address, busy_s=busy_s), True
    if os.access(database.parent, os.W_OK) or _has_journal(database):
        connection = connect_uri(address, busy_s=busy_s)
        try:
            connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()  # opens the journal
            return connection, True
        except sqlite3.OperationalError as error:
            connection.close()
            if error.sqlite_errorcode & 0xFF not in _NO_JOURNAL or _has_journal(database):
                raise
    alone = connect_uri(address + "&immutable=1", busy_s=busy_s)
    alone.lasting = False
    return alone, False


def _has_journal(database: Path) -> bool:
    """Whether something lies in the journal, without which the file is not what was committed last."""
    try:
        return Path(f"{database}-wal").stat().st_size > 0
    except FileNotFoundError:
        return False


def connect_uri(uri: str, *, busy_s: float) -> Connection:
    """Open an SQLite URI."""
    connection = sqlite3.connect(
        uri, uri=True, timeout=busy_s, isolation_level=None, check_same_thread=False, factory=Connection
    )
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection
