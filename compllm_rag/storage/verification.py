"""Looking for damage in a whole storage: text, vectors, concepts and adapters, and whether they belong together.

No model is loaded and nothing is written, so a storage on a read-only medium can be verified as well.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compllm_rag.catalog import rows as node_rows
from compllm_rag.catalog.choices import damaged_choices
from compllm_rag.catalog.database import connected, has_tables, read_state
from compllm_rag.catalog.generations import GenerationFiles
from compllm_rag.catalog.pending import pending_keys
from compllm_rag.catalog.references import count_keys, is_counted, referred_keys
from compllm_rag.catalog.tracked import count_chunks
from compllm_rag.errors import CompLLMError, CorruptRecordError, StoreUnavailableError, UnsupportedFormatError
from compllm_rag.storage.adapter_files import FILES_KEY, damaged_adapters
from compllm_rag.storage.manifest import CATALOG, CONCEPTS, META_KEY, Manifest, refuse_newer, require_storage
from compllm_rag.storage.stores import open_store
from compllm_rag.store.base import ConceptStore
from compllm_rag.store.verification import StoreCheck

_SHOWN = 100  # a lost pack damages a million records in one way


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        part: `database`, `manifest`, `text`, `vectors`, `counts`, `concepts` or `adapters`.
        what: In words.
        key: The concept record, where it is one.
    """

    part: str
    what: str
    key: str | None = None


@dataclass
class StorageCheck:
    """What a storage holds and what is wrong with it.

    Attributes:
        deep: Whether every payload and every row was read.
        format_version: Version of the storage's format; None when it cannot be told.
        documents: Documents accounted for.
        chunks: Rows of text.
        segments: Different segments that chunks refer to.
        records: Sound concept records.
        dead_records: Records nothing refers to; None when that is not known.
        pack_bytes: Bytes of all packs.
        dead_bytes: Bytes of packs that no record uses.
        findings: The first hundred things that are wrong.
        n_findings: How many there are.
        seconds: Wall time.
        segments_awaiting: Segments of uploads that are still to be compressed.
    """

    deep: bool
    format_version: int | None = None
    documents: int = 0
    chunks: int = 0
    segments: int = 0
    records: int = 0
    dead_records: int | None = None
    pack_bytes: int = 0
    dead_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    n_findings: int = 0
    seconds: float = 0.0
    segments_awaiting: int = 0

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.n_findings

    def add(self, part: str, what: str, key: str | None = None) -> None:
        """Note something that is wrong."""
        self.n_findings += 1
        if len(self.findings) < _SHOWN:
            self.findings.append(Finding(part, what, key))

    def fields(self) -> dict[str, Any]:
        """Plain values, as `verify --json` prints them."""
        return {"sound": self.sound, **asdict(self)}


Progress = Callable[[str, float | None], None]
_RETRIES = 20


def verify_storage(folder: str | Path, *, deep: bool = False, progress: Progress | None = None) -> StorageCheck:
    """Verify a storage.

    The fast way checks the database, the manifest, the digests of vectors and adapters, that every row has its vector
    and every segment its record, the bounds of all records and all sums. `deep` also reads each row and each payload.

    Args:
        folder: The storage.
        deep: Read everything.
        progress: Called with a message and a share from 0 to 1.

    Raises:
        StorageNotFoundError: There is no storage here.
        UnsupportedFormatError: It was written in a newer format.
        UnreadableFileError: It may not be read.
    """
    begun, path = time.perf_counter(), Path(folder).absolute()
    require_storage(path)
    for _ in range(_RETRIES):
        before = _written(path)
        made = _verify(path, deep, progress)
        # What a writer moved while we looked at it may seem damaged. Where nobody writes, it is.
        if made.sound or _written(path) == before:
            break
    made.seconds = time.perf_counter() - begun
    return made


def _verify(path: Path, deep: bool, progress: Progress | None) -> StorageCheck:
    made = StorageCheck(deep)
    manifest = None
    try:
        with connected(path / CATALOG, writing=False) as connection:
            connection.text_factory = node_rows.lenient_text
            try:
                manifest = _check_catalog(path, connection, made, progress)
                if manifest is not None:
                    _check_concepts(path, manifest, connection, made, progress)
            finally:
                connection.close()
    except CorruptRecordError as error:
        made.add("database", error.what if error.got is None else f"{error.what}: {error.got}")
    return made


def _written(folder: Path) -> list[tuple[str, int, int]]:
    """What changes whenever somebody writes to a storage."""
    found = []
    for path in sorted(folder.rglob("*")):
        with suppress(FileNotFoundError):
            if not path.name.endswith("-shm"):  # readers write to it, too
                state = path.stat()
                found.append((path.name, state.st_size, state.st_mtime_ns))
    return found


