"""How SQLite files are opened, by the catalog and by the index of a disk store."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote


def connect(database: Path, *, writing: bool, busy_s: float) -> tuple[sqlite3.Connection, bool]:
    """Open a database file that is there; transactions begin and end by statements only.

    Args:
        database: The file.
        writing: Whether it may be written.
        busy_s: Seconds to wait for another connection's lock.

    Returns:
        The connection, and whether it will see what others write after it. On a medium that nobody can write SQLite has
        to be told that the file does not change; a writer may still come along elsewhere.

    Raises:
        sqlite3.Error: What SQLite says; `translated_errors` makes errors of this package of it.
    """
    address = f"file:{quote(str(database))}?mode={'rw' if writing else 'ro'}"
    # Nobody can put a journal there, and SQLite must be told to do without.
    alone = not writing and not os.access(database.parent, os.W_OK) and not Path(f"{database}-wal").exists()
    connection = connect_uri(address + "&immutable=1" * alone, busy_s=busy_s)
    return connection, not alone


def connect_uri(uri: str, *, busy_s: float) -> sqlite3.Connection:
    """Open an SQLite URI."""
    connection = sqlite3.connect(uri, uri=True, timeout=busy_s, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection
