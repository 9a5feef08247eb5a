"""Reading of segment packs: bounds first, then bytes, then checksums."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from compllm_rag.store.faults import explained
from compllm_rag.store.packs import (
    HEADER_BYTES,
    Location,
    corrupt_record,
    pack_path,
    record_checksum,
    wrong_header,
)

_OPEN_FILES = 128  # 1024 file descriptors are a common limit
# Bytes read before their checksums are taken: they are in the processor's cache still. Several threads would gain a
# little on an idle machine, and lose more than that on a busy one.
_PIECE = 2**20


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
        self._check_bounds(keys, locations, sizes)
        data = np.empty(sum(sizes), dtype=np.uint8)  # bounded by the files, now that the bounds are known
        view, position = memoryview(data.data), 0
        for first, end in _pieces(locations, sizes):
            start = position
            self._fill(view[start : start + sum(sizes[first:end])], locations[first], keys[first])
            for key, location, size in zip(keys[first:end], locations[first:end], sizes[first:end], strict=True):
                if record_checksum(key, view[position : position + size]) != location.checksum:
                    where = f"{pack_path(self._folder, location.pack)} at byte {location.offset}"
                    raise corrupt_record(key, f"bytes that fail their checksum in {where}")
                position += size
            if check is not None:
                check(data[start:position])
        while len(self._files) > _OPEN_FILES:
            self._forget(next(iter(self._files)))
        return data

    def _fill(self, view: memoryview, location: Location, key: str) -> None:
        file, done = self._files.get(location.pack), 0
        if file is None:
            raise corrupt_record(key, f"pack {location.pack} taken away just now")
        with explained(self._folder, writing=False):
            while done < len(view):
                found = os.preadv(file, [view[done:]], location.offset + done)
                if not found:
                    raise corrupt_record(key, f"pack {location.pack} shortened just now")
                done += found

    def _check_bounds(self, keys: Sequence[str], locations: Sequence[Location], sizes: Sequence[int]) -> None:
        usable: dict[int, int] = {}
        for key, location, size in zip(keys, locations, sizes, strict=True):
            end = location.offset + size
            if location.pack not in usable:
                usable[location.pack] = self._usable(location.pack, key)
            if location.offset < HEADER_BYTES or end > usable[location.pack]:
                path = pack_path(self._folder, location.pack)
                raise corrupt_record(
                    key, f"bytes {location.offset} to {end} of {path}, which has {usable[location.pack]}"
                )

    def _usable(self, number: int, key: str) -> int:
        file = self._files.get(number)
        if file is None:
            file = self._open(number, key)
        return os.fstat(file).st_size

    def _open(self, number: int, key: str) -> int:
        path = pack_path(self._folder, number)
        with explained(path, writing=False):
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


def _pieces(locations: Sequence[Location], sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and end of runs of records that follow one another in a pack; long runs are cut up."""
    first = nbytes = 0
    for index in range(1, len(locations)):
        last, size = locations[index - 1], sizes[index - 1]
        nbytes += size
        after = locations[index]
        if after.pack != last.pack or after.offset != last.offset + size or nbytes >= _PIECE:
            yield first, index
            first, nbytes = index, 0
    if locations:
        yield first, len(locations)