def _check_catalog(
    folder: Path, connection: sqlite3.Connection, made: StorageCheck, progress: Progress | None
) -> Manifest | None:
    _tell(progress, "checking the catalog", None)
    check = "integrity" if made.deep else "quick"
    for (fault,) in connection.execute(f"PRAGMA {check}_check").fetchall():
        if fault != "ok":
            made.add("database", str(fault))
    if not has_tables(connection):
        Manifest.parse(None)  # refuses: the making of the storage was interrupted
    _check_vectors(folder, connection, made, progress)  # begins the transaction in which the rest is read
    made.chunks = count_chunks(connection)
    if made.deep:
        _check_rows(connection, made, progress)
    manifest = _check_manifest(connection, made)
    _check_accounts(connection, made)
    for wrong in damaged_adapters(folder, _meta(connection, FILES_KEY)):
        made.add("adapters", wrong)
    return manifest


def _check_vectors(folder: Path, connection: sqlite3.Connection, made: StorageCheck, progress: Progress | None) -> None:
    _tell(progress, "checking vectors", None)
    files, seen = GenerationFiles(folder), -1
    for _ in range(_RETRIES):
        connection.execute("BEGIN")
        try:
            state = read_state(connection)
            vectors = files.load(state)
        except FileNotFoundError:
            if state.number == seen:
                made.add("vectors", f"{state.file} is gone")
                return
            seen = state.number
            connection.execute("ROLLBACK")  # a writer may have gone on meanwhile: look again
            continue
        except CorruptRecordError as error:
            made.add("vectors", f"{error.what}: {error.got}")
            return
        rows = np.fromiter((row[0] for row in connection.execute("SELECT id FROM nodes ORDER BY id")), dtype=np.int64)
        if not np.array_equal(vectors.ids(), rows):
            made.add("vectors", f"{len(vectors)} vectors and {len(rows)} rows of text do not belong together")
        return


def _check_rows(connection: sqlite3.Connection, made: StorageCheck, progress: Progress | None) -> None:
    for number, (id_, row) in enumerate(node_rows.scan(connection), 1):
        if row is None:
            made.add("text", f"row {id_} fails its SHA-256")
        if number % 500 == 0:
            _tell(progress, "checking text", number / max(made.chunks, 1))


def _check_manifest(connection: sqlite3.Connection, made: StorageCheck) -> Manifest | None:
    text = _meta(connection, META_KEY)
    try:
        manifest = Manifest.parse(text)
    except UnsupportedFormatError as error:
        refuse_newer(text)
        made.add("manifest", f"{error.what}: {error.got}")
        return None
    made.format_version = manifest.format_version
    return manifest


def _check_accounts(connection: sqlite3.Connection, made: StorageCheck) -> None:
    query = (
        "SELECT count(*), coalesce(sum(CASE WHEN json_valid(value) THEN json_extract(value, '$.chunks') END), 0)"
        " FROM kv WHERE collection = ?"
    )
    made.documents, chunks = connection.execute(query, ("compllm/accounts",)).fetchone()
    if chunks != made.chunks:
        made.add("counts", f"{chunks} chunks are accounted for, and {made.chunks} are there")
    if not is_counted(connection):
        made.add("counts", "nothing says how often each segment is referred to")
    for wrong in damaged_choices(connection, made.chunks, deep=made.deep):
        made.add("counts", wrong)


def _check_concepts(
    folder: Path, manifest: Manifest, connection: sqlite3.Connection, made: StorageCheck, progress: Progress | None
) -> None:
    made.segments = count_keys(connection)
    try:
        with open_store(manifest, folder / CONCEPTS, read_only=True, counted=False) as store:
            check: StoreCheck = store.verify(deep=made.deep, progress=progress)
            made.records, made.pack_bytes, made.dead_bytes = check.sound.records, check.pack_bytes, check.dead_bytes
            for damage in check.damage:
                made.add("concepts", damage.what, damage.key)
            missing = _check_references(connection, store, made)
            if is_counted(connection) and not check.damage and not store.shared:
                made.dead_records = made.records - made.segments + missing + made.segments_awaiting
    except (UnsupportedFormatError, StoreUnavailableError):
        raise
    except CompLLMError as error:
        made.add("concepts", error.what if error.got is None else f"{error.what}: {error.got}")


def _check_references(connection: sqlite3.Connection, store: ConceptStore, made: StorageCheck) -> int:
    """How many segments that chunks refer to have no record."""
    missing, first = 0, None
    if not is_counted(connection):
        return 0
    awaited = pending_keys(connection)
    for keys in referred_keys(connection):
        absent = [key for key, there in zip(keys, store.contains(keys), strict=True) if not there]
        lost = [key for key in absent if key not in awaited]
        made.segments_awaiting += len(absent) - len(lost)
        missing, first = missing + len(lost), first or next(iter(lost), None)
    if missing:
        made.add("concepts", f"{missing} segments that text refers to have no record", first)
    return missing


def _meta(connection: sqlite3.Connection, key: str) -> str | None:
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else str(row[0])


def _tell(progress: Progress | None, message: str, share: float | None) -> None:
    if progress:
        progress(message, share)
