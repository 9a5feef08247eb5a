"""Segment packs: append-only files of encoded concepts, in the order they were put.

A pack is a header of 64 bytes and then payloads, nothing between them, so that the segments of a chunk, put one after
the other, are one range. What lies where is the index's to know. Bytes that no index row points at (the tail of a
writer that was killed) are skipped, never cut off: new payloads go behind them. Cutting would have to trust that the
index is complete and that no reader wants the bytes; leaving them costs a little space until a compaction.
"""

from __future__ import annotations

import hashlib
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import xxhash

from compllm_rag.errors import CompLLMError, CorruptRecordError, StorageMismatchError, UnsupportedFormatError
from compllm_rag.store.faults import translated_errors

STORE_VERSION: Final = 1
HEADER_BYTES = 64
_HEADER = struct.Struct("<8sHHI16s")  # magic, format version, reserved, hidden_size, encoding
_CHECKSUM = struct.Struct("<Q")
_MAGIC = b"CLLMPACK"


class Location(NamedTuple):
    """Where one record lies.

    Attributes:
        pack: Number of the pack.
        offset: First byte of the payload, from the start of the file.
        n_concepts: Rows of the record.
        checksum: xxh3_64 of the payload, seeded by the key.
    """

    pack: int
    offset: int
    n_concepts: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Run:
    """Payloads that became durable together, one behind the other.

    Attributes:
        pack: Number of the pack.
        start: First byte, from the start of the file.
        nbytes: How many.
        sha256: Digest of these bytes, 32 of them. Reads go by the checksum of the record; this one proves whole packs.
    """

    pack: int
    start: int
    nbytes: int
    sha256: bytes


def record_checksum(key: str, payload: bytes | memoryview) -> int:
    """xxh3_64 of a payload, seeded by its key: sound bytes that belong to another key fail as well."""
    return xxhash.xxh3_64_intdigest(payload, seed=checksum_seed(key))


def checksum_seed(key: str) -> int:
    """The seed that a record key gives its checksum."""
    return int(key[:16], 16)


def pack_header(hidden_size: int, encoding: str) -> bytes:
    """The 64 bytes every pack of a store begins with."""
    fields = _HEADER.pack(_MAGIC, STORE_VERSION, 0, hidden_size, encoding.encode("ascii"))
    return (fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))).ljust(HEADER_BYTES, b"\0")


def pack_path(folder: Path, number: int) -> Path:
    """File name of a pack."""
    return folder / f"{number:06d}.pack"


