"""Reading of segment packs: bounds first, then bytes, then checksums."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
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

_OPEN_MAPS = 128  # each map keeps a file descriptor, and 1024 of those is a common limit


class PackReader:
    """Copies ranges out of memory-mapped packs.

    Every access compares the range with the size the file has now, because touching a mapped page behind the end of a
    shortened file ends the process. Ranges are copied rather than lent: what was checked can then not change.

    Args:
        folder: Where the packs lie.
        header: What `pack_header` gives for this store.
    """

    def __init__(self, folder: Path, header: bytes) -> None:
        self._folder, self._header = folder, header
        self._maps: dict[int, mmap.mmap] = {}

    def read(self, keys: Sequence[str], locations: Sequence[Location], sizes: Sequence[int]) -> np.ndarray:
        """Copy records out, joined; neighbours in a pack are copied as one range.

        Args:
            keys: The records.
            locations: Where each lies.
            sizes: Bytes of each.

        Returns:
            Their bytes in the order asked, uint8 (sum of sizes,).

        Raises:
            CorruptRecordError: A record lies outside its pack or fails its checksum; the message names the key.
        """
        self._check_bounds(keys, locations, sizes)
        data = np.empty(sum(sizes), dtype=np.uint8)  # bounded by the files, now that the bounds are known
        view, position = data.data, 0
        for pack, start, end in _ranges(locations, sizes):
            view[position : position + end - start] = memoryview(self._maps[pack])[start:end]
            position += end - start
        position = 0
        for key, location, size in zip(keys, locations, sizes, strict=True):
            if record_checksum(key, view[position : position + size]) != location.checksum:
                where = f"{pack_path(self._folder, location.pack)} at byte {location.offset}"
                raise corrupt_record(key, f"bytes that fail their checksum in {where}")
            position += size
        while len(self._maps) > _OPEN_MAPS:
            self._forget(next(iter(self._maps)))
        return data

    def _check_bounds(self, keys: Sequence[str], locations: Sequence[Location], sizes: Sequence[int]) -> None:
        usable: dict[int, int] = {}
        for key, location, size in zip(keys, locations, sizes, strict=True):
            end = location.offset + size
            if end > usable.get(location.pack, -1):
                usable[location.pack] = self._usable(location.pack, end, key)
            if location.offset < HEADER_BYTES or end > usable[location.pack]:
                path = pack_path(self._folder, location.pack)
                raise corrupt_record(
                    key, f"bytes {location.offset} to {end} of {path}, which has {usable[location.pack]}"
                )

    def _usable(self, number: int, end: int, key: str) -> int:
        pages = self._maps.get(number)
        if pages is None or (len(pages) < end and pages.size() > len(pages)):
            pages = self._map(number, key)
        return min(len(pages), pages.size())

    def _map(self, number: int, key: str) -> mmap.mmap:
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
                pages = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
            finally:
                os.close(file)
        # A map holds on to the bytes of a pack that a compaction took away; this is the moment to let them go.
        for other in [n for n in self._maps if n == number or not pack_path(self._folder, n).exists()]:
            self._forget(other)
        self._maps[number] = pages
        return pages

    def _forget(self, number: int) -> None:
        pages = self._maps.pop(number, None)
        if pages is not None:
            pages.close()

    def close(self) -> None:
        """Give all maps back."""
        for number in list(self._maps):
            self._forget(number)


def _ranges(locations: Sequence[Location], sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Pack, start and end of each run of records that follow one another in a pack."""
    run: tuple[int, int, int] | None = None
    for location, size in zip(locations, sizes, strict=True):
        if run is not None and run[0] == location.pack and run[2] == location.offset:
            run = (run[0], run[1], location.offset + size)
        else:
            if run is not None:
                yield run
            run = (location.pack, location.offset, location.offset + size)
    if run is not None:
        yield run
