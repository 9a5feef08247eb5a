"""Which nodes lie in a vector store other than the catalog's own, and what concepts each of them refers to.

Such a store keeps vectors and text; here is only what is needed to tell which concepts are still referred to. Where it
keeps no text either (LlamaIndex's SimpleVectorStore), the node itself lies here as well.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.database import has_tracked, storable
from compllm_rag.library import Passage

STORE_KEY = "compllm/vector-store"  # setting: the class of the store where the vectors lie
_TABLE = """CREATE TABLE IF NOT EXISTS tracked (
    id INTEGER PRIMARY KEY AUTOINCREMENT, node_id TEXT NOT NULL UNIQUE, ref_doc_id TEXT NOT NULL, value TEXT NOT NULL
)"""
_BY_DOCUMENT = "CREATE INDEX IF NOT EXISTS tracked_by_document ON tracked (ref_doc_id)"
_PER_QUERY = 500  # old SQLite takes 999 parameters


@dataclass(frozen=True, slots=True)
class TrackedNode:
    """One node.

    Attributes:
        node_id: Its id.
        ref_doc_id: Its document.
        keys: Record keys of its concepts, in reading order.
        n_concepts: K of each.
        n_tokens: Tokens of its text.
        text: What it says, where the vector store keeps no text.
        node: All else of it as JSON, likewise.
        others: Record keys at the other rates at which it is kept.
        digest: SHA-256 of its text; "" of a node that an earlier release brought in.
    """

    node_id: str
    ref_doc_id: str
    keys: tuple[str, ...]
    n_concepts: tuple[int, ...]
    n_tokens: int
    text: str | None = None
    node: str | None = None
    others: tuple[str, ...] = ()
    digest: str = ""

    @property
    def passage(self) -> Passage:
        """Its numbers as those of a passage, for the accounts; which tokens it has is not known here."""
        return Passage((0,) * self.n_tokens, (), self.n_concepts, self.keys, others=self.others, digest=self.digest)


class TrackedNodes:
    """Nodes by id; changes commit with the rest of the catalog.

    Args:
        catalog: Where they lie.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog

    def begin(self, store: str) -> None:
        """Note, once and for all, that the vectors lie in a store of this class."""
        with self.catalog.writing() as connection:
            connection.execute(_TABLE)
            connection.execute(_BY_DOCUMENT)
        self.catalog.set_meta(STORE_KEY, store)

    def add(self, nodes: Iterable[TrackedNode]) -> None:
        """Note nodes; those that are known are replaced."""
        rows = [(storable(node.node_id), storable(node.ref_doc_id), _encode(node)) for node in nodes]
        with self.catalog.writing() as connection:
            connection.executemany("INSERT OR REPLACE INTO tracked (node_id, ref_doc_id, value) VALUES (?, ?, ?)", rows)

    def forget(self, node_ids: Iterable[str]) -> None:
        """Forget nodes."""
        with self.catalog.writing() as connection:
            connection.executemany("DELETE FROM tracked WHERE node_id = ?", [(node_id,) for node_id in node_ids])

    def clear(self) -> None:
        """Forget all nodes."""
        with self.catalog.writing() as connection:
            connection.execute("DELETE FROM tracked")

    def get(self, node_ids: Sequence[str]) -> dict[str, TrackedNode]:
        """Nodes by id; those that are not known are left out."""
        found = {}
        with self.catalog.reading() as connection:
            for start in range(0, len(node_ids), _PER_QUERY):
                batch = node_ids[start : start + _PER_QUERY]
                marks = ",".join("?" * len(batch))
                query = f"SELECT node_id, ref_doc_id, value FROM tracked WHERE node_id IN ({marks})"  # noqa: S608 - question marks
                for row in connection.execute(query, batch):
                    found[row[0]] = _decode(*row)
        return found

    def of_document(self, ref_doc_id: str) -> list[str]:
        """Ids of the nodes of a document, in order of arrival."""
        query = "SELECT node_id FROM tracked WHERE ref_doc_id = ? ORDER BY id"
        with self.catalog.reading() as connection:
            return [node_id for (node_id,) in connection.execute(query, (ref_doc_id,))]

    def pages(self, page: int = _PER_QUERY) -> Iterator[list[str]]:
        """Ids of all nodes in order of arrival, a page at a time; they may change between pages."""
        last = 0
        while True:
            with self.catalog.reading() as connection:
                query = "SELECT id, node_id FROM tracked WHERE id > ? ORDER BY id LIMIT ?"
                rows = connection.execute(query, (last, page)).fetchall()
            if not rows:
                return
            yield [node_id for _, node_id in rows]
            last = rows[-1][0]

    def by_document(self) -> dict[str, int]:
        """How many nodes each document has."""
        with self.catalog.reading() as connection:
            return dict(connection.execute("SELECT ref_doc_id, count(*) FROM tracked GROUP BY ref_doc_id").fetchall())

    def __len__(self) -> int:
        with self.catalog.reading() as connection:
            return int(connection.execute("SELECT count(*) FROM tracked").fetchone()[0])


def vectors_elsewhere(catalog: Catalog) -> str | None:
    """The class of the vector store that the vectors lie in; None where they lie in the catalog itself."""
    return catalog.get_meta(STORE_KEY)


def count_chunks(connection: sqlite3.Connection) -> int:
    """How many chunks a catalog knows, wherever their vectors lie."""
    chunks = int(connection.execute("SELECT count(*) FROM nodes").fetchone()[0])
    if has_tracked(connection):
        chunks += int(connection.execute("SELECT count(*) FROM tracked").fetchone()[0])
    return chunks


def _encode(node: TrackedNode) -> str:
    kept: dict[str, object] = {"keys": node.keys, "n_concepts": node.n_concepts, "n_tokens": node.n_tokens}
    kept |= {"others": node.others, "digest": node.digest}
    whole = {} if node.node is None else {"text": node.text, "node": node.node}
    return storable(json.dumps(kept | whole, ensure_ascii=False))


def _decode(node_id: str, ref_doc_id: str, value: str) -> TrackedNode:
    held = json.loads(value)
    return TrackedNode(
        node_id,
        ref_doc_id,
        tuple(held["keys"]),
        tuple(held["n_concepts"]),
        held["n_tokens"],
        held.get("text"),
        held.get("node"),
        tuple(held.get("others", ())),
        held.get("digest", ""),
    )
