"""Reading of segment packs: bounds first, then bytes, then checksums."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from compllm_rag.errors import InvalidConceptsError
from compllm_rag.metrics import Traffic
from compllm_rag.store.codec import Encoding
from compllm_rag.store.faults import translated_errors
from compllm_rag.store.index import LocationIndex
from compllm_rag.store.packs import (
    HEADER_BYTES,
    Location,
    checksum_seed,
    corrupt_record,
    pack_path,
    wrong_header,
)

_OPEN_FILES = 128  # 1024 file descriptors are a common limit
# Bytes read before their checksums are taken: they are in the processor's cache still. Several threads would gain a
# little on an idle machine, and lose more than that on a busy one.
_PIECE = 2**20
_LINE = 64  # bytes


class _Piece(NamedTuple):
    """Records that lie one behind the other and are read at once.

    Attributes:
        first: Number of the first among those asked for.
        end: Number behind the last.
        pack: Number of their pack.
        offset: First byte in it.
        nbytes: How many.
    """

    first: int
    end: int
    pack: int
    offset: int
    nbytes: int


class PackReader:
    """Reads ranges of packs.

    Every access compares the range with the size the file has now, so that nothing is allocated for what is not there.
    Files are read, not mapped: a mapped page behind the end of a file that is shortened meanwhile ends the process, and
    what was checked could change afterwards. Reading is no slower, since the bytes are wanted in a tensor of their own.

    Args:
        folder: Where the packs lie.
        header: What `pack_header` gives for this store.
    """

    def __init__(self, folder: Path, header: bytes) -> None:
        self._folder, self._header = folder, header
        self._files: dict[int, int] = {}

    def read(
        self,
        keys: Sequence[str],
        locations: Sequence[Location],
        sizes: Sequence[int],
        check: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Read records, joined; neighbours in a pack are read together.

        Args:
            keys: The records.
            locations: Where each lies.
            sizes: Bytes of each.
            check: Called with each piece of their bytes once its checksums are proved, before the next is read.

        Returns:
            Their bytes in the order asked, uint8 (sum of sizes,).

        Raises:
            CorruptRecordError: A record lies outside its pack or fails its checksum; the message names the key.
            UnreadableFileError: A pack cannot be read.
        """
        pieces = list(_pieces(locations, sizes))
        self._check_bounds(keys, locations, sizes, pieces)
        data = _aligned(sum(piece.nbytes for piece in pieces))  # bounded by the files, now that the bounds are known
        view, start = memoryview(data.data), 0
        for piece in pieces:
            part = view[start : start + piece.nbytes]
            self._fill(part, piece, keys[piece.first])
            self._check_sums(part, keys, locations, sizes, piece)
            if check is not None:
                check(data[start : start + piece.nbytes])
            start += piece.nbytes
        while len(self._files) > _OPEN_FILES:
            self._forget(next(iter(self._files)))
        return data

    def _fill(self, view: memoryview, piece: _Piece, key: str) -> None:
        file, done = self._files.get(piece.pack), 0
        if file is None:
            raise corrupt_record(key, f"pack {piece.pack} taken away just now")
        with translated_errors(self._folder, writing=False):
            while done < len(view):
                found = os.preadv(file, [view[done:]], piece.offset + done)
                if not found:
                    raise corrupt_record(key, f"pack {piece.pack} shortened just now")
                done += found

    def _check_sums(
        self, view: memoryview, keys: Sequence[str], locations: Sequence[Location], sizes: Sequence[int], piece: _Piece
    ) -> None:
        # `record_checksum` written out: a long prompt has thousands of records, and calls would be half of the time.
        digest, seed, start = xxhash.xxh3_64_intdigest, checksum_seed, 0
        for index in range(piece.first, piece.end):
            end, key, location = start + sizes[index], keys[index], locations[index]
            if digest(view[start:end], seed(key)) != location.checksum:
                where = f"{pack_path(self._folder, location.pack)} at byte {location.offset}"
                raise corrupt_record(key, f"bytes that fail their checksum in {where}")
            start = end

    def _check_bounds(
        self, keys: Sequence[str], locations: Sequence[Location], sizes: Sequence[int], pieces: Sequence[_Piece]
    ) -> None:
        usable: dict[int, int] = {}
        for piece in pieces:
            if piece.pack not in usable:
                usable[piece.pack] = self._usable(piece.pack, keys[piece.first])
            if piece.offset >= HEADER_BYTES and piece.offset + piece.nbytes <= usable[piece.pack]:
                continue
            for index in range(piece.first, piece.end):
                start = locations[index].offset
                end = start + sizes[index]
                if start < HEADER_BYTES or end > usable[piece.pack]:
                    path = pack_path(self._folder, piece.pack)
                    raise corrupt_record(
                        keys[index], f"bytes {start} to {end} of {path}, which has {usable[piece.pack]}"
                    )

    def _usable(self, number: int, key: str) -> int:
        file = self._files.get(number)
        if file is None:
            file = self._open(number, key)
        return os.fstat(file).st_size

    def _open(self, number: int, key: str) -> int:
        path = pack_path(self._folder, number)
        with translated_errors(path, writing=False):
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError as error:
                raise corrupt_record(key, f"no pack {path}") from error
            try:
                found = os.pread(file, HEADER_BYTES, 0)
                if found != self._header:
                    raise wrong_header(found, path, key)
            except BaseException:
                os.close(file)
                raise
        # An open file holds on to the bytes of a pack that a compaction took away; this is the moment to let them go.
        for other in [n for n in self._files if not pack_path(self._folder, n).exists()]:
            self._forget(other)
        self._files[number] = file
        return file

    def _forget(self, number: int) -> None:
        file = self._files.pop(number, None)
        if file is not None:
            os.close(file)

    def close(self) -> None:
        """Close all packs."""
        for number in list(self._files):
            self._forget(number)


