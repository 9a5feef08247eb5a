"""Chunks whose text and vectors are there and whose concepts are still to be made.

They are rows of the catalog, written in the transaction that brings the chunks themselves: so nothing is lost when the
process ends, every process that opens the storage knows them, and a missing record of theirs is no damage.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence

from compllm_rag.catalog.database import has_tracked
from compllm_rag.catalog.kv import KeyValues

_COLLECTION = "compllm/awaiting"
_PER_QUERY = 500  # old SQLite takes 999 parameters
_KEYS = "FROM kv, json_each(kv.value, '$.keys') AS k WHERE kv.collection = ?"

_NODES = """SELECT kv.key, nodes.ref_doc_id FROM kv LEFT JOIN nodes ON nodes.node_id = kv.key
    WHERE kv.collection = ? ORDER BY kv.id"""
_BESIDE = """SELECT kv.key, COALESCE(nodes.ref_doc_id, tracked.ref_doc_id)
    FROM kv LEFT JOIN nodes ON nodes.node_id = kv.key LEFT JOIN tracked ON tracked.node_id = kv.key
    WHERE kv.collection = ? ORDER BY kv.id"""


class PendingChunks:
    """Node ids, in the order in which they came, with the record keys each lacked.

    Args:
        values: Where they lie.
    """

    def __init__(self, values: KeyValues) -> None:
        self._kv = values

    def add(self, rows: Mapping[str, Sequence[str]]) -> None:
        """Note record keys that are missing, by node id; they commit with the rest."""
        self._kv.put_all([(node_id, {"keys": list(keys)}) for node_id, keys in rows.items()], _COLLECTION)

    def forget(self, node_ids: Iterable[str]) -> None:
        """Forget nodes that have their concepts, or are gone."""
        with self._kv.catalog.writing() as connection:
            _delete(connection, node_ids)

    def forget_now(self, node_ids: Iterable[str]) -> bool:
        """The same in a commit of its own; False, and nothing done, while somebody's work is uncommitted.

        Raises:
            StoreLockedError: Another process or instance has uncommitted work.
        """
        with self._kv.catalog.own_transaction() as connection:
            if connection is None:
                return False
            _delete(connection, node_ids)
        return True

    def among(self, node_ids: Sequence[str]) -> frozenset[str]:
        """Those of some nodes that await their concepts."""
        found = set[str]()
        with self._kv.catalog.snapshot() as (connection, _):
            for start in range(0, len(node_ids), _PER_QUERY):
                batch = node_ids[start : start + _PER_QUERY]
                marks = ",".join("?" * len(batch))
                query = f"SELECT key FROM kv WHERE collection = ? AND key IN ({marks})"  # noqa: S608 - question marks
                found.update(key for (key,) in connection.execute(query, (_COLLECTION, *batch)))
        return frozenset(found)

    def nodes(self) -> dict[str, str | None]:
        """The document of each of them, oldest first; None where the node itself is gone."""
        with self._kv.catalog.reading() as connection:
            beside = has_tracked(connection)  # nodes of another vector store lie in a table of their own
            return dict(connection.execute(_BESIDE if beside else _NODES, (_COLLECTION,)).fetchall())

    def clear(self) -> None:
        """Forget all."""
        with self._kv.catalog.writing() as connection:
            connection.execute("DELETE FROM kv WHERE collection = ?", (_COLLECTION,))

    def __len__(self) -> int:
        with self._kv.catalog.reading() as connection:
            return int(connection.execute("SELECT count(*) FROM kv WHERE collection = ?", (_COLLECTION,)).fetchone()[0])


def pending_keys(connection: sqlite3.Connection) -> set[str]:
    """Record keys that chunks refer to and that may still be missing."""
    return {key for (key,) in connection.execute(f"SELECT DISTINCT k.value {_KEYS}", (_COLLECTION,))}


def count_pending(connection: sqlite3.Connection) -> int:
    """How many different ones."""
    return int(connection.execute(f"SELECT count(DISTINCT k.value) {_KEYS}", (_COLLECTION,)).fetchone()[0])


def _delete(connection: sqlite3.Connection, node_ids: Iterable[str]) -> None:
    rows = ((_COLLECTION, node_id) for node_id in node_ids)
    connection.executemany("DELETE FROM kv WHERE collection = ? AND key = ?", rows)
