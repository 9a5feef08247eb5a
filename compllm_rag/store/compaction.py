"""Packs written anew without the bytes that no record needs any more.

Records move in steps: their payloads go into new packs, which are synced; then one transaction of the index points
their rows at the new place. After the last step one more transaction forgets what is gone, and only then are the old
packs removed. A process killed anywhere leaves every record readable, and at worst some bytes for the next compaction.
Readers hold on to the packs they have open, and look a record up again when its pack is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from compllm_rag.errors import CompLLMError
from compllm_rag.store.base import is_key
from compllm_rag.store.faults import translated_errors
from compllm_rag.store.index_rows import ScannedRow, Totals
from compllm_rag.store.packs import (
    HEADER_BYTES,
    Location,
    PackWriter,
    corrupt_record,
    pack_path,
    pack_sizes,
    sync_folder,
)
from compllm_rag.store.reading import Progress, StoreParts

_BATCH_CHUNKS = 256  # records read and written in one go
_STEP = 50_000  # records that move in one transaction; bounds memory


@dataclass(frozen=True)
class CompactReport:
    """What a compaction did.

    Attributes:
        records: Records that are left.
        records_dropped: Records nothing referred to any more.
        packs_rewritten: Packs that held dead bytes beside live ones.
        packs_removed: Packs that are gone, the rewritten ones included.
        bytes_before: Bytes of all packs.
        bytes_after: The same afterwards.
    """

    records: int
    records_dropped: int
    packs_rewritten: int
    packs_removed: int
    bytes_before: int
    bytes_after: int


@dataclass
class _Survey:
    """One look at all rows: what each pack holds that is live, and which rows are dead."""

    totals: Totals
    live_bytes: dict[int, int]
    dead: list[int]


def compact_packs(
    parts: StoreParts,
    writer: PackWriter,
    live: Callable[[Sequence[str]], Sequence[bool]] | None,
    progress: Progress | None = None,
) -> CompactReport:
    """Compact a store; its caller holds the writer's lock and has flushed.

    Args:
        parts: The store.
        writer: Its pack writer.
        live: Tells for record keys whether anything refers to them; None keeps all.
        progress: Called with a message and a share from 0 to 1.

    Raises:
        CorruptRecordError: A record is damaged.
        StoreFullError: No space; every record is where it was, or moved already.
    """
    sizes = pack_sizes(parts.folder)
    if progress:
        progress("looking for dead records", None)
    survey = _survey(parts, live)
    dirty = {n for n, size in sizes.items() if size != HEADER_BYTES + survey.live_bytes.get(n, 0)}
    mixed = dirty & survey.live_bytes.keys()
    former = [run for run in parts.index.runs() if run.pack in dirty]
    writer.close()  # the next append starts another pack, so none is both read and written
    _move(parts, writer, mixed, set(survey.dead), survey.totals, progress)
    if dirty or survey.dead:
        parts.index.add({}, survey.totals, gone=survey.dead, gone_runs=former)
        _remove(parts, dirty)
        _shrink(parts)
    after = sum(pack_sizes(parts.folder).values())
    return CompactReport(survey.totals.records, len(survey.dead), len(mixed), len(dirty), sum(sizes.values()), after)


def _survey(parts: StoreParts, live: Callable[[Sequence[str]], Sequence[bool]] | None) -> _Survey:
    records = concepts = payload = 0
    live_bytes: dict[int, int] = {}
    dead: list[int] = []
    for page in _pages(parts.index.scan(), 1000):
        places = [_sound(row) for row in page]
        stays = [True] * len(page) if live is None else live([row.key for row in page])
        for row, at, stay in zip(page, places, stays, strict=True):
            if not stay:
                dead.append(row.rowid)
                continue
            size = parts.nbytes(at)
            live_bytes[at.pack] = live_bytes.get(at.pack, 0) + size
            records, concepts, payload = records + 1, concepts + at.n_concepts, payload + size
    return _Survey(Totals(records, concepts, payload), live_bytes, dead)


def _move(
    parts: StoreParts, writer: PackWriter, packs: set[int], dead: set[int], totals: Totals, progress: Progress | None
) -> None:
    """Copy the live records of some packs, in the order in which they were put."""
    if not packs:
        return
    moved: dict[str, Location] = {}
    done = 0
    wanted = (row for row in parts.index.scan() if row.rowid not in dead and _sound(row).pack in packs)
    for page in _pages(wanted, _BATCH_CHUNKS):
        keys, places = [row.key for row in page], [_sound(row) for row in page]
        sizes = [parts.nbytes(at) for at in places]
        data = parts.reader.read(keys, places, sizes)
        if writer.full and moved:
            _commit(parts, writer, moved)
        pack, offset = writer.append(data.tobytes())
        for key, at, size in zip(keys, places, sizes, strict=True):
            moved[key] = Location(pack, offset, at.n_concepts, at.checksum)
            offset += size
        done += len(page)
        if progress:
            progress("moving records", min(done / max(totals.records, 1), 1.0))
        if len(moved) >= _STEP:
            _commit(parts, writer, moved)
    if moved:
        _commit(parts, writer, moved)


def _commit(parts: StoreParts, writer: PackWriter, moved: dict[str, Location]) -> None:
    writer.sync()
    parts.index.add(moved, parts.index.totals(), writer.runs)
    writer.forget_runs()
    moved.clear()


def _remove(parts: StoreParts, packs: set[int]) -> None:
    with translated_errors(parts.folder, writing=True):
        for number in packs:
            pack_path(parts.folder, number).unlink(missing_ok=True)
        sync_folder(parts.folder)


def _shrink(parts: StoreParts) -> None:
    with suppress(CompLLMError):  # the compaction stands; a database that stays long is no harm
        parts.index.shrink()


def _sound(row: ScannedRow) -> Location:
    if row.location is None or not is_key(row.key):
        raise row.trouble or corrupt_record(row.key, "a damaged index row")
    return row.location


def _pages(rows: Iterator[ScannedRow], size: int) -> Iterator[list[ScannedRow]]:
    page: list[ScannedRow] = []
    for row in rows:
        page.append(row)
        if len(page) == size:
            yield page
            page = []
    if page:
        yield page
