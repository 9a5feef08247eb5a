"""Views of the last commit for whoever only looks: each has a connection of its own, and waits for no writer."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from compllm_rag.catalog.database import BUSY_S
from compllm_rag.catalog.faults import damaged, translated_errors
from compllm_rag.catalog.flat_vectors import FlatVectors
from compllm_rag.catalog.vectors import CatalogVectors
from compllm_rag.store.sqlite import Connection, connect

RELOADS = 20  # a writer would have to commit twice during each of them
_IDLE = 8  # connections that wait for the next search
_INSIDE: ContextVar[frozenset[int]] = ContextVar("compllm_rag_private_work", default=frozenset())


class Snapshots:
    """Of one catalog. Safe between threads.

    Args:
        database: Its file.
        vectors: Its vectors.
    """

    def __init__(self, database: Path, vectors: CatalogVectors) -> None:
        self._database, self._vectors = database, vectors
        self._idle: list[Connection] = []
        self._closed = False
        self._private = 0  # blocks whose uncommitted work is theirs alone to see

    @contextmanager
    def taken(self) -> Iterator[tuple[sqlite3.Connection, FlatVectors]]:
        """One view, for a block.

        Yields:
            The connection to read rows with, and the vectors that belong to them, not to be changed.
        """
        with translated_errors(self._database, writing=False):
            own = self._borrowed()
            try:
                yield own, self._begun(own)
            finally:
                if own.in_transaction:
                    own.execute("ROLLBACK")
                # One that is not lasting would not see what is written from now on.
                if own.lasting and not self._closed and len(self._idle) < _IDLE:
                    self._idle.append(own)
                else:
                    own.close()

    def _borrowed(self) -> Connection:
        with suppress(IndexError):
            return self._idle.pop()
        return connect(self._database, writing=False, busy_s=BUSY_S)[0]

    def _begun(self, connection: sqlite3.Connection) -> FlatVectors:
        for _ in range(RELOADS):
            connection.execute("BEGIN")
            try:
                return self._vectors.at(connection)
            except FileNotFoundError:
                # The writer went on by two generations between our look at the row and at the file.
                connection.execute("ROLLBACK")
        raise damaged("the vector file that the catalog names is not there", got=self._database)

    @property
    def belongs_to_another(self) -> bool:
        """Whether uncommitted work of this catalog, if there is any, is private to a context other than this."""
        return self._private > 0 and id(self) not in _INSIDE.get()

    @contextmanager
    def private(self) -> Iterator[None]:
        """Until the block ends, uncommitted work is for the block's context alone to see. Writers take turns."""
        token = _INSIDE.set(_INSIDE.get() | {id(self)})
        self._private += 1
        try:
            yield
        finally:
            self._private -= 1
            _INSIDE.reset(token)

    def close(self) -> None:
        """Close what waits; what is in use is closed when it is given back."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()
