"""A LlamaIndex key-value store in a catalog, so that document and index stores commit together with the vectors.

`KVDocumentStore(CatalogKVStore(catalog))` and `KVIndexStore(CatalogKVStore(catalog))` are complete stores.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from llama_index.core.storage.kvstore.types import DEFAULT_BATCH_SIZE, DEFAULT_COLLECTION, BaseKVStore

from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.catalog import Catalog
from compllm_rag.llamaindex.catalog_database import storable

_PUT = """INSERT INTO kv (collection, key, value) VALUES (?, ?, ?)
ON CONFLICT (collection, key) DO UPDATE SET value = excluded.value"""


class CatalogKVStore(BaseKVStore):
    """Dicts by collection and key. Changes are durable, and visible to others, with the catalog's next commit.

    Args:
        catalog: Where they lie.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog

    def put(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        """Keep a dict.

        Raises:
            ConfigurationError: It is not JSON, or the key is not valid Unicode.
            StoreLockedError, StoreReadOnlyError, StoreFullError: See `Catalog.writing`.
        """
        self.put_all([(key, val)], collection)

    def put_all(
        self,
        kv_pairs: Sequence[tuple[str, dict[str, Any]]],
        collection: str = DEFAULT_COLLECTION,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        """Keep several dicts, all or none; `batch_size` is not needed."""
        rows = [(storable(collection), storable(key), _encode(key, value)) for key, value in kv_pairs]
        if rows:
            with self.catalog.writing() as connection:
                connection.executemany(_PUT, rows)

    def get(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        """One dict, None when there is none."""
        with self.catalog.reading() as connection:
            query = "SELECT value FROM kv WHERE collection = ? AND key = ?"
            row = connection.execute(query, (storable(collection), storable(key))).fetchone()
        return None if row is None else _decode(row[0])

    def get_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        """All dicts of a collection, in the order in which their keys came."""
        with self.catalog.reading() as connection:
            query = "SELECT key, value FROM kv WHERE collection = ? ORDER BY id"
            return {key: _decode(value) for key, value in connection.execute(query, (storable(collection),))}

    def delete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        """Delete one dict; tells whether there was one."""
        with self.catalog.writing() as connection:
            query = "DELETE FROM kv WHERE collection = ? AND key = ?"
            return connection.execute(query, (storable(collection), storable(key))).rowcount > 0

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


def _encode(key: str, value: dict[str, Any]) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"the value of {key!r:.80} cannot be kept as JSON",
            got=str(error)[:200],
            expected="texts, numbers, lists and dicts",
            next_step="drop what is no plain value from the metadata",
        ) from error


def _decode(text: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(text)
    return value
