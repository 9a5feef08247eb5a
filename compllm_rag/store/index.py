"""The index of a disk store: record key to location, kept by diskcache.

Rows are written through diskcache and read with SQL on a read-only connection of our own (`index_database` says why):
hundreds of keys in one statement, no write by a reader, and the same refusals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import diskcache  # type: ignore[import-untyped, unused-ignore]

from compllm_rag.store.faults import damaged_database, translated_errors
from compllm_rag.store.index_database import IndexReader, open_cache
from compllm_rag.store.index_rows import (
    RAW,
    ROW,
    TOTALS_KEY,
    ScannedRow,
    Totals,
    is_record,
    packed,
    packed_run,
    packed_totals,
    parsed,
    parsed_run,
    parsed_totals,
    run_key,
    scanned,
)
from compllm_rag.store.packs import Location, Run, corrupt_record

_SOUND = f"mode = {RAW} AND filename IS NULL AND typeof(value) = 'blob' AND length(value) = {ROW.size}"
_REMEMBERED = 2**15  # locations; some 10 MB
_KEYS_PER_QUERY = 500  # old SQLite takes 999 parameters


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
        self._database = folder / "cache.db"
        self._reader = IndexReader(self._database)
        self._cache: diskcache.Cache | None = None
        self._known: dict[str, Location] = {}
        self._version: int | None = None  # of the database when those were looked up
        if not create:
            if not self._database.exists():
                raise damaged_database(self._database, "no such file")
            self.totals()  # damage shows now, not at the first query, and before diskcache makes what it misses
        if writable:
            with translated_errors(self._database, writing=True):
                self._cache = open_cache(self._database)

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
        with translated_errors(self._database, writing=False):
            ((version,),) = self._reader.select("PRAGMA data_version")
        if version != self._version or not self._reader.is_open:
            self._known.clear()
            self._version = version

    def _looked_up(self, keys: Sequence[str]) -> dict[str, Location]:
        rows: dict[str, bytes | None] = {}
        with translated_errors(self._database, writing=False):
            for batch, marks in _batches(keys):
                # SQLite looks at what stands in the rows, since a long prompt has thousands of them.
                query = f"SELECT key, CASE WHEN {_SOUND} THEN value END FROM Cache WHERE raw = 1 AND key IN ({marks})"  # noqa: S608 - constants and question marks
                rows.update(self._reader.select(query, batch))
        values = [value for value in rows.values() if value is not None]
        if len(values) == len(rows):
            found = dict(zip(rows, map(Location._make, ROW.iter_unpack(b"".join(values))), strict=True))
            if all(location.n_concepts >= 1 for location in found.values()):
                return found
        return self._parsed(list(rows))

    def _parsed(self, keys: Sequence[str]) -> dict[str, Location]:
        """Look up locations one by one, to name the one that is damaged."""
        found = {}
        with translated_errors(self._database, writing=False):
            for batch, marks in _batches(keys):
                query = f"SELECT key, mode, filename, value FROM Cache WHERE raw = 1 AND key IN ({marks})"  # noqa: S608 - question marks
                found.update({row[0]: parsed(*row) for row in self._reader.select(query, batch)})
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
            with translated_errors(self._database, writing=False):
                rows = self._reader.select(query, (last,))
            if not rows:
                return
            for last, key, raw, mode, filename, value in rows:
                if is_record(key, raw):
                    yield scanned(last, key, raw, (mode, filename, value))

    def runs(self) -> list[Run]:
        """All runs of payloads, as they were written."""
        query = "SELECT key, mode, filename, value FROM Cache WHERE raw = 1 AND key >= 'run:' AND key < 'run;'"
        with translated_errors(self._database, writing=False):
            rows = self._reader.select(query)
        return sorted((parsed_run(*row) for row in rows), key=lambda run: (run.pack, run.start))

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """One state of all rows for a block, whatever is written meanwhile."""
        self.totals()
        with self._reader.snapshot():
            yield

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
        with translated_errors(self._database, writing=False):
            ((rows, value, runs),) = self._reader.select(
                query, (TOTALS_KEY,)
            )  # one statement, one state of the database
        totals = parsed_totals(0, None, value) if value is not None else Totals()
        found = rows - runs - (value is not None)
        if found != totals.records:
            raise damaged_database(self._database, f"{found} records where {totals.records} were written")

    def faults(self, *, deep: bool) -> list[str]:
        """What SQLite finds wrong with the file itself; empty when nothing is."""
        with translated_errors(self._database, writing=False):
            rows = self._reader.select(f"PRAGMA {'integrity' if deep else 'quick'}_check", ())
        return [str(row[0]) for row in rows if row[0] != "ok"]

    def totals(self) -> Totals:
        """Sums over all rows."""
        query = "SELECT mode, filename, value FROM Cache WHERE raw = 1 AND key = ?"
        with translated_errors(self._database, writing=False):
            rows = self._reader.select(query, (TOTALS_KEY,))
        if not rows:
            return Totals()
        return parsed_totals(*rows[0])

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
        with translated_errors(self._database, writing=True):
            try:
                with self._cache.transact():
                    for rowid in gone:  # by number: diskcache cannot name a key that it did not write
                        self._cache._sql("DELETE FROM Cache WHERE rowid = ?", (rowid,))
                    for run in gone_runs:
                        self._cache.delete(run_key(run))
                    for key, at in rows.items():
                        self._cache.set(key, packed(at))
                    for run in runs:
                        self._cache.set(run_key(run), packed_run(run))
                    self._cache.set(TOTALS_KEY, packed_totals(totals))
            except BaseException:
                self._cache.close()  # a COMMIT that failed may leave its transaction open; a new connection has none
                raise

    def shrink(self) -> None:
        """Give the space of rows that are gone back to the disk, and leave no trace of them."""
        if self._cache is not None:
            with translated_errors(self._database, writing=True):
                self._cache._sql("VACUUM")

    def close(self) -> None:
        """Close the database."""
        self._reader.close()
        if self._cache is not None:
            self._cache.close()
            self._cache = None


def _batches(keys: Sequence[str]) -> Iterator[tuple[Sequence[str], str]]:
    """Keys for one statement each, and their question marks."""
    for start in range(0, len(keys), _KEYS_PER_QUERY):
        batch = keys[start : start + _KEYS_PER_QUERY]
        yield batch, ",".join("?" * len(batch))