def _aligned(nbytes: int) -> np.ndarray:
    """Memory for uint8 (nbytes,) that begins where a cache line does; copies into other places take a fifth longer."""
    data = np.empty(nbytes + _LINE, dtype=np.uint8)
    start = -data.ctypes.data % _LINE
    return data[start : start + nbytes]


def _pieces(locations: Sequence[Location], sizes: Sequence[int]) -> Iterator[_Piece]:
    """Runs of records that follow one another in a pack; long runs are cut up."""
    first = begin = end = 0
    pack = -1
    for index, (location, size) in enumerate(zip(locations, sizes, strict=True)):
        if location.offset != end or location.pack != pack or end - begin >= _PIECE:
            if index:
                yield _Piece(first, index, pack, begin, end - begin)
            first, pack, begin = index, location.pack, location.offset
            end = begin
        end += size
    if locations:
        yield _Piece(first, len(locations), pack, begin, end - begin)


class RecordReader:
    """Reads located records.

    Args:
        packs: Where their payloads lie.
        encoding: Of the store.
        hidden_size: Width of every concept.
        traffic: Where bytes are counted.
    """

    def __init__(self, packs: PackReader, encoding: Encoding, hidden_size: int, traffic: Traffic) -> None:
        self._packs, self._encoding, self._hidden_size, self._traffic = packs, encoding, hidden_size, traffic

    def read(self, keys: Sequence[str], locations: Sequence[Location]) -> torch.Tensor:
        """Concepts (sum of n_concepts, hidden_size) fp16 of located records, checked.

        Raises:
            CorruptRecordError: A record fails its checksum or its bounds.
            InvalidConceptsError: A record holds NaN or infinite values.
        """
        each = self._encoding.nbytes(1, self._hidden_size)
        sizes = [each * location.n_concepts for location in locations]
        try:
            data = self._packs.read(keys, locations, sizes, self._encoding.check)
            self._traffic.bytes_read += data.size
            return self._encoding.decode(data, data.size // each, self._hidden_size, checked=True)
        except InvalidConceptsError as error:
            raise self._named(keys, locations) from error

    def _named(self, keys: Sequence[str], locations: Sequence[Location]) -> InvalidConceptsError:
        """The error with the record in it: they were decoded together."""
        for key, location in zip(keys, locations, strict=True):
            data = self._packs.read([key], [location], [self._encoding.nbytes(location.n_concepts, self._hidden_size)])
            try:
                self._encoding.decode(data, location.n_concepts, self._hidden_size)
            except InvalidConceptsError as error:
                return InvalidConceptsError(f"record {key} holds values no concept can have", got=error.got)
        return InvalidConceptsError("records hold values no concept can have")

    def close(self) -> None:
        """Close the packs; the next read opens them again."""
        self._packs.close()


Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class StoreParts:
    """An open store, taken apart.

    Attributes:
        folder: Where the packs lie.
        header: The first bytes of each pack.
        index: Where every record lies.
        reader: Reads payloads.
        encoding: How concepts are written.
        hidden_size: Their width.
    """

    folder: Path
    header: bytes
    index: LocationIndex
    reader: PackReader
    encoding: Encoding
    hidden_size: int

    def nbytes(self, location: Location) -> int:
        """Bytes of a record's payload."""
        return self.encoding.nbytes(location.n_concepts, self.hidden_size)
