"""The vectors of a catalog: which generation of them is loaded, and whether it was changed since."""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

import numpy as np

from compllm_rag.catalog.database import read_state
from compllm_rag.catalog.faults import damaged
from compllm_rag.catalog.flat_vectors import FlatVectors
from compllm_rag.catalog.generations import GenerationFiles, VectorGeneration


class CatalogVectors:
    """Vectors in memory, and the files they come from and go to. Not safe between threads by itself.

    Args:
        folder: Of the catalog, None for one in memory.
        database: For messages.
    """

    def __init__(self, folder: Path | None, database: Path) -> None:
        self._files, self._database = GenerationFiles(folder), database
        self._vectors: FlatVectors | None = None
        self._loaded = -1  # the generation that the vectors are, or were before they were changed
        self.changed = False

    def get(self, connection: sqlite3.Connection, *, changing: bool, uncommitted: bool) -> FlatVectors:
        """The vectors that belong to the rows.

        Args:
            connection: Within a transaction.
            changing: They are about to be changed.
            uncommitted: Whether the transaction is a writer's.

        Raises:
            FileNotFoundError: Their file is gone; a reader looks again.
            CorruptRecordError: Their file is damaged, or does not belong to the rows.
        """
        if self._vectors is None or not self.changed:
            state = read_state(connection)
            if self._vectors is None or self._loaded != state.number:
                self._vectors, self._loaded = self._load(connection, state, uncommitted), state.number
        self.changed = self.changed or changing
        return self._vectors

    def _load(self, connection: sqlite3.Connection, state: VectorGeneration, uncommitted: bool) -> FlatVectors:
        try:
            vectors = self._files.load(state)
        except FileNotFoundError as error:
            if not uncommitted:
                raise  # a reader looks again
            raise damaged("the vector file that the catalog names is not there", got=error.filename) from error
        rows = connection.execute("SELECT id FROM nodes ORDER BY id")
        ids = np.fromiter((id_ for (id_,) in rows), dtype=np.int64)
        # Equal counts are not enough: ids that moved by one give wrong passages at the best scores.
        if not np.array_equal(vectors.ids(), ids):
            raise damaged(
                "text and vectors do not belong together",
                got=f"{len(vectors)} vectors in {state.file or 'no file'} and {len(ids)} nodes in {self._database}",
                expected="one vector for every node, under its id",
            )
        return vectors

    def save(self, connection: sqlite3.Connection) -> None:
        """Make changed vectors durable as the next generation, and name it in the transaction.

        Raises:
            CorruptRecordError: Rows and vectors disagree; nothing was written.
        """
        vectors = self.get(connection, changing=False, uncommitted=True)
        (n_nodes,) = connection.execute("SELECT count(*) FROM nodes").fetchone()
        if n_nodes != len(vectors):
            raise damaged("text and vectors went apart; nothing was committed", got=f"{n_nodes} and {len(vectors)}")
        made = self._files.save(self._loaded + 1, vectors)
        connection.execute("UPDATE state SET generation = ?, dim = ?, ntotal = ?, file = ?, sha256 = ?", astuple(made))

    def committed(self) -> None:
        """The transaction that named them is durable: former generations but the last go."""
        if self.changed:
            self.changed, self._loaded = False, self._loaded + 1
            with suppress(OSError):  # the commit stands; what is left is removed by the next one
                self._files.keep_only(self._loaded, self._loaded - 1)

    def keep_only(self, number: int) -> None:
        """Remove the files of every generation but one."""
        self._files.keep_only(number)

    def abandoned(self) -> None:
        """Changes are given up; the next look loads the committed ones."""
        if self.changed:
            self.forget()

    def forget(self) -> None:
        """Hold nothing in memory."""
        self._vectors, self._loaded, self.changed = None, -1, False
