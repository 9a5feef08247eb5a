"""The durable store: payloads in segment packs, their places in an index, one writer and any number of readers.

```
<path>/store.json      what the store holds and how (format version, hidden_size, encoding), written last on creation
<path>/packs/*.pack    payloads, append-only
<path>/index/          key -> place, a diskcache database
<path>/writer.lock     who has something to flush
```

A record exists once its index row does, and rows are written only after the payloads they point at are on the disk.
So a crash loses at most what was put since the last flush, and never leaves a row that points at nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compllm_rag.errors import (
    ConfigurationError,
    CorruptRecordError,
    StoreLockedError,
    StoreReadOnlyError,
)
from compllm_rag.store.base import StoreStats, check_hidden_size, check_keys, encode_record
from compllm_rag.store.durable import DurableStore
from compllm_rag.store.encodings import FP16, encoding_named
from compllm_rag.store.faults import translated_errors
from compllm_rag.store.index import LocationIndex
from compllm_rag.store.index_rows import Totals
from compllm_rag.store.lock import WriterLock
from compllm_rag.store.manifest import MANIFEST_NAME, StoreManifest, prepare_folder
from compllm_rag.store.packs import (
    Location,
    PackWriter,
    pack_header,
    sync_folder,
)
from compllm_rag.store.reading import PackReader, Progress, RecordReader, StoreParts
from compllm_rag.store.writing import LOCK_NAME, StoreWriter

if TYPE_CHECKING:
    from compllm_rag.store.compaction import CompactReport
    from compllm_rag.store.verification import StoreCheck

PACK_BYTES = 256 * 2**20
_RECORDS_PER_WRITE = 256


class DiskStore(DurableStore):
    """Concepts in a folder.

    Args:
        path: The folder; made when missing, unless `read_only`.
        hidden_size: Width of every concept; an existing store must have been made with the same.
        read_only: Take no lock and write nothing. A reader sees what the writer flushes after it opened.
        max_bytes: Most bytes all packs together may take; None for no limit. Nothing is ever evicted.
        pack_bytes: A pack of at least this size gets no more payloads.
        encoding: `fp16`, `int8` or `int4`, or for deep concepts what `deep_encoding` makes of these; an existing store
            must have been made with the same. None takes the store's own, and fp16 for a new one.
        counted: Refuse an index that holds more or fewer records than were written; repair does not.

    Raises:
        ConfigurationError: An argument makes no sense.
        StorageNotFoundError: `read_only`, and there is no store.
        StorageMismatchError: The store has another hidden_size or encoding, or the folder holds something else.
        UnsupportedFormatError: The store was written by another format version.
        CorruptRecordError: The manifest or the index is damaged.
        StoreLockedError: Another process is making the store at this moment.
        StoreReadOnlyError: The folder cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        hidden_size: int,
        read_only: bool = False,
        max_bytes: int | None = None,
        pack_bytes: int = PACK_BYTES,
        encoding: str | None = None,
        counted: bool = True,
    ) -> None:
        super().__init__()
        self.hidden_size = check_hidden_size(hidden_size)
        for name, value in (("max_bytes", max_bytes), ("pack_bytes", pack_bytes)):
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} makes no sense", got=value, expected="at least 1")
        if encoding is not None:
            encoding_named(encoding)  # before anything is made
        self.path, self.read_only = Path(path).absolute(), read_only
        self._guard = threading.RLock()
        self._hits = self._misses = 0
        self._closed = False
        lock: WriterLock | None = None
        if not read_only:
            prepare_folder(self.path)
            # Held while the store is made, and to find out now whether the folder can be written.
            try:
                lock = WriterLock(self.path / LOCK_NAME)
            except StoreLockedError:
                if not (self.path / MANIFEST_NAME).exists():
                    raise
        try:
            self._open(encoding, pack_bytes, max_bytes, counted=counted)
        finally:
            if lock is not None:
                lock.release()

    def _open(self, encoding: str | None, pack_bytes: int, max_bytes: int | None, *, counted: bool) -> None:
        new = not self.read_only and not (self.path / MANIFEST_NAME).exists()
        if new:
            chosen = FP16 if encoding is None else encoding_named(encoding)
            manifest = StoreManifest(hidden_size=self.hidden_size, encoding=chosen.tag)
            with translated_errors(self.path, writing=True):
                for name in ("packs", "index"):
                    (self.path / name).mkdir(mode=0o700, exist_ok=True)
        else:
            manifest = StoreManifest.load(self.path, hidden_size=self.hidden_size, encoding=encoding)
        self.encoding = manifest.codec
        self._header = pack_header(self.hidden_size, manifest.encoding)
        self._packs = PackReader(self.path / "packs", self._header)
        self._index = LocationIndex(self.path / "index", writable=not self.read_only, create=new)
        try:
            if counted:
                self._index.check_count()
            if new:
                with translated_errors(self.path, writing=True):
                    sync_folder(self.path / "index")
                    manifest.save(self.path)
        except BaseException:
            self._index.close()
            raise
        self._records = RecordReader(self._packs, self.encoding, self.hidden_size, self.traffic)
        self._writer = StoreWriter(
            self.path, self._index, self._header, self.traffic, pack_bytes=pack_bytes, max_bytes=max_bytes
        )

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """Tell which records are stored; see `ConceptStore.contains`."""
        with self._guard:
            return [location is not None for location in self._locate(keys, count=False)]

    def put(self, records: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Store concepts (n_concepts, hidden_size) by key; see `ConceptStore.put`.

        They can be read by this instance at once, and are durable and visible to others after `flush`.
        """
        self._require_writable()
        stream, written = iter(records), 0
        while True:
            batch: dict[str, tuple[int, bytes]] = {}
            try:
                # Not under the lock: what makes the records may be slow, or itself read from this store.
                for key, concepts in islice(stream, _RECORDS_PER_WRITE):
                    payload = encode_record(key, concepts, self.hidden_size, self.encoding)
                    batch.setdefault(key, (concepts.shape[0], payload))
            finally:
                written += self._append(batch)
            if not batch:
                return written

    def _append(self, batch: dict[str, tuple[int, bytes]]) -> int:
        if not batch:
            return 0
        with self._guard:
            self._require_writable()
            return self._writer.append(batch)

    def merge(self, other: DiskStore) -> int:
        """Take over the records of another store, byte for byte and in its order; those that are here already stay.

        Args:
            other: Open, with nothing left to flush; of the same width and encoding.

        Returns:
            How many records are new.

        Raises:
            CorruptRecordError: A record of the other store is damaged; those before it were taken over.
            StorageMismatchError: The other store is of another width or encoding.
            StoreFullError, StoreLockedError, StoreReadOnlyError: See `put`.
        """
        from compllm_rag.store.merging import check_same_format, encoded_records

        check_same_format(other._parts(), self._header)
        return sum(map(self._append, encoded_records(other._parts())))

    def get(self, keys: Sequence[str]) -> list[torch.Tensor | None]:
        """Read records, each (n_concepts, hidden_size) fp16; see `ConceptStore.get`."""
        with self._guard:
            locations, joined = self._read_present(keys)
        result: list[torch.Tensor | None] = [None] * len(keys)
        start = 0
        for index, location in enumerate(locations):
            if location is not None:
                # A copy, else one small record kept would keep all of them in memory.
                result[index] = joined[start : start + location.n_concepts].clone()
                start += location.n_concepts
        return result

    def get_joined(self, keys: Sequence[str]) -> torch.Tensor | None:
        """Read records as one tensor (sum of n_concepts, hidden_size) fp16; see `ConceptStore.get_joined`."""
        with self._guard:
            locations, joined = self._read_present(keys, partly=False)
            return None if None in locations else joined

    def flush(self) -> None:
        """Make everything put so far durable, and visible to readers; see `ConceptStore.flush`."""
        with self._guard:
            self._require_open()
            self._writer.flush()

    def stats(self) -> StoreStats:
        """Count what is stored and what was asked for."""
        with self._guard:
            self._require_open()
            totals = self._writer.totals()
            sums = (totals.records, totals.concepts, totals.payload_bytes)
            return StoreStats(*sums, self._hits, self._misses, self.encoding.name)

    def iter_records(self) -> Iterator[tuple[str, Location]]:
        """Go through all flushed records in the order they were put, without reading their payloads.

        Yields:
            Record key and where its payload lies.

        Raises:
            CorruptRecordError: An index row is damaged, or was not written by this package.
        """
        pages = self._index.items()
        while True:
            with self._guard:
                self._require_open()
                row = next(pages, None)
            if row is None:
                return
            yield row

    def check(self, key: str) -> bool:
        """Prove that a record can be read, without counting a hit or a miss.

        Returns:
            False when there is no such record.

        Raises:
            ConfigurationError: The key is not 64 hexadecimal characters.
            CorruptRecordError: The record fails its checksum or its bounds.
            InvalidConceptsError: The record holds NaN or infinite values.
        """
        with self._guard:
            return self._read_present([key], count=False)[0] != [None]

    def verify(self, *, deep: bool = False, progress: Progress | None = None) -> StoreCheck:
        """Look for damage: rows, bounds, headers and sums; `deep` reads every payload and proves all its digests."""
        from compllm_rag.store.verification import check_store

        with self._guard:
            self._require_open()
            return check_store(self._parts(), deep=deep, progress=progress)

    def remove(self, rowids: Sequence[int], totals: Totals) -> None:
        """Take index rows away, by their numbers in a `StoreCheck`; payloads stay until a compaction.

        Raises:
            StoreLockedError: Another process writes.
            StoreReadOnlyError: The store was opened for reading.
        """
        with self._alone():
            self._index.add({}, totals, gone=rowids)

    def discard(self, check: StoreCheck) -> None:
        """Take damaged records away, and their bytes; see `DurableStore.discard`."""
        self.remove(check.damaged_rows, check.sound)
        self.compact()

    def compact(
        self, live: Callable[[Sequence[str]], Sequence[bool]] | None = None, *, progress: Progress | None = None
    ) -> CompactReport:
        """Write packs that hold dead bytes anew, without them; see `compaction.compact_packs`.

        Args:
            live: Tells for record keys whether anything still refers to them; None keeps all records.
            progress: Called with a message and a share from 0 to 1.

        Raises:
            CorruptRecordError: A record is damaged. Repair the storage first.
            StoreFullError: No space for the new packs; the old ones stand.
            StoreLockedError: Another process writes.
            StoreReadOnlyError: The store was opened for reading.
        """
        from compllm_rag.store.compaction import compact_packs

        with self._alone() as writer:
            return compact_packs(self._parts(), writer, live, progress)

    def _parts(self) -> StoreParts:
        return StoreParts(self.path / "packs", self._header, self._index, self._packs, self.encoding, self.hidden_size)

    @contextmanager
    def _alone(self) -> Iterator[PackWriter]:
        """The writer's lock for a block, with nothing left to flush."""
        with self._guard:
            self._require_writable()
            self.flush()
            try:
                yield self._writer.acquire()
            finally:
                self._writer.release()
                self._packs.close()

    def close(self) -> None:
        """Flush and release everything held. Closing twice is harmless."""
        with self._guard:
            if self._closed:
                return
            try:
                self.flush()
            finally:
                self._closed = True
                self._packs.close()
                try:
                    self._index.close()
                finally:
                    self._writer.release()

    def _locate(self, keys: Sequence[str], *, count: bool = True) -> list[Location | None]:
        check_keys(keys)
        self._require_open()
        locations = self._writer.find(keys)
        if count:
            misses = locations.count(None)
            self._misses += misses
            self._hits += len(locations) - misses
        return locations

    def _read_present(
        self, keys: Sequence[str], *, partly: bool = True, count: bool = True
    ) -> tuple[list[Location | None], torch.Tensor]:
        """Where each of `keys` lies, None for a miss, and the concepts of those that are there, joined.

        Args:
            keys: Record keys.
            partly: Whether to read anything when one is missing.
            count: Whether these are hits and misses.
        """
        tried: list[Location | None] | None = None
        while True:
            locations = self._locate(keys, count=count and tried is None)
            there = [location for location in locations if location is not None]
            wanted = keys
            if len(there) < len(keys):
                wanted = [key for key, location in zip(keys, locations, strict=True) if location is not None]
                if not partly:
                    there, wanted = [], []
            try:
                return locations, self._records.read(wanted, there)
            except CorruptRecordError:
                # A compaction may have moved the record since we looked it up, and taken its pack away.
                if tried == locations:
                    raise
                tried = locations
                self._packs.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigurationError("the concept store is closed", got=self.path, next_step="open it again")

    def _require_writable(self) -> None:
        self._require_open()
        if self.read_only:
            raise StoreReadOnlyError(
                "the concept store was opened for reading", got=self.path, next_step="open it without read_only"
            )
