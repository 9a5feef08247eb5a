"""One state of a storage, taken while others go on writing to it.

The catalog and the index of the concept store are SQLite databases: a read transaction of each pins its state, and a
copy is made by SQLite from within. The catalog is pinned first. Whatever chunks refer to was durable before they were
committed, so the later state of the index has it, unless somebody committed in between and a compaction then took
concepts away: so the catalog must not have changed until both are pinned, else it is tried again. Files that the two
name (vectors, packs) are opened at once, and stay readable when a commit or a compaction removes them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from compllm_rag.catalog.database import connected, read_state
from compllm_rag.errors import (
    CompLLMError,
    ConfigurationError,
    CorruptRecordError,
    StoreLockedError,
    UnsupportedFormatError,
)
from compllm_rag.storage.manifest import CATALOG, CONCEPTS, META_KEY, Manifest, refuse_newer
from compllm_rag.storage.namespaces import FOLDER, is_part
from compllm_rag.store.faults import Subject, translated_errors
from compllm_rag.store.index import LocationIndex
from compllm_rag.store.index_database import make_private
from compllm_rag.store.manifest import MANIFEST_NAME
from compllm_rag.store.packs import HEADER_BYTES, Run, pack_path

Progress = Callable[[str, float | None], None]

EXPORT = Subject("the export", "the export", "free some space, then export again; nothing was left behind")
INDEX = f"{CONCEPTS}/index/cache.db"
_TRIES = 20
_CHUNK = 2**20
_PAGES = 4096  # of a database, copied at a time
# Parts that are looked after here, and parts of processes, not of the storage.
_APART = ("vectors-", "concepts", "catalog.", "backup-v", ".deleted-", "watch.lock", FOLDER)


@dataclass(frozen=True)
class SnapshotFile:
    """A file of a snapshot.

    Attributes:
        name: Its path within the storage, with `/`.
        size: Its bytes.
        stream: Open at its beginning.
        runs: Payloads with digests of their own, in order, for a pack.
        sha256: What its digest must be; empty where the storage does not say.
    """

    name: str
    size: int
    stream: BinaryIO
    runs: tuple[Run, ...] = ()
    sha256: str = ""

    def chunks(self) -> Iterator[bytes]:
        """Its bytes; those of a pack are proven against the digests of its runs.

        Raises:
            CorruptRecordError: Bytes of a pack are not those that were written.
        """
        at = 0
        for end, proof in self._stretches():
            digest = hashlib.sha256()
            while at < end:
                chunk = self.stream.read(min(_CHUNK, end - at))
                if not chunk:
                    raise _damaged(f"{self.name} ends after {at} bytes", end)
                digest.update(chunk)
                at += len(chunk)
                yield chunk
            if proof is not None and digest.digest() != proof:
                raise _damaged(f"{self.name}: other bytes before {at} than were written", proof.hex())

    def damaged(self, digest: str) -> CorruptRecordError:
        """The error for a digest other than the storage says."""
        return _damaged(f"{self.name} with SHA-256 {digest}", self.sha256)

    def _stretches(self) -> Iterator[tuple[int, bytes | None]]:
        """Where each stretch ends, and the digest of its bytes where there is one."""
        at = 0
        for run in self.runs:
            if run.start > at:
                yield run.start, None
            at = run.start + run.nbytes
            yield at, run.sha256
        if at < self.size:
            yield self.size, None


@dataclass(frozen=True)
class Snapshot:
    """One state of a storage.

    Attributes:
        namespace: Its namespace.
        chunks: How many it has.
        files: All of it, in order of name.
    """

    namespace: str
    chunks: int
    files: tuple[SnapshotFile, ...]


@contextmanager
def snapshot(folder: Path, drafts: Path, progress: Progress | None = None) -> Iterator[Snapshot]:
    """Take one state of a storage; its files are open until the block ends.

    Args:
        folder: The storage (of one namespace).
        drafts: An empty folder for the copies of its databases.
        progress: Called with a message and a share from 0 to 1.

    Raises:
        StorageNotFoundError, UnsupportedFormatError: There is no storage, or it is of a newer release.
        ConfigurationError: Its concepts lie elsewhere, or too many files are open.
        CorruptRecordError: It is damaged.
        StoreLockedError: It changed all the time.
    """
    for left in reversed(range(_TRIES)):
        with ExitStack() as held:
            try:
                made = _taken(folder, drafts, held, progress)
            except (FileNotFoundError, _ChangedError) as error:
                # A commit or a compaction went on between two looks; where nobody writes, something is missing.
                if left:
                    continue
                if isinstance(error, CompLLMError):
                    raise
                raise _damaged(f"{Path(error.filename or folder).name} is gone") from error
            yield made
            return


class _ChangedError(StoreLockedError):
    """Somebody committed between two looks."""


def _taken(folder: Path, drafts: Path, held: ExitStack, progress: Progress | None) -> Snapshot:
    concepts = folder / CONCEPTS
    with (
        connected(folder / CATALOG, writing=False) as watch,
        connected(folder / CATALOG, writing=False) as catalog,
    ):
        held.callback(watch.close)
        held.callback(catalog.close)
        before = _version(watch)
        catalog.execute("BEGIN")
        state = read_state(catalog)
        namespace, chunks = _described(folder, catalog)
        files = []
        for name, wanted, sha256 in state.parts:
            size, stream = _opened(folder / name, held)
            if wanted is not None and size < wanted:
                raise _damaged(f"{name} has {size} bytes", wanted)
            files.append(SnapshotFile(name, size if wanted is None else wanted, stream, sha256=sha256))
        with connected(concepts / "index" / "cache.db", writing=False) as index:
            held.callback(index.close)
            index.execute("BEGIN")
            index.execute("SELECT COUNT(*) FROM Settings").fetchone()
            packs = {path.name: _opened(path, held) for path in sorted((concepts / "packs").glob("*.pack"))}
            if _version(watch) != before:
                raise _ChangedError(
                    "the storage changes too fast for a consistent copy",
                    got=f"commits without a pause in {folder}",
                    next_step="run it again",
                )
            copies = {CATALOG: drafts / "catalog.db", INDEX: drafts / "cache.db"}
            for connection, name in ((catalog, CATALOG), (index, INDEX)):
                _copy(connection, copies[name], f"copying {name}", progress)
                connection.close()
    for name, path in copies.items():
        files.append(SnapshotFile(name, *_opened(path, held)))
    files += _packs(drafts, packs)
    others = [path for path in sorted(folder.iterdir()) if is_part(path.name) and not path.name.startswith(_APART)]
    for path in [concepts / MANIFEST_NAME, *(file for other in others for file in _below(other))]:
        files.append(SnapshotFile(path.relative_to(folder).as_posix(), *_opened(path, held)))
    return Snapshot(namespace, chunks, tuple(sorted(files, key=lambda file: file.name)))


def _described(folder: Path, catalog: sqlite3.Connection) -> tuple[str, int]:
    """Namespace and number of chunks.

    Raises:
        ConfigurationError: The concepts lie elsewhere.
        StorageNotFoundError, UnsupportedFormatError: See `Manifest.parse`.
    """
    row = catalog.execute("SELECT value FROM meta WHERE key = ?", (META_KEY,)).fetchone()
    text = None if row is None else str(row[0])
    try:
        manifest = Manifest.parse(text)
    except UnsupportedFormatError:
        refuse_newer(text)
        raise
    if not (folder / CONCEPTS / MANIFEST_NAME).is_file():
        raise ConfigurationError(
            "the concepts of this storage do not lie in its folder, so a file cannot hold all of it",
            got=folder,
            expected=f"a storage with a folder {CONCEPTS}",
            next_step="back up the server that keeps its concepts by that server's own means, or run "
            "`compllm-rag verify` where they should lie in the folder",
        )
    (chunks,) = catalog.execute("SELECT count(*) FROM nodes").fetchone()
    return manifest.ingest.namespace, chunks


def _version(connection: sqlite3.Connection) -> int:
    """Another number whenever somebody else committed."""
    return int(connection.execute("PRAGMA data_version").fetchone()[0])


def _copy(source: sqlite3.Connection, target: Path, message: str, progress: Progress | None) -> None:
    """A database as its open transaction sees it."""

    def copied(status: int, remaining: int, total: int) -> None:
        if progress:
            progress(message, 1 - remaining / total if total else None)

    with translated_errors(target, writing=True, subject=EXPORT):  # within the other, which would blame the source
        target.unlink(missing_ok=True)
        make_private(target)
        writer = sqlite3.connect(target)
        try:
            source.backup(writer, pages=_PAGES, progress=copied)
        finally:
            writer.close()


def _packs(drafts: Path, packs: dict[str, tuple[int, BinaryIO]]) -> Iterator[SnapshotFile]:
    """The packs that the copied index names, up to the last byte that it names.

    Raises:
        FileNotFoundError: One was not among those opened.
    """
    index = LocationIndex(drafts, writable=False)
    try:
        runs = index.runs()
    finally:
        index.close()
    by_pack: dict[int, list[Run]] = {}
    for run in runs:
        by_pack.setdefault(run.pack, []).append(run)
    for number, of_pack in by_pack.items():
        name = pack_path(Path(), number).name
        if name not in packs:
            raise FileNotFoundError(errno.ENOENT, "a pack is gone", name)
        size, stream = packs[name]
        end = max(HEADER_BYTES, *(run.start + run.nbytes for run in of_pack))
        if end > size:
            raise _damaged(f"{name} has {size} bytes", end)
        yield SnapshotFile(f"{CONCEPTS}/packs/{name}", end, stream, tuple(of_pack))


def _below(path: Path) -> Iterator[Path]:
    if path.is_dir() and not path.is_symlink():
        yield from (file for file in sorted(path.rglob("*")) if file.is_file() and not file.is_symlink())
    elif path.is_file():
        yield path


def _opened(path: Path, held: ExitStack) -> tuple[int, BinaryIO]:
    """Bytes and stream of a file.

    Raises:
        FileNotFoundError: It is gone.
        ConfigurationError: This process may open no more files.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise ConfigurationError(
                "a process may not open as many files as this storage has",
                got=str(path),
                next_step="raise the limit (ulimit -n), which may be far below what the system allows, and try again",
            ) from error
        raise
    stream = held.enter_context(os.fdopen(handle, "rb", buffering=0))
    return os.fstat(handle).st_size, stream


def _damaged(got: str, expected: object = None) -> CorruptRecordError:
    return CorruptRecordError(
        "the storage is damaged; nothing was exported",
        got=got,
        expected=expected,
        next_step="run `compllm-rag repair`, then export again",
    )
