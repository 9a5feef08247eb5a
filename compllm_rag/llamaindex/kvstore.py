"""A LlamaIndex key-value store in a catalog, so that document and index stores commit together with the vectors.

`KVDocumentStore(CatalogKVStore(catalog))` and `KVIndexStore(CatalogKVStore(catalog))` are complete stores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.storage.docstore.keyval_docstore import KVDocumentStore
from llama_index.core.storage.kvstore.types import DEFAULT_BATCH_SIZE, DEFAULT_COLLECTION, BaseKVStore

from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.kv import KeyValues


class CatalogKVStore(BaseKVStore):
    """Dicts by collection and key. Changes are durable, and visible to others, with the catalog's next commit.

    Args:
        catalog: Where they lie.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.values = KeyValues(catalog)

    @property
    def catalog(self) -> Catalog:
        """Where they lie."""
        return self.values.catalog

    def put(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        """Keep a dict; errors as of `KeyValues.put_all`."""
        self.values.put(key, val, collection)

    def put_all(
        self,
        kv_pairs: Sequence[tuple[str, dict[str, Any]]],
        collection: str = DEFAULT_COLLECTION,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        """Keep several dicts, all or none; `batch_size` is not needed."""
        self.values.put_all(kv_pairs, collection)

    def get(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        """One dict, None when there is none."""
        return self.values.get(key, collection)

    def get_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        """All dicts of a collection, in the order in which their keys came."""
        return self.values.get_all(collection)

    def delete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        """Delete one dict; tells whether there was one."""
        return self.values.delete(key, collection)

    async def aput(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        """`put` in a thread."""
        await asyncio.to_thread(self.put, key, val, collection)

    async def aput_all(
        self,
        kv_pairs: Sequence[tuple[str, dict[str, Any]]],
        collection: str = DEFAULT_COLLECTION,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        """`put_all` in a thread."""
        await asyncio.to_thread(self.put_all, kv_pairs, collection, batch_size)

    async def aget(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        """`get` in a thread."""
        return await asyncio.to_thread(self.get, key, collection)

    async def aget_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        """`get_all` in a thread."""
        return await asyncio.to_thread(self.get_all, collection)

    async def adelete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        """`delete` in a thread."""
        return await asyncio.to_thread(self.delete, key, collection)


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
