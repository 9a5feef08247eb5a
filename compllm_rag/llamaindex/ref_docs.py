"""`index.ref_doc_info`, from the rows of the catalog: LlamaIndex has it for stores without text only."""

from __future__ import annotations

from llama_index.core.storage.docstore.types import RefDocInfo

from compllm_rag.catalog import rows as node_rows
from compllm_rag.catalog.catalog import Catalog

_PAGE = 256


def ref_doc_info(catalog: Catalog) -> dict[str, RefDocInfo]:
    """The nodes of every document, and the metadata of its first; a node of no document counts as one of its own.

    Raises:
        CorruptRecordError: A row fails its checksum.
    """
    found: dict[str, RefDocInfo] = {}
    last = 0
    while True:
        with catalog.reading() as connection:
            rows = node_rows.read_after(connection, last, _PAGE)
        if not rows:
            return found
        for row in rows:
            found.setdefault(row.ref_doc_id, RefDocInfo(metadata=row.metadata)).node_ids.append(row.node_id)
        last = rows[-1].id
