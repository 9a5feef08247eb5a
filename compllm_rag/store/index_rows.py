"""The rows of a disk store's index: what stands in them, and what is wrong with one.

Three kinds: a record (its key, and where it lies), a run of payloads in a pack (its place, length and digest), and the
totals over all records.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from compllm_rag.errors import CompLLMError, CorruptRecordError
from compllm_rag.store.packs import Location, Run, corrupt_record

ROW = struct.Struct("<IQIQ")  # pack, offset, n_concepts, checksum
TOTALS_KEY = "totals"  # no record key: those are 64 characters
RAW = 0  # diskcache's mode for a value that lies in the row itself
_TOTALS = struct.Struct("<QQQ")  # records, concepts, payload bytes
_RUN = struct.Struct("<Q32s")  # bytes, SHA-256
_RUN_KEY = re.compile(r"run:(\d{1,9}):(\d{1,18})")  # pack and start


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


def planted(key: str, got: str) -> CorruptRecordError:
    """The error for a row that somebody else put there."""
    return CorruptRecordError(
        f"a row this package does not write is in the index: {key}",
        got=got,
        expected="plain bytes",
        next_step="find out who writes to this folder; nothing of the row was loaded",
    )


def is_record(key: object, raw: object) -> bool:
    """Whether a row is for a record: of neither totals nor a run."""
    return not (raw == 1 and isinstance(key, str) and (key == TOTALS_KEY or _RUN_KEY.fullmatch(key)))


def scanned(rowid: int, key: object, raw: object, held: tuple[object, object, object]) -> ScannedRow:
    """A row as it stands, whatever state it is in; `held` is its mode, file name and value."""
    if raw != 1 or type(key) is not str:
        name = repr(key)[:80]
        return ScannedRow(rowid, name, None, planted(name, f"a key of type {type(key).__name__}, raw {raw}"))
    try:
        return ScannedRow(rowid, key, parsed(key, *held))
    except CompLLMError as error:
        return ScannedRow(rowid, key, None, error)


def run_key(run: Run) -> str:
    """The key of a run's row."""
    return f"run:{run.pack}:{run.start}"


def parsed(key: str, mode: object, filename: object, value: object) -> Location:
    """The location of a record's row.

    Raises:
        CorruptRecordError: No location stands in it; nothing of it was loaded.
    """
    if mode != RAW or filename is not None or type(value) is not bytes:
        raise planted(key, f"a value of mode {mode}, type {type(value).__name__}, file {filename}")
    if len(value) != ROW.size:
        raise corrupt_record(key, f"an index row of {len(value)} bytes instead of {ROW.size}")
    location = Location._make(ROW.unpack(value))
    if location.n_concepts < 1:
        raise corrupt_record(key, "an index row that says it has no concepts")
    return location


def packed(at: Location) -> bytes:
    """The value of a record's row."""
    return ROW.pack(at.pack, at.offset, at.n_concepts, at.checksum)


def packed_run(run: Run) -> bytes:
    """The value of a run's row."""
    return _RUN.pack(run.nbytes, run.sha256)


def parsed_run(key: str, mode: object, filename: object, value: object) -> Run:
    """The run of a row.

    Raises:
        CorruptRecordError: Nothing of the kind stands in it.
    """
    name = _RUN_KEY.fullmatch(key)
    if name is None or mode != RAW or filename is not None or type(value) is not bytes:
        raise planted(repr(key)[:80], f"a value of mode {mode}, type {type(value).__name__}")
    if len(value) != _RUN.size:
        raise planted(repr(key)[:80], f"a run of {len(value)} bytes")
    return Run(int(name[1]), int(name[2]), *_RUN.unpack(value))


def packed_totals(totals: Totals) -> bytes:
    """The value of the totals' row."""
    return _TOTALS.pack(totals.records, totals.concepts, totals.payload_bytes)


def parsed_totals(mode: object, filename: object, value: object) -> Totals:
    """The totals of their row.

    Raises:
        CorruptRecordError: No totals stand in it.
    """
    if mode != RAW or filename is not None or type(value) is not bytes or len(value) != _TOTALS.size:
        raise planted(TOTALS_KEY, f"a value of mode {mode}, type {type(value).__name__}")
    return Totals(*_TOTALS.unpack(value))
