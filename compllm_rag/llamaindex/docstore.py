"""The document store of an index, for ingestion pipelines as well."""

from __future__ import annotations

from llama_index.core.storage.docstore.keyval_docstore import KVDocumentStore

from compllm_rag.llamaindex.kvstore import CatalogKVStore


class CatalogDocumentStore(KVDocumentStore):
    """LlamaIndex's document store in a catalog.

    An index keeps no more of a document here than its hash, since the text lies with the vectors. LlamaIndex deletes
    only what it holds whole: a pipeline with the strategy `upserts_and_delete` would fail on documents that the index
    brought in.

    Args:
        kvstore: Where it lies.
    """

    def __init__(self, kvstore: CatalogKVStore) -> None:
        super().__init__(kvstore, namespace="compllm")

    def delete_document(self, doc_id: str, raise_error: bool = True) -> None:
        """Delete a document, or the memory of its hash.

        Raises:
            ValueError: Neither is there, and `raise_error`.
        """
        known = self.get_document_hash(doc_id) is not None
        super().delete_document(doc_id, raise_error=raise_error and not known)

    async def adelete_document(self, doc_id: str, raise_error: bool = True) -> None:
        """The same, in the async methods' way."""
        known = await self.aget_document_hash(doc_id) is not None
        await super().adelete_document(doc_id, raise_error=raise_error and not known)
