"""The index of a disk store: record key to location, kept by diskcache.

diskcache's defaults lose data and run code: it evicts silently at 1 GiB, syncs lazily, and loads pickles on reading.
So rows are written through it with eviction off and full syncing, str keys and bytes values only, and a `Disk` that
refuses pickles and value files both ways. Rows are read with SQL on a read-only connection of our own: hundreds of
keys in one statement, no write by a reader (diskcache writes its settings whenever it opens), and the same refusals.
"""

from __future__ import annotations

import os
import re
import sqlite3
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import diskcache  # type: ignore[import-untyped, unused-ignore]

from compllm_rag.errors import CompLLMError, ConfigurationError, CorruptRecordError, UnsupportedFormatError
from compllm_rag.store.faults import damaged_index, explained
from compllm_rag.store.packs import Location, Run, corrupt_record

_ROW = struct.Struct("<IQIQ")  # pack, offset, n_concepts, checksum
_TOTALS = struct.Struct("<QQQ")  # records, concepts, payload bytes
_RUN = struct.Struct("<Q32s")  # bytes, SHA-256
_TOTALS_KEY = "totals"  # no record key: those are 64 characters
_RUN_KEY = re.compile(r"run:(\d{1,9}):(\d{1,18})")  # pack and start
_RAW = 0  # diskcache's mode for a value that lies in the row itself
_SOUND = f"mode = {_RAW} AND filename IS NULL AND typeof(value) = 'blob' AND length(value) = {_ROW.size}"
_REMEMBERED = 2**15  # locations; some 10 MB
_KEYS_PER_QUERY = 500  # old SQLite takes 999 parameters
_SETTINGS = {
    "eviction_policy": "none",
    "cull_limit": 0,
    "statistics": 0,
    "tag_index": 0,
    "sqlite_auto_vacuum": 0,
    "sqlite_cache_size": 2**13,
    "sqlite_journal_mode": "wal",
    "sqlite_mmap_size": 0,  # a shortened, mapped database would end the process
    "sqlite_synchronous": 2,
    "disk_min_file_size": 2**15,
}


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the records of an index."""

    records: int = 0
    concepts: int = 0
    payload_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ScannedRow:
    """One row of an index, whatever state it is in.

    Attributes:
        rowid: Its number, in the order of writing.
        key: The record key, or what stands in its place.
        location: Where the record lies; None when the row is damaged.
        trouble: What is wrong with it, None when nothing is.
    """

    rowid: int
    key: str
    location: Location | None
    trouble: CompLLMError | None = None


class PlainDisk(diskcache.Disk):  # type: ignore[misc, unused-ignore]
    """Takes str keys and small bytes values, and never loads or writes a pickle or a value file."""

    def put(self, key: object) -> tuple[str, bool]:
        """Pass a str key on."""
        if type(key) is not str:
            raise UnsupportedFormatError("index keys are texts", got=f"a {type(key).__name__}", expected="str")
        return key, True

    def get(self, key: object, raw: object) -> str:
        """Give a str key back."""
        if not raw or type(key) is not str:
            raise _planted(repr(key)[:80], f"a key of type {type(key).__name__}, raw {raw}")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, bytes]:
        """Pass a bytes value on."""
        if type(value) is not bytes or read or len(value) >= self.min_file_size:
            raise UnsupportedFormatError("index values are short bytes", got=f"a {type(value).__name__}")
        return 0, _RAW, None, value

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> bytes:
        """Give a bytes value back."""
        if mode != _RAW or type(value) is not bytes or filename is not None:
            raise _planted("of the index", f"a value of mode {mode}, type {type(value).__name__}, file {filename}")
        return value


def make_private(database: Path) -> None:
    """Make an SQLite file before SQLite does, with the mode that its journals will inherit; one that is there stays.

    It must not be opened and closed: that would drop the locks of every connection this process has to it, another
    process would take itself for the last one and remove the journal, and what is written into it then is lost.

    Raises:
        CorruptRecordError: A link lies in its place.
    """
    try:
        os.close(os.open(database, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        if database.is_symlink():
            raise damaged_index(database, "a link to another file") from None


def _planted(key: str, got: str) -> CorruptRecordError:
    return CorruptRecordError(
        f"a row this package does not write is in the index: {key}",
        got=got,
        expected="plain bytes",
        next_step="find out who writes to this folder; nothing of the row was loaded",
    )


class LocationIndex:
    """Locations by record key. Not safe between threads by itself.

    Args:
        folder: Where the database lies; see `create`.
        writable: Whether `add` will be called. The caller holds the writer lock then.
        create: Whether the database may be missing; else that is damage, and not an empty index.

    Raises:
        CorruptRecordError: The database is damaged or gone.
    """

    def __init__(self, folder: Path, *, writable: bool, create: bool = False) -> None:
        self._folder, self._database = folder, folder / "cache.db"
        self._reader: sqlite3.Connection | None = None
        self._lasting = True
        self._cache: diskcache.Cache | None = None
        self._known: dict[str, Location] = {}
        self._version: int | None = None  # of the database when those were looked up
        if not create:
            if not self._database.exists():
                raise damaged_index(self._database, "no such file")
            self.totals()  # damage shows now, not at the first query, and before diskcache makes what it misses
        if writable:
            with explained(self._database, writing=True):
                self._cache = self._open_cache()

    def _open_cache(self) -> diskcache.Cache:
        if os.path.expandvars(self._folder) != str(self._folder):
            raise ConfigurationError(
                "diskcache would replace a variable in the path of the store",
                got=self._folder,
                expected="a path without the names of environment variables",
            )
        make_private(self._database)
        return diskcache.Cache(str(self._folder), disk=PlainDisk, **_SETTINGS)

    def find(self, keys: Sequence[str]) -> list[Location | None]:
        """Look up locations, in the order asked; None for a key that is not there.

        What was found stays in memory until anybody writes, since the chunks that are asked for are often the same.

        Raises:
            CorruptRecordError: A row is damaged, or holds a pickle; it is not loaded.
        """
        self._forget_former()
        found = [self._known.get(key) for key in keys]
        if None in found:
            fresh = self._looked_up([key for key, location in zip(keys, found, strict=True) if location is None])
            found = [location or fresh.get(key) for key, location in zip(keys, found, strict=True)]
            if len(self._known) + len(fresh) > _REMEMBERED:
                self._known.clear()
            if len(fresh) <= _REMEMBERED:
                self._known.update(fresh)
        return found

    def _forget_former(self) -> None:
        """Forget locations if anything was written since they were looked up."""
        with explained(self._database, writing=False):
            ((version,),) = self._select("PRAGMA data_version", ())
        if version != self._version or self._reader is None:
            self._known.clear()
            self._version = version

    def _looked_up(self, keys: Sequence[str]) -> dict[str, Location]:
        rows: dict[str, bytes | None] = {}
        with explained(self._database, writing=False):
            for batch, marks in _batches(keys):
                # SQLite looks at what stands in the rows, since a long prompt has thousands of them.
                query = f"SELECT key, CASE WHEN {_SOUND} THEN value END FROM Cache WHERE raw = 1 AND key IN ({marks})"  # noqa: S608 - constants and question marks
                rows.update(self._select(query, batch))
        values = [value for value in rows.values() if value is not None]
        if len(values) == len(rows):
            found = dict(zip(rows, map(Location._make, _ROW.iter_unpack(b"".join(values))), strict=True))
            if all(location.n_concepts >= 1 for location in found.values()):
                return found
        return self._parsed(list(rows))

    def _parsed(self, keys: Sequence[str]) -> dict[str, Location]:
        """Look up locations one by one, to name the one that is damaged."""
        found = {}
        with explained(self._database, writing=False):
            for batch, marks in _batches(keys):
                query = f"SELECT key, mode, filename, value FROM Cache WHERE raw = 1 AND key IN ({marks})"  # noqa: S608 - question marks
                found.update({row[0]: _parse(*row) for row in self._select(query, batch)})
        return found

    def items(self) -> Iterator[tuple[str, Location]]:
        """Go through all rows in the order they were written, a page at a time.

        Raises:
            CorruptRecordError: A row is damaged, or holds a pickle; it is not loaded.
        """
        for row in self.scan():
            if row.location is None:
                raise row.trouble or corrupt_record(row.key, "a damaged index row")
            yield row.key, row.location

    def scan(self) -> Iterator[ScannedRow]:
        """Go through all rows of records in the order they were written, damaged ones included."""
        last = 0
        query = "SELECT rowid, key, raw, mode, filename, value FROM Cache WHERE rowid > ? ORDER BY rowid LIMIT 1000"
        while True:
            with explained(self._database, writing=False):
                rows = self._select(query, (last,))
            if not rows:
                return
            for last, key, raw, mode, filename, value in rows:
                if raw == 1 and isinstance(key, str) and (key == _TOTALS_KEY or _RUN_KEY.fullmatch(key)):
                    continue
                yield _scanned(last, key, raw, (mode, filename, value))

    def runs(self) -> list[Run]:
        """All runs of payloads, as they were written."""
        query = "SELECT key, mode, filename, value FROM Cache WHERE raw = 1 AND key >= 'run:' AND key < 'run;'"
        with explained(self._database, writing=False):
            rows = self._select(query, ())
        found = []
        for key, mode, filename, value in rows:
            name = _RUN_KEY.fullmatch(key)
            if name is None or mode != _RAW or filename is not None or type(value) is not bytes:
                raise _planted(repr(key)[:80], f"a value of mode {mode}, type {type(value).__name__}")
            if len(value) != _RUN.size:
                raise damaged_index(self._database, f"a run of {len(value)} bytes")
            found.append(Run(int(name[1]), int(name[2]), *_RUN.unpack(value)))
        return sorted(found, key=lambda run: (run.pack, run.start))

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """One state of all rows for a block, whatever is written meanwhile."""
        self.totals()
        reader = self._reader
        if reader is None:  # on a medium that nobody can write
            yield
            return
        reader.execute("BEGIN")
        try:
            yield
        finally:
            reader.execute("ROLLBACK")

    def check_count(self) -> None:
        """Compare the rows there are with the totals, at the cost of one row.

        Raises:
            CorruptRecordError: They disagree; somebody took rows away, or put some in.
        """
        query = (
            "SELECT (SELECT value FROM Settings WHERE key = 'count'),"
            " (SELECT value FROM Cache WHERE raw = 1 AND key = ?),"
            " (SELECT COUNT(*) FROM Cache WHERE raw = 1 AND key >= 'run:' AND key < 'run;')"
        )
        with explained(self._database, writing=False):
            ((rows, value, runs),) = self._select(query, (_TOTALS_KEY,))  # one statement, one state of the database
        totals = self._parse_totals(0, None, value) if value is not None else Totals()
        found = rows - runs - (value is not None)
        if found != totals.records:
            raise damaged_index(self._database, f"{found} records where {totals.records} were written")

    def faults(self, *, deep: bool) -> list[str]:
        """What SQLite finds wrong with the file itself; empty when nothing is."""
        with explained(self._database, writing=False):
            rows = self._select(f"PRAGMA {'integrity' if deep else 'quick'}_check", ())
        return [str(row[0]) for row in rows if row[0] != "ok"]

    def totals(self) -> Totals:
        """Sums over all rows."""
        query = "SELECT mode, filename, value FROM Cache WHERE raw = 1 AND key = ?"
        with explained(self._database, writing=False):
            rows = self._select(query, (_TOTALS_KEY,))
        if not rows:
            return Totals()
        return self._parse_totals(*rows[0])

    @staticmethod
    def _parse_totals(mode: object, filename: object, value: object) -> Totals:
        if mode != _RAW or filename is not None or type(value) is not bytes or len(value) != _TOTALS.size:
            raise _planted(_TOTALS_KEY, f"a value of mode {mode}, type {type(value).__name__}")
        return Totals(*_TOTALS.unpack(value))

    def add(
        self,
        rows: Mapping[str, Location],
        totals: Totals,
        runs: Sequence[Run] = (),
        *,
        gone: Sequence[int] = (),
        gone_runs: Sequence[Run] = (),
    ) -> None:
        """Write rows and the new totals in one transaction, durable on return.

        Args:
            rows: Locations by record key; a key that is there already moves.
            totals: Sums over all rows from now on.
            runs: The runs of payloads that the rows point into.
            gone: Numbers of rows to take away.
            gone_runs: Runs to take away.

        Raises:
            StoreFullError: No space; no row was written.
        """
        if self._cache is None:
            return
        with explained(self._database, writing=True):
            try:
                with self._cache.transact():
                    for rowid in gone:  # by number: diskcache cannot name a key that it did not write
                        self._cache._sql("DELETE FROM Cache WHERE rowid = ?", (rowid,))
                    for run in gone_runs:
                        self._cache.delete(_run_key(run))
                    for key, at in rows.items():
                        self._cache.set(key, _ROW.pack(at.pack, at.offset, at.n_concepts, at.checksum))
                    for run in runs:
                        self._cache.set(_run_key(run), _RUN.pack(run.nbytes, run.sha256))
                    self._cache.set(_TOTALS_KEY, _TOTALS.pack(totals.records, totals.concepts, totals.payload_bytes))
            except BaseException:
                self._cache.close()  # a COMMIT that failed may leave its transaction open; a new connection has none
                raise

    def shrink(self) -> None:
        """Give the space of rows that are gone back to the disk, and leave no trace of them."""
        if self._cache is not None:
            with explained(self._database, writing=True):
                self._cache._sql("VACUUM")

    def close(self) -> None:
        """Close the database."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def _select(self, query: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
        if self._reader is None:
            self._reader, self._lasting = self._connect()
        rows = self._reader.execute(query, values).fetchall()
        if not self._lasting:
            self._reader.close()
            self._reader = None
        return rows

    def _connect(self) -> tuple[sqlite3.Connection, bool]:
        """A read-only connection, and whether it will see what is written after it."""
        address = f"file:{quote(str(self._database))}?mode=ro"
        reader = sqlite3.connect(address, uri=True, timeout=60, check_same_thread=False, isolation_level=None)
        try:
            for pragma in ("query_only = 1", "trusted_schema = 0", "cell_size_check = 1", "mmap_size = 0"):
                reader.execute(f"PRAGMA {pragma}")
            reader.execute("SELECT COUNT(*) FROM Settings")
        except sqlite3.OperationalError as error:
            reader.close()
            journal = self._database.with_name(self._database.name + "-wal")
            no_journal = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
            if not no_journal or journal.exists():
                raise
            # On a read-only medium SQLite cannot make its journal. There is none, so all data is in the database; a
            # writer may still come along elsewhere, so such a connection serves one statement only.
            address += "&immutable=1"
            return sqlite3.connect(address, uri=True, check_same_thread=False, isolation_level=None), False
        except BaseException:
            reader.close()
            raise
        return reader, True


