"""The writing half of a disk store: what was put and not flushed yet, the pack it goes to, and the lock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from compllm_rag.errors import CompLLMError, StoreFullError
from compllm_rag.metrics import Traffic
from compllm_rag.store.index import LocationIndex
from compllm_rag.store.index_rows import Totals
from compllm_rag.store.lock import WriterLock
from compllm_rag.store.packs import Location, PackWriter, record_checksum

LOCK_NAME = "writer.lock"
_FLUSH_BYTES = 64 * 2**20
_FLUSH_RECORDS = 20_000


class StoreWriter:
    """Appends payloads, and commits their index rows. Not safe between threads by itself.

    The lock is held only while there is something to flush, so that one process may hold a storage open twice, and a
    server forever.

    Args:
        path: Folder of the store.
        index: Open for writing.
        header: That packs begin with.
        traffic: Where bytes are counted.
        pack_bytes: A pack of at least this size gets no more payloads.
        max_bytes: Most bytes all packs together may take; None for no limit.
    """

    def __init__(
        self,
        path: Path,
        index: LocationIndex,
        header: bytes,
        traffic: Traffic,
        *,
        pack_bytes: int,
        max_bytes: int | None,
    ) -> None:
        self._path, self._index, self._header, self._traffic = path, index, header, traffic
        self._pack_bytes, self._max_bytes = pack_bytes, max_bytes
        self._pending: dict[str, Location] = {}
        self._pending_bytes = self._beyond = 0
        self._lock: WriterLock | None = None
        self._writer: PackWriter | None = None

    def find(self, keys: Sequence[str]) -> list[Location | None]:
        """Where records lie, flushed or not; None for those that are not there."""
        if not self._pending:
            return self._index.find(keys)
        ours = [self._pending.get(key) for key in keys]
        flushed = iter(self._index.find([key for key, at in zip(keys, ours, strict=True) if at is None]))
        return [next(flushed) if at is None else at for at in ours]

    def totals(self) -> Totals:
        """Sums over all records, flushed or not."""
        totals = self._index.totals()
        concepts = sum(location.n_concepts for location in self._pending.values())
        return Totals(
            totals.records + len(self._pending),
            totals.concepts + concepts,
            totals.payload_bytes + self._pending_bytes,
        )

    def acquire(self) -> PackWriter:
        """The pack to append to, with the lock held; found where the last writer, whoever it was, left off.

        Raises:
            StoreLockedError: Another process writes.
        """
        if self._writer is None:
            self._lock = WriterLock(self._path / LOCK_NAME)
            try:
                self._writer = PackWriter(self._path / "packs", self._header, self._pack_bytes, self._beyond)
            except BaseException:
                self.release()
                raise
        return self._writer

    def append(self, batch: Mapping[str, tuple[int, bytes]]) -> int:
        """Put records (number of concepts, payload) by key, and flush when much is waiting.

        Returns:
            How many were not there before.

        Raises:
            StoreFullError: No room for all of them; the first ones were put.
            StoreLockedError: Another process writes.
        """
        try:
            return self._append(batch)
        except BaseException:
            if not self._pending:  # nothing to flush: whoever makes room, by a compaction, needs the lock
                self.release()
            raise

    def _append(self, batch: Mapping[str, tuple[int, bytes]]) -> int:
        writer = self.acquire()
        if writer.full and self._pending:
            self.flush()
            writer = self.acquire()
        known = self.find(list(batch))
        fresh = {key: record for (key, record), at in zip(batch.items(), known, strict=True) if at is None}
        if not fresh:
            if not self._pending:
                self.release()
            return 0
        taken = self._within_limit(writer, fresh)
        if taken:
            run = b"".join(fresh[key][1] for key in taken)
            pack, offset = writer.append(run)
            for key in taken:
                n_concepts, payload = fresh[key]
                self._pending[key] = Location(pack, offset, n_concepts, record_checksum(key, payload))
                offset += len(payload)
            self._pending_bytes += len(run)
            self._traffic.bytes_written += len(run)
        if len(taken) < len(fresh):
            raise StoreFullError(
                "the concept store has reached its size limit; nothing was evicted",
                got=f"packs of {writer.total_bytes} bytes",
                expected=f"at most {self._max_bytes} bytes (max_bytes)",
                next_step="raise max_bytes, or remove documents",
            )
        if self._pending_bytes >= _FLUSH_BYTES or len(self._pending) >= _FLUSH_RECORDS:
            self.flush()
        return len(taken)

    def _within_limit(self, writer: PackWriter, fresh: Mapping[str, tuple[int, bytes]]) -> list[str]:
        """The first records of `fresh` for which there is room."""
        if self._max_bytes is None:
            return list(fresh)
        taken, size = [], 0
        for key, (_, payload) in fresh.items():
            size += len(payload)
            if writer.total_bytes + writer.cost(size) > self._max_bytes:
                break
            taken.append(key)
        return taken

    def flush(self) -> None:
        """Make everything put so far durable, and visible to readers; the lock is free then."""
        if self._writer is None:
            return
        if self._pending:
            try:
                self._writer.sync()
            except OSError:
                # What a failed fsync leaves on the disk nobody knows; it must not be tried again, nor built upon.
                self._beyond = self._writer.number
                self._forget_pending()
                raise
            try:
                self._index.add(self._pending, self.totals(), self._writer.runs)
            except BaseException:
                self._forget_committed()
                raise
        self._forget_pending()

    def _forget_committed(self) -> None:
        """Let go of what a transaction that ended in an error has written all the same.

        A Ctrl-C may have come behind its COMMIT, and what is in the index must not be counted to its sums once more.
        """
        with suppress(CompLLMError, OSError):
            if all(self._index.find(list(self._pending))):
                self._forget_pending()

    def _forget_pending(self) -> None:
        self._pending.clear()
        self._pending_bytes = 0
        self.release()

    def release(self) -> None:
        """Close the pack and let the next writer in; what is not flushed stays unflushed."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None
