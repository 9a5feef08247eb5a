"""Dicts by collection and key in a catalog: they commit together with the rows and vectors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.database import storable
from compllm_rag.errors import ConfigurationError

_PUT = """INSERT INTO kv (collection, key, value) VALUES (?, ?, ?)
ON CONFLICT (collection, key) DO UPDATE SET value = excluded.value"""


class KeyValues:
    """Dicts by collection and key. Changes are durable, and visible to others, with the catalog's next commit.

    Args:
        catalog: Where they lie.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog

    def put(self, key: str, value: dict[str, Any], collection: str) -> None:
        """Keep a dict; errors as of `put_all`."""
        self.put_all([(key, value)], collection)

    def put_all(self, pairs: Sequence[tuple[str, dict[str, Any]]], collection: str) -> None:
        """Keep several dicts, all or none.

        Raises:
            ConfigurationError: One is not JSON, or a key is not valid Unicode.
            StoreLockedError, StoreReadOnlyError, StoreFullError: See `Catalog.writing`.
        """
        rows = [(storable(collection), storable(key), _encode(key, value)) for key, value in pairs]
        if rows:
            with self.catalog.writing() as connection:
                connection.executemany(_PUT, rows)

    def get(self, key: str, collection: str) -> dict[str, Any] | None:
        """One dict, None when there is none."""
        with self.catalog.reading() as connection:
            query = "SELECT value FROM kv WHERE collection = ? AND key = ?"
            row = connection.execute(query, (storable(collection), storable(key))).fetchone()
        return None if row is None else _decode(row[0])

    def get_all(self, collection: str) -> dict[str, dict[str, Any]]:
        """All dicts of a collection, in the order in which their keys came."""
        with self.catalog.reading() as connection:
            query = "SELECT key, value FROM kv WHERE collection = ? ORDER BY id"
            return {key: _decode(value) for key, value in connection.execute(query, (storable(collection),))}

    def delete(self, key: str, collection: str) -> bool:
        """Delete one dict; tells whether there was one."""
        with self.catalog.writing() as connection:
            query = "DELETE FROM kv WHERE collection = ? AND key = ?"
            return connection.execute(query, (storable(collection), storable(key))).rowcount > 0


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
