"""Documents of a catalog, a page at a time in order of id."""

from __future__ import annotations

from typing import NamedTuple

from compllm_rag.catalog.catalog import Catalog


class DocumentRow(NamedTuple):
    """One document.

    Attributes:
        id: Its id.
        nodes: How many nodes it has.
        first: Node id of the one that came first.
    """

    id: str
    nodes: int
    first: str


def documents_after(catalog: Catalog, after: str, limit: int) -> list[DocumentRow]:
    """The documents whose ids come after one, in order of id (by code points).

    Args:
        catalog: Where they are.
        after: Empty for the first ones.
        limit: Most of them.
    """
    query = (
        "SELECT d.ref_doc_id, d.n, nodes.node_id FROM (SELECT ref_doc_id, count(*) AS n, min(id) AS first FROM nodes"
        " WHERE ref_doc_id > ? GROUP BY ref_doc_id ORDER BY ref_doc_id LIMIT ?) AS d JOIN nodes ON nodes.id = d.first"
        " ORDER BY d.ref_doc_id"
    )
    with catalog.reading() as connection:
        return [DocumentRow(*row) for row in connection.execute(query, (after, limit))]