def _scanned(rowid: int, key: object, raw: object, held: tuple[object, object, object]) -> ScannedRow:
    if raw != 1 or type(key) is not str:
        name = repr(key)[:80]
        return ScannedRow(rowid, name, None, _planted(name, f"a key of type {type(key).__name__}, raw {raw}"))
    try:
        return ScannedRow(rowid, key, _parse(key, *held))
    except CompLLMError as error:
        return ScannedRow(rowid, key, None, error)


def _run_key(run: Run) -> str:
    return f"run:{run.pack}:{run.start}"


def _batches(keys: Sequence[str]) -> Iterator[tuple[Sequence[str], str]]:
    """Keys for one statement each, and their question marks."""
    for start in range(0, len(keys), _KEYS_PER_QUERY):
        batch = keys[start : start + _KEYS_PER_QUERY]
        yield batch, ",".join("?" * len(batch))


def _parse(key: str, mode: object, filename: object, value: object) -> Location:
    if mode != _RAW or filename is not None or type(value) is not bytes:
        raise _planted(key, f"a value of mode {mode}, type {type(value).__name__}, file {filename}")
    if len(value) != _ROW.size:
        raise corrupt_record(key, f"an index row of {len(value)} bytes instead of {_ROW.size}")
    location = Location._make(_ROW.unpack(value))
    if location.n_concepts < 1:
        raise corrupt_record(key, "an index row that says it has no concepts")
    return location
