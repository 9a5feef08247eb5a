"""The vectors of a catalog: the generations that are in memory, and what of them was changed and not committed."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np

from compllm_rag.catalog.database import read_state, write_state
from compllm_rag.catalog.faults import damaged
from compllm_rag.catalog.flat_vectors import FlatVectors
from compllm_rag.catalog.generations import GenerationFiles, VectorGeneration


class CatalogVectors:
    """Vectors in memory, and the files they come from and go to.

    `at` may be called by any thread, and what it gives is never changed: a search needs no lock while a writer goes on.
    All else is for whoever has the catalog to itself.

    Args:
        folder: Of the catalog, None for one in memory.
        database: For messages.
    """

    def __init__(self, folder: Path | None, database: Path) -> None:
        self._files, self._database = GenerationFiles(folder), database
        self._loading = threading.Lock()
        self._held: tuple[tuple[VectorGeneration, FlatVectors], ...] = ()  # the latest first; at most two
        self._working: FlatVectors | None = None
        self._since: FlatVectors | None = None  # what the working ones were
        self._merged: FlatVectors | None = None  # the working ones as they were written into a vector file
        self._saved: tuple[VectorGeneration, VectorGeneration] | None = None  # in force, and to be
        self.whole = False  # the next commit writes a vector file, however little changed

    @property
    def changed(self) -> bool:
        """Whether there is anything to commit."""
        return self._working is not None

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
        if self._working is not None:
            return self._working
        vectors = self.at(connection, uncommitted=uncommitted)
        if not changing:
            return vectors
        self._since, self._working = vectors, vectors.copy()
        return self._working

    def at(self, connection: sqlite3.Connection, *, uncommitted: bool = False) -> FlatVectors:
        """The committed vectors that belong to what a connection sees, not to be changed; else as `get`."""
        state = read_state(connection)
        found = self._find(state)
        if found is not None:
            return found
        with self._loading:
            found = self._find(state)
            if found is None:
                found = self._followed(connection, state) or self._load(connection, state, uncommitted)
                if not self._held or self._held[0][0].number <= state.number:  # else a reader that is late
                    self._hold(state, found)
            return found

    def _find(self, state: VectorGeneration) -> FlatVectors | None:
        return next((vectors for held, vectors in self._held if held == state), None)

    def _hold(self, state: VectorGeneration, vectors: FlatVectors) -> None:
        """Keep a generation, and the one before where the two have most of their memory in common."""
        before = [one for one in self._held[:1] if one[0].file == state.file]
        self._held = ((state, vectors), *before)

    def _followed(self, connection: sqlite3.Connection, state: VectorGeneration) -> FlatVectors | None:
        """From a generation that is held and the end of the log; None where nothing held leads there."""
        for held, vectors in self._held:
            try:
                made = self._files.follow(held, vectors, state)
            except FileNotFoundError:
                return None
            if made is not None:
                (n_nodes,) = connection.execute("SELECT count(*) FROM nodes").fetchone()
                newest = connection.execute("SELECT max(id) FROM nodes").fetchone()[0]
                if n_nodes != len(made) or (newest or 0) != made.last:
                    raise self._apart(len(made), n_nodes, state)
                return made
        return None

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
            raise self._apart(len(vectors), len(ids), state)
        return vectors

    def _apart(self, vectors: int, nodes: int, state: VectorGeneration) -> Exception:
        return damaged(
            "text and vectors do not belong together",
            got=f"{vectors} vectors in {state.file or 'no file'} and {nodes} nodes in {self._database}",
            expected="one vector for every node, under its id",
        )

    def save(self, connection: sqlite3.Connection) -> None:
        """Make changed vectors durable as the next generation, and name it in the transaction.

        Raises:
            CorruptRecordError: Rows and vectors disagree; nothing was written.
        """
        vectors, since = self._working, self._since
        if vectors is None or since is None:
            return
        (n_nodes,) = connection.execute("SELECT count(*) FROM nodes").fetchone()
        if n_nodes != len(vectors):
            raise damaged("text and vectors went apart; nothing was committed", got=f"{n_nodes} and {len(vectors)}")
        former, self._merged = read_state(connection), None
        made = None if self.whole else self._files.append(former, vectors, since)
        if made is None:
            merged = vectors.merged()
            made = self._files.save(former.number + 1, merged)
            self._merged = merged
        write_state(connection, made)
        self._saved = (former, made)

    def committed(self) -> None:
        """The transaction that named them is durable: files of states before the former one go."""
        if self._working is None or self._saved is None:
            return
        former, made = self._saved
        self._hold(made, self._merged or self._working.copy())
        self.abandoned()
        with suppress(OSError):  # the commit stands; what is left is removed by the next one
            self._files.keep_only(made.base, former.base)

    def keep_only(self, base: int) -> None:
        """Remove the files of every number but one."""
        self._files.keep_only(base)

    def abandoned(self) -> None:
        """Changes are given up, or committed; the next look finds the committed ones."""
        self._working = self._since = self._saved = self._merged = None
        self.whole = False

    def forget(self) -> None:
        """Hold nothing in memory."""
        self.abandoned()
        self._held = ()