class PackWriter:
    """Appends payloads to the newest pack and starts another when it is full.

    Args:
        folder: Where the packs lie.
        header: What `pack_header` gives for this store.
        pack_bytes: A pack of at least this size gets no more payloads.
        beyond: Packs up to this number get no more payloads either.
    """

    def __init__(self, folder: Path, header: bytes, pack_bytes: int, beyond: int = 0) -> None:
        self._folder, self._header, self._pack_bytes = folder, header, pack_bytes
        self._file: int | None = None
        self._end = 0
        self._runs: list[tuple[int, int, int, hashlib._Hash]] = []  # pack, start, bytes and digest, in this order
        with translated_errors(folder, writing=True):
            sizes = pack_sizes(folder)
            self._number = max(sizes, default=0)
            self.total_bytes = sum(sizes.values())
            if self._number > beyond:
                self._reopen()

    def _reopen(self) -> None:
        file = os.open(pack_path(self._folder, self._number), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        if os.pread(file, HEADER_BYTES, 0) == self._header:
            self._file, self._end = file, os.fstat(file).st_size
        else:
            os.close(file)  # half a header, left by a kill: leave that pack alone and start the next

    @property
    def number(self) -> int:
        """Number of the pack that is written to."""
        return self._number

    @property
    def full(self) -> bool:
        """Whether the next append starts another pack. Sync first: this one is closed then."""
        return self._file is None or self._end >= self._pack_bytes

    def cost(self, nbytes: int) -> int:
        """Bytes on disk that appending `nbytes` takes."""
        return nbytes + HEADER_BYTES if self.full else nbytes

    def append(self, data: bytes) -> tuple[int, int]:
        """Write one run of payloads.

        Returns:
            Number of the pack and offset of the run in it.

        Raises:
            StoreFullError: No space; nothing of the run is kept.
        """
        with translated_errors(self._folder, writing=True):
            if self.full:
                self._start_pack()
            start = self._end
            self._write(data)
            self._note(start, data)
            return self._number, start

    def _note(self, start: int, data: bytes) -> None:
        """Add to the last run, or begin another one behind bytes that no run has.

        A Ctrl-C may come anywhere in here: digest and length change in one step.
        """
        last = self._runs[-1] if self._runs else None
        if last is not None and (last[0], last[1] + last[2]) == (self._number, start):
            digest = last[3].copy()
            digest.update(data)
            self._runs[-1] = (self._number, last[1], last[2] + len(data), digest)
        else:
            self._runs.append((self._number, start, len(data), hashlib.sha256(data)))

    @property
    def runs(self) -> list[Run]:
        """What was appended by this writer, for each pack a run, or several where bytes between them are nobody's."""
        return [Run(pack, start, nbytes, digest.digest()) for pack, start, nbytes, digest in self._runs]

    def forget_runs(self) -> None:
        """Begin new runs; the former ones are in the index."""
        self._runs.clear()

    def _start_pack(self) -> None:
        self.close()
        self._number += 1
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file = os.open(pack_path(self._folder, self._number), flags, 0o600)
        self._end = 0
        try:
            self._write(self._header)
            sync_folder(self._folder)
        except OSError:
            self.close()  # the next append tries the next number
            raise

    def _write(self, data: bytes) -> None:
        if self._file is None:
            return
        view, written = memoryview(data), 0
        try:
            while written < len(view):
                written += os.pwrite(self._file, view[written:], self._end + written)
        except OSError:
            # Ours and unpublished, so giving the space back takes nothing from anybody.
            os.ftruncate(self._file, self._end)
            raise
        self._end += written
        self.total_bytes += written

    def sync(self) -> None:
        """Make what was appended durable.

        Raises:
            StoreFullError: No space. The caller must forget what it appended since the last sync: after a failed
                fsync the kernel may call lost pages clean, so that a second try would succeed and prove nothing.
        """
        if self._file is not None:
            with translated_errors(self._folder, writing=True):
                os.fsync(self._file)

    def close(self) -> None:
        """Close the pack; the next append starts another."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def pack_sizes(folder: Path) -> dict[int, int]:
    """Bytes of every pack, by number."""
    sizes = {}
    for path in folder.glob("*.pack"):
        if path.stem.isdigit():
            with suppress(FileNotFoundError):  # a compaction has taken it away
                sizes[int(path.stem)] = path.stat().st_size
    return sizes


def wrong_header(found: bytes, path: Path, key: str) -> CompLLMError:
    """The error for a pack whose header is not the one its store expects."""
    fields = found[: _HEADER.size]
    if len(found) < HEADER_BYTES or found[_HEADER.size :][:8] != _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields)):
        return corrupt_record(key, f"a damaged header in {path}")
    magic, version, _, hidden_size, encoding = _HEADER.unpack(fields)
    if magic != _MAGIC or version != STORE_VERSION:
        return UnsupportedFormatError(
            "a pack has a format this release does not read",
            got=f"version {version} in {path}",
            expected=f"version {STORE_VERSION}",
            next_step="upgrade compllm-rag",
        )
    return StorageMismatchError(
        "a pack belongs to another store",
        got=f"hidden_size {hidden_size}, encoding {encoding.rstrip(bytes(1))!r} in {path}",
        next_step="restore the folder from a copy",
    )


def corrupt_record(key: str, got: str) -> CorruptRecordError:
    """The error for a record that cannot be trusted."""
    return CorruptRecordError(
        f"record {key} is damaged",
        got=got,
        next_step="run `compllm-rag repair`, which makes it again from the text",
    )


def sync_folder(folder: Path) -> None:
    """Make new names in a folder durable."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
