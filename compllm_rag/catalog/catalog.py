"""One SQLite file that holds text, documents, index structs and settings, and says which vectors belong to them.

```
<path>/catalog.db                    rows; whoever reads it sees the last commit
<path>/vectors-<n>.faiss, .log       vectors, see `generations`
<path>/catalog.lock                  who has uncommitted work
```

Uncommitted work lies in an open SQLite write transaction, so memory does not grow with it. A commit first makes what
changed of the vectors durable and then commits the transaction, which also names it: the SQLite commit is the one
point at which rows, vectors and settings change together, and a process killed before it leaves the former state.
Searches wait for nobody: each has a connection of its own for as long as it lasts, and vectors that nobody changes.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from compllm_rag.catalog.database import BUSY_S, connected, has_tables, locked, make_tables, read_state, storable
from compllm_rag.catalog.faults import damaged, translated_errors
from compllm_rag.catalog.flat_vectors import FlatVectors
from compllm_rag.catalog.generations import sync_folder
from compllm_rag.catalog.snapshots import RELOADS, Snapshots
from compllm_rag.catalog.vectors import CatalogVectors
from compllm_rag.errors import ConfigurationError, StorageNotFoundError, StoreReadOnlyError
from compllm_rag.handles import ProcessBound
from compllm_rag.store.index_database import make_private
from compllm_rag.store.lock import WriterLock
from compllm_rag.store.sqlite import Connection, connect, connect_uri

_DATABASE = "catalog.db"


class Catalog(ProcessBound):
    """Rows and vectors that commit together. Safe between threads; one writer at a time between processes.

    Changes are visible in this instance at once, and durable and visible to others after `commit`. `close` gives
    uncommitted work up; a `with` block commits at its end, or rolls back when it ends by an exception.

    Use `Catalog.create`, `Catalog.open` or `Catalog.in_memory`; the constructor is theirs.
    """

    _opened_by = "open it again there: Catalog.open(path, read_only=True)"

    def __init__(self, path: Path | None, connection: sqlite3.Connection, *, read_only: bool) -> None:
        self.path, self.read_only = path, read_only
        self._database = Path(":memory:") if path is None else path / _DATABASE
        self._guard = threading.RLock()
        self._connection: sqlite3.Connection | None = connection
        self._vectors = CatalogVectors(path, self._database)
        self._lock: WriterLock | None = None
        self._uncommitted = False
        self._snapshots = Snapshots(self._database, self._vectors)

    @classmethod
    def create(cls, path: str | os.PathLike[str], dim: int) -> Catalog:
        """Make an empty catalog.

        Args:
            path: Its folder; made (mode 0700) when missing.
            dim: Dimensions of every vector.

        Raises:
            ConfigurationError: `dim` makes no sense, or a catalog lies there already.
            StoreReadOnlyError: The folder cannot be written.
        """
        folder = Path(path).absolute()
        _check_dim(dim)
        database = folder / _DATABASE
        with translated_errors(database, writing=True):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            make_private(database)
        with connected(database, writing=True) as connection:
            catalog = cls(folder, connection, read_only=False)
            with catalog.writing():
                if has_tables(connection):
                    raise ConfigurationError(
                        "a catalog lies here already", got=folder, next_step="open it, or name another folder"
                    )
                make_tables(connection, dim)
            catalog.commit()
            sync_folder(folder)
        return catalog

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_only: bool = False) -> Catalog:
        """Open a catalog and check that its rows and vectors belong together.

        Args:
            path: Its folder.
            read_only: Write nothing. A reader sees each commit of the writer from its next read on.

        Raises:
            StorageNotFoundError: No catalog, or one whose creation was interrupted.
            UnsupportedFormatError: Written in another format version.
            CorruptRecordError: Rows or vectors are damaged, or do not belong together.
            StoreReadOnlyError, UnreadableFileError: The folder does not allow it.
        """
        folder = Path(path).absolute()
        database = folder / _DATABASE
        if not database.exists():
            raise _missing(folder)
        with connected(database, writing=not read_only) as connection:
            catalog = cls(folder, connection, read_only=read_only)
            with translated_errors(database, writing=False):
                if not has_tables(connection):
                    raise _missing(folder)
            with catalog.reading():
                catalog.vectors()
        return catalog

    @classmethod
    def in_memory(cls, dim: int) -> Catalog:
        """Make a catalog without a folder; commit and rollback work, and close forgets everything."""
        _check_dim(dim)
        catalog = cls(None, connect_uri("file::memory:", busy_s=0), read_only=False)
        with catalog.writing() as connection:
            make_tables(connection, dim)
        catalog.commit()
        return catalog

    @property
    def generation(self) -> int:
        """Number of the vectors in force, uncommitted changes aside."""
        with self.reading():
            return read_state(self._alive()).number

    @property
    def dim(self) -> int:
        """Dimensions of every vector."""
        with self.reading():
            return read_state(self._alive()).dim

    @property
    def pending(self) -> bool:
        """Whether there is uncommitted work."""
        with self._guard:
            return self._uncommitted

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent view of rows and vectors, held until the block ends.

        Yields:
            The connection to read rows with; `vectors` gives the vectors that belong to them.
        """
        with self._guard, translated_errors(self._database, writing=False):
            connection = self._latest()
            if connection.in_transaction:
                yield connection
                return
            self._begin_read(connection)
            try:
                yield connection
            finally:
                connection.execute("ROLLBACK")

    @contextmanager
    def snapshot(self) -> Iterator[tuple[sqlite3.Connection, FlatVectors]]:
        """One consistent view of rows and vectors that waits for no writer of this instance, nor keeps it waiting.

        It is of the last commit. Uncommitted work of this instance is in it, and then it is the view of `reading` and
        waits as that does, unless the work is `private` to another context. A catalog in memory has no other view.

        Yields:
            The connection to read rows with, and the vectors that belong to them, not to be changed.
        """
        self._alive()
        if self.path is None or (self._uncommitted and not self._snapshots.belongs_to_another):
            with self.reading() as connection:
                yield connection, self.vectors()
            return
        with self._snapshots.taken() as view:
            yield view

    def private(self) -> AbstractContextManager[None]:
        """A block whose uncommitted work `snapshot` shows to the block's own context alone."""
        return self._snapshots.private()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One step of uncommitted work: all of it or, when the block raises, nothing.

        Vectors must be changed after the last row, by something that cannot raise.

        Raises:
            StoreLockedError: Another process or instance has uncommitted work.
            StoreReadOnlyError: Opened for reading.
            StoreFullError: No space.
        """
        with self._guard, translated_errors(self._database, writing=True):
            fresh = not self._uncommitted
            connection = self._begin_write()
            connection.execute("SAVEPOINT step")
            try:
                yield connection
                connection.execute("RELEASE step")
            except BaseException:
                if fresh or not connection.in_transaction:  # SQLite ends it itself when a disk is full or fails
                    self._abandon(connection)
                else:
                    connection.execute("ROLLBACK TO step")
                    connection.execute("RELEASE step")
                raise

    def claim(self) -> None:
        """Become the writer now, for work that is of no use unless it can be committed; errors as of `writing`.

        A compaction waits for no claim, and no claim for a compaction: whoever comes second is refused.
        """
        with self.writing():
            pass

    @contextmanager
    def own_transaction(self) -> Iterator[sqlite3.Connection | None]:
        """A change of rows that commits at the end of the block, for threads whose work is nobody else's.

        Yields:
            The connection to write with; None while there is uncommitted work, which is not ours to commit.

        Raises:
            StoreLockedError, StoreReadOnlyError, StoreFullError: See `writing`.
        """
        with self._guard:
            if self._uncommitted:
                yield None
                return
            try:
                with self.writing() as connection:
                    yield connection
                self.commit()
            except BaseException:
                self.rollback()
                raise

    def vectors(self, *, changing: bool = False) -> FlatVectors:
        """The vectors that belong to the rows; only within `reading` or `writing`.

        Args:
            changing: They are about to be changed, within `writing`.

        Raises:
            CorruptRecordError: Their file is damaged, or does not belong to the rows.
        """
        return self._vectors.get(self._alive(), changing=changing, uncommitted=self._uncommitted)

    def get_meta(self, key: str) -> str | None:
        """One setting, None when it was never set."""
        with self.reading() as connection:
            row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, key: str, value: str) -> None:
        """Set one setting; it commits with the rest."""
        with self.writing() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (storable(key), storable(value)))

    def commit(self) -> None:
        """Make uncommitted work durable and visible to others, all of it at once.

        When this raises, the work is still uncommitted (commit again, or roll back), unless `pending` is false then.

        Raises:
            StoreFullError: No space; the former generation stands.
            CorruptRecordError: Rows and vectors disagree; nothing was written.
        """
        with self._guard, translated_errors(self._database, writing=True):
            connection = self._alive()
            if not self._uncommitted:
                return
            try:
                if self._vectors.changed:
                    self._vectors.save(connection)
                connection.execute("COMMIT")
            except BaseException:
                if not connection.in_transaction:
                    self._abandon(connection)
                raise
            self._uncommitted = False
            self._vectors.committed()
            self._release()

    def reclaim(self) -> None:
        """Give the space of what was deleted back to the disk; the claim of this writer, if any, is given up.

        Where the vectors have a log, a vector file is written in its place. A reader that has looked up the former
        vectors and not read them yet looks again.

        Raises:
            StoreFullError: No space for the vector file; nothing is lost.
            StoreLockedError: Another process writes.
        """
        with self._guard, translated_errors(self._database, writing=True):
            self.claim()
            connection = self._alive()
            if self._vectors.changed or self.path is None:
                raise ConfigurationError("uncommitted changes are in the way", next_step="commit them first")
            if read_state(connection).log_bytes:
                self._vectors.get(connection, changing=True, uncommitted=True)
                self._vectors.whole = True
                self.commit()
                self.claim()
            self._vectors.keep_only(read_state(connection).base)
            self._abandon(connection)
            with suppress(sqlite3.OperationalError):  # somebody writes again already; there is a next time
                free, pages = (
                    connection.execute(f"PRAGMA {n}").fetchone()[0] for n in ("freelist_count", "page_count")
                )
                if free * 4 > pages:
                    connection.execute("VACUUM")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def rollback(self) -> None:
        """Give uncommitted work up."""
        with self._guard, translated_errors(self._database, writing=True):
            connection = self._alive()
            if self._uncommitted:
                self._abandon(connection)

    def close(self) -> None:
        """Let go of all files. Uncommitted work is given up, never committed silently."""
        with self._guard:
            connection, self._connection = self._connection, None
            self._snapshots.close()
            if connection is not None:
                connection.close()  # the last: the others may not take the journal away
            self._vectors.forget()
            self._uncommitted = False
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.close()

    def _alive(self) -> sqlite3.Connection:
        if self._connection is None:
            raise ConfigurationError("this catalog is closed", got=self._database, next_step="open it again")
        return self._connection

    def _latest(self) -> sqlite3.Connection:
        """The connection; a new one where the one there is would not see what was written since."""
        connection = self._alive()
        if isinstance(connection, Connection) and not connection.lasting and not connection.in_transaction:
            self._connection, _ = connect(self._database, writing=False, busy_s=BUSY_S)
            connection.close()
        return self._alive()

    def _begin_read(self, connection: sqlite3.Connection) -> None:
        for _ in range(RELOADS):
            connection.execute("BEGIN")
            try:
                self.vectors()
                return
            except FileNotFoundError:
                # The writer went on by two generations between our look at the row and at the file.
                connection.execute("ROLLBACK")
            except BaseException:
                connection.execute("ROLLBACK")
                raise
        raise damaged("the vector file that the catalog names is not there", got=self._database)

    def _begin_write(self) -> sqlite3.Connection:
        connection = self._alive()
        if self.read_only:
            raise StoreReadOnlyError(
                "this catalog was opened for reading", got=self._database, next_step="open it with read_only=False"
            )
        if not self._uncommitted:
            if self.path is not None:
                self._lock = locked(self.path)
            self._uncommitted = True
            try:
                connection.execute("BEGIN IMMEDIATE")
                if has_tables(connection):  # they are being made otherwise
                    self.vectors()  # now: once rows change, they cannot be compared with a file any more
            except BaseException:
                self._abandon(connection)
                raise
        return connection

    def _abandon(self, connection: sqlite3.Connection) -> None:
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        finally:
            self._vectors.abandoned()
            self._uncommitted = False
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _check_dim(dim: int) -> None:
    if not 1 <= dim <= 2**20:
        raise ConfigurationError("this number of dimensions makes no sense", got=dim, expected="1 to 1048576")


def _missing(folder: Path) -> StorageNotFoundError:
    return StorageNotFoundError("no catalog lies here", got=folder, next_step="name another folder, or create one")
