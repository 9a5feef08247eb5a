"""Nodes as rows of a catalog: text in a column of its own, everything else as JSON, both under a digest."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from compllm_rag.catalog.database import storable
from compllm_rag.catalog.faults import damaged
from compllm_rag.errors import ConfigurationError, CorruptRecordError
from compllm_rag.fingerprint import tagged_digest

_PER_QUERY = 500  # old SQLite takes 999 parameters
_COLUMNS = "id, node_id, ref_doc_id, text, node, text_sha256, row_sha256"


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One row of the table `nodes`, its id aside.

    Args:
        node_id: The node's own id; one row for each.
        ref_doc_id: The document it comes from; a node without one is its own document.
        text: What it says.
        node: Class and all other fields, as JSON; never an embedding.
        text_sha256: Digest of the text.
        row_sha256: Digest of all of the above, checked whenever a row is read: SQLite checks no content.
    """

    node_id: str
    ref_doc_id: str
    text: str
    node: str
    text_sha256: str
    row_sha256: str


def make_row(node_id: str, ref_doc_id: str, text: str, body: str) -> NodeRow:
    """Make a row with its digests.

    Raises:
        ConfigurationError: One of them is not valid Unicode.
    """
    return _row(storable(node_id), storable(ref_doc_id), storable(text), storable(body))


def _row(node_id: str, ref_doc_id: str, text: str, body: str) -> NodeRow:
    total = tagged_digest("compllm-rag/node/1", node_id=node_id, ref_doc_id=ref_doc_id, text=text, node=body)
    return NodeRow(node_id, ref_doc_id, text, body, hashlib.sha256(text.encode()).hexdigest(), total)


@dataclass(frozen=True, slots=True)
class StoredNode:
    """A row that was read and checked.

    Args:
        id: Its vector's id.
        ref_doc_id: The document it comes from.
        node_id: The node's own id.
        text: What it says.
        kind: Its class.
        fields: All its other fields.
    """

    id: int
    ref_doc_id: str
    node_id: str
    text: str
    kind: str
    fields: dict[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        """The node's metadata."""
        found: dict[str, Any] = self.fields["metadata"]
        return found


def decode_row(row: tuple[Any, ...]) -> StoredNode:
    """Check one row of `_COLUMNS`.

    Raises:
        CorruptRecordError: It is not what was written.
    """
    id_, node_id, ref_doc_id, text, body, *digests = row
    texts = (node_id, ref_doc_id, text, body)
    made = _row(*texts) if all(isinstance(value, str) for value in texts) else None
    if made is None or [made.text_sha256, made.row_sha256] != digests:
        raise damaged(f"the row of node {node_id!r:.80} fails its checksum")
    held = json.loads(body)
    return StoredNode(id_, ref_doc_id, node_id, text, held["kind"], held["fields"])


def write_rows(connection: sqlite3.Connection, rows: Sequence[NodeRow]) -> list[int]:
    """Insert rows; gives their ids, which were never in use before."""
    ids = []
    for row in rows:
        cursor = connection.execute(
            "INSERT INTO nodes (node_id, ref_doc_id, text, node, text_sha256, row_sha256) VALUES (?, ?, ?, ?, ?, ?)",
            (row.node_id, row.ref_doc_id, row.text, row.node, row.text_sha256, row.row_sha256),
        )
        ids.append(int(cursor.lastrowid or 0))
    return ids


def delete_rows(connection: sqlite3.Connection, ids: Sequence[int]) -> None:
    """Delete rows by id."""
    connection.executemany("DELETE FROM nodes WHERE id = ?", ((id_,) for id_ in ids))


def ids_where(connection: sqlite3.Connection, column: str, values: Sequence[str]) -> list[int]:
    """Ids of the rows whose `node_id` or `ref_doc_id` is among values. What SQLite cannot hold matches nothing."""
    wanted = sorted({value for value in values if _is_storable(value)})
    found: list[int] = []
    for start in range(0, len(wanted), _PER_QUERY):
        batch = wanted[start : start + _PER_QUERY]
        query = f"SELECT id FROM nodes WHERE {column} IN ({_marks(batch)})"
        found.extend(id_ for (id_,) in connection.execute(query, batch))
    return found


def read_ids(connection: sqlite3.Connection, ids: Sequence[int]) -> dict[int, StoredNode]:
    """Read rows by id; those that are not there are left out."""
    found = {}
    for start in range(0, len(ids), _PER_QUERY):
        batch = ids[start : start + _PER_QUERY]
        for row in connection.execute(f"SELECT {_COLUMNS} FROM nodes WHERE id IN ({_marks(batch)})", batch):
            found[row[0]] = decode_row(row)
    return found


def read_each(connection: sqlite3.Connection, ids: Sequence[int]) -> Iterator[StoredNode]:
    """Read rows by id, in the order given, a page at a time; those that are not there are left out."""
    for start in range(0, len(ids), _PER_QUERY):
        page = ids[start : start + _PER_QUERY]
        rows = read_ids(connection, page)
        yield from (rows[id_] for id_ in page if id_ in rows)


def with_rows(connection: sqlite3.Connection, hits: Sequence[tuple[int, float]]) -> Iterator[tuple[StoredNode, float]]:
    """Read the rows of search hits, in their order, a page at a time.

    Raises:
        CorruptRecordError: A hit has no row; a passage is never dropped silently.
    """
    for start in range(0, len(hits), _PER_QUERY):
        page = hits[start : start + _PER_QUERY]
        rows = read_ids(connection, [id_ for id_, _ in page])
        for id_, score in page:
            if id_ not in rows:
                raise damaged("a vector has no text", got=f"id {id_}")
            yield rows[id_], score


def read_after(connection: sqlite3.Connection, last: int, limit: int) -> list[StoredNode]:
    """Read the next rows in order of id."""
    query = f"SELECT {_COLUMNS} FROM nodes WHERE id > ? ORDER BY id LIMIT ?"
    return [decode_row(row) for row in connection.execute(query, (last, limit))]


def scan(connection: sqlite3.Connection, page: int = _PER_QUERY) -> Iterator[tuple[int, StoredNode | None]]:
    """Go through all rows in order of id, damaged ones included: those give None.

    The connection must take text that is not UTF-8 (`lenient_text`), or one bad row would hide its page.
    """
    last = 0
    query = f"SELECT {_COLUMNS} FROM nodes WHERE id > ? ORDER BY id LIMIT ?"
    while rows := connection.execute(query, (last, page)).fetchall():
        for row in rows:
            try:
                yield row[0], decode_row(row)
            except (CorruptRecordError, UnicodeError):
                yield row[0], None
        last = rows[-1][0]


def lenient_text(data: bytes) -> str:
    """Read text for `scan`: bytes that are no UTF-8 fail their digest later, instead of ending the statement."""
    return data.decode("utf-8", "surrogateescape")


def read_all(connection: sqlite3.Connection, page: int = _PER_QUERY) -> Iterator[StoredNode]:
    """Read all rows in order of id, a page at a time."""
    last = 0
    while rows := read_after(connection, last, page):
        yield from rows
        last = rows[-1].id


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))


def _is_storable(text: str) -> bool:
    try:
        storable(text)
    except ConfigurationError:
        return False
    return True
