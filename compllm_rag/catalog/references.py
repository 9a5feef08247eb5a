"""How often chunks refer to each segment's concepts, kept in the transaction that adds and takes away the chunks.

Concepts are shared between chunks, so a deleted chunk says nothing about its concepts by itself; these counts do.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.database import REFERENCES

_PER_QUERY = 500  # old SQLite takes 999 parameters
_CHANGE = "INSERT INTO refs VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET n = n + excluded.n"


class References:
    """Counts by record key. A catalog made before there were counts has none until `recount`.

    Args:
        catalog: Where they lie.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog

    @property
    def counted(self) -> bool:
        """Whether there are counts."""
        with self.catalog.reading() as connection:
            return is_counted(connection)

    def change(self, keys: Iterable[str], sign: int) -> None:
        """Count more (1) or fewer (-1) references; keys nothing refers to any more are forgotten."""
        rows = [(bytes.fromhex(key), sign * n) for key, n in Counter(keys).items()]
        if not rows:
            return
        with self.catalog.writing() as connection:
            if is_counted(connection):
                connection.executemany(_CHANGE, rows)
                if sign < 0:
                    connection.executemany("DELETE FROM refs WHERE key = ? AND n <= 0", [row[:1] for row in rows])

    def clear(self) -> None:
        """Start counting from nothing."""
        with self.catalog.writing() as connection:
            connection.execute("DROP TABLE IF EXISTS refs")
            connection.execute(REFERENCES)

    def live(self, keys: Sequence[str]) -> list[bool]:
        """Tell for each key whether any chunk refers to it."""
        with self.catalog.reading() as connection:
            found = set[str]()
            for start in range(0, len(keys), _PER_QUERY):
                batch = [bytes.fromhex(key) for key in keys[start : start + _PER_QUERY]]
                marks = ",".join("?" * len(batch))
                query = f"SELECT hex(key) FROM refs WHERE key IN ({marks})"  # noqa: S608 - question marks
                found.update(key.lower() for (key,) in connection.execute(query, batch))
        return [key in found for key in keys]


def is_counted(connection: sqlite3.Connection) -> bool:
    """Whether this catalog has counts."""
    query = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'refs'"
    return bool(connection.execute(query).fetchone()[0])


def count_keys(connection: sqlite3.Connection) -> int:
    """How many different keys chunks refer to."""
    return int(connection.execute("SELECT count(*) FROM refs").fetchone()[0]) if is_counted(connection) else 0


def referred_keys(connection: sqlite3.Connection, page: int = _PER_QUERY) -> Iterator[list[str]]:
    """All keys that chunks refer to, a page at a time."""
    last = b""
    while True:
        rows = connection.execute("SELECT key FROM refs WHERE key > ? ORDER BY key LIMIT ?", (last, page)).fetchall()
        if not rows:
            return
        yield [bytes(key).hex() for (key,) in rows]
        last = rows[-1][0]
