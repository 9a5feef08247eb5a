"""Looking for damage in a disk store without stopping at the first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from compllm_rag.errors import CompLLMError
from compllm_rag.store.base import is_key
from compllm_rag.store.faults import translated_errors
from compllm_rag.store.index_rows import ScannedRow, Totals
from compllm_rag.store.packs import HEADER_BYTES, Location, Run, pack_path, pack_sizes, wrong_header
from compllm_rag.store.reading import Progress, StoreParts

_BATCH_CHUNKS = 256
_BLOCK = 2**20


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong.

    Attributes:
        what: In words, with the place.
        key: The record, where it is one.
    """

    what: str
    key: str | None = None


@dataclass
class StoreCheck:
    """What a store holds and what is wrong with it.

    Attributes:
        sound: Sums over the records in which nothing wrong was found.
        packs: How many packs there are.
        pack_bytes: Their bytes.
        dead_bytes: Bytes of packs that no record uses; a compaction reclaims them.
        damage: All that is wrong; empty for a sound store.
        index_damaged: Whether SQLite finds the file of the index damaged.
        damaged_rows: Numbers of the index rows that are wrong, or whose payloads are.
    """

    sound: Totals = field(default_factory=Totals)
    packs: int = 0
    pack_bytes: int = 0
    dead_bytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    index_damaged: bool = False
    damaged_rows: list[int] = field(default_factory=list)


def check_store(parts: StoreParts, *, deep: bool, progress: Progress | None = None) -> StoreCheck:
    """Check rows, bounds, headers and sums of a store; payloads and their digests as well when `deep`.

    Args:
        parts: The store.
        deep: Read every payload: checksum, finite values, and SHA-256 of every run of payloads.
        progress: Called with a message and a share from 0 to 1.
    """
    with parts.index.snapshot():
        return _check(parts, deep, progress)


def _check(parts: StoreParts, deep: bool, progress: Progress | None) -> StoreCheck:
    made, totals = StoreCheck(), parts.index.totals()
    sizes = pack_sizes(parts.folder)  # after the first look at the rows: packs only grow
    made.packs, made.pack_bytes = len(sizes), sum(sizes.values())
    made.damage += [Damage(f"index: {fault}") for fault in parts.index.faults(deep=deep)]
    made.index_damaged = bool(made.damage)
    usable = {number: size for number, size in sizes.items() if _header_is_sound(parts, number, made)}
    seen, bad = 0, set[int]()
    for page in _pages(parts.index.scan()):
        seen += len(page)
        good = [row for row in page if _row_is_sound(parts, row, usable, made)]
        if deep:
            bad = _unreadable(parts, good, made)
        places = [row.location for row in good if row.location is not None and row.rowid not in bad]
        made.sound = Totals(
            made.sound.records + len(places),
            made.sound.concepts + sum(at.n_concepts for at in places),
            made.sound.payload_bytes + sum(map(parts.nbytes, places)),
        )
        if progress:
            progress("checking concept records", min(seen / max(totals.records, 1), 1.0))
    if not made.damaged_rows and made.sound != totals:
        made.damage.append(Damage(f"index: its sums say {totals}, its rows {made.sound}"))
    made.dead_bytes = sum(max(size - HEADER_BYTES, 0) for size in sizes.values()) - made.sound.payload_bytes
    if deep:
        _check_runs(parts, sizes, made, progress)
    return made


def _header_is_sound(parts: StoreParts, number: int, made: StoreCheck) -> bool:
    path = pack_path(parts.folder, number)
    try:
        with translated_errors(path, writing=False), path.open("rb") as file:
            found = file.read(HEADER_BYTES)
    except FileNotFoundError:  # a compaction has taken it away; where there was none, its rows say what is missing
        return False
    # A shorter one is what a kill leaves while a pack is begun; nothing is ever put behind it.
    if found != parts.header and len(found) == HEADER_BYTES:
        made.damage.append(Damage(f"{path.name}: {wrong_header(found, path, path.name).what}"))
    return found == parts.header


def _row_is_sound(parts: StoreParts, row: ScannedRow, usable: dict[int, int], made: StoreCheck) -> bool:
    at, trouble = row.location, None
    if at is None:
        trouble = str(row.trouble.got if row.trouble else "a damaged index row")
    elif not is_key(row.key):
        trouble = "an index row under something that is no record key"
    elif at.pack not in usable:
        trouble = f"no sound pack {at.pack}"
    elif at.offset < HEADER_BYTES or at.offset + parts.nbytes(at) > usable[at.pack]:
        trouble = f"bytes behind the end of pack {at.pack}"
    return trouble is None or _note(made, row, trouble)


def _note(made: StoreCheck, row: ScannedRow, trouble: str) -> bool:
    made.damage.append(Damage(f"record {row.key[:80]}: {trouble}", row.key if is_key(row.key) else None))
    made.damaged_rows.append(row.rowid)
    return False


def _unreadable(parts: StoreParts, rows: Sequence[ScannedRow], made: StoreCheck) -> set[int]:
    """Numbers of the rows whose payloads fail their checksum or hold what no concept can."""
    placed = [(row, row.location) for row in rows if row.location is not None]
    if _reads(parts, placed) is None:
        return set()
    bad = set()
    for one in placed:
        trouble = _reads(parts, [one])
        if trouble is not None:
            _note(made, one[0], str(trouble.got))
            bad.add(one[0].rowid)
    return bad


def _reads(parts: StoreParts, placed: Sequence[tuple[ScannedRow, Location]]) -> CompLLMError | None:
    keys, places = [row.key for row, _ in placed], [at for _, at in placed]
    try:
        data = parts.reader.read(keys, places, [parts.nbytes(at) for at in places])
        parts.encoding.decode(data, sum(at.n_concepts for at in places), parts.hidden_size)
    except CompLLMError as error:
        return error
    return None


def _check_runs(parts: StoreParts, sizes: dict[int, int], made: StoreCheck, progress: Progress | None) -> None:
    runs, known = parts.index.runs(), bool(made.damaged_rows)
    for number, run in enumerate(runs, 1):
        # Where records are damaged, their packs' digests can but say so again.
        if not known and run.pack in sizes and (found := _digest(parts, run)) != run.sha256:
            name = pack_path(parts.folder, run.pack).name
            wrong = f"SHA-256 of {run.nbytes} bytes from {run.start}" if found else "the pack is gone"
            made.damage.append(Damage(f"{name}: {wrong}"))
        if progress:
            progress("checking packs", number / len(runs))


def _digest(parts: StoreParts, run: Run) -> bytes | None:
    """Of the bytes that a run has now; None where its pack is gone, as after a compaction meanwhile."""
    path, digest, left = pack_path(parts.folder, run.pack), hashlib.sha256(), run.nbytes
    try:
        with translated_errors(path, writing=False), path.open("rb") as file:
            file.seek(run.start)
            while left > 0 and (block := file.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
    except FileNotFoundError:
        return None
    return digest.digest()


def _pages(rows: Iterator[ScannedRow]) -> Iterator[list[ScannedRow]]:
    page: list[ScannedRow] = []
    for row in rows:
        page.append(row)
        if len(page) == _BATCH_CHUNKS:
            yield page
            page = []
    if page:
        yield page
