"""Bringing a storage to the format of this release, with a copy of the former one kept beside it.

A step leads from one format to the next: it changes rows within one transaction, in which the manifest gets the new
number as well. Files that a step changes it writes under new names, which the rows then name. So a migration that is
killed leaves the storage in one format or another, and is run again. There is one format so far, and no step.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.database import claimed, connected
from compllm_rag.catalog.faults import translated_errors
from compllm_rag.catalog.generations import sync_folder
from compllm_rag.config import FORMAT_VERSION
from compllm_rag.errors import UnsupportedFormatError
from compllm_rag.storage.manifest import CATALOG, CONCEPTS, META_KEY, Manifest, refuse_newer, require_storage
from compllm_rag.storage.stores import open_store
from compllm_rag.store.index_database import make_private
from compllm_rag.store.lock import WriterLock

Step = Callable[[Path, sqlite3.Connection], None]
STEPS: dict[int, Step] = {}  # by the format they start from
BACKUP = "backup-v{}"
_DATABASES = (CATALOG, f"{CONCEPTS}/index/cache.db")
_WRITER = "writer.lock"
_LEFT_OUT = ("namespaces", "backup-v*", "*.lock", "*.db", "*.db-wal", "*.db-shm", "*.tmp", "concepts.damaged*")


@dataclass(frozen=True)
class Migration:
    """What a migration did.

    Attributes:
        from_version: Format the storage had.
        to_version: Format it has now.
        backup: Folder with the storage as it was; None where there was nothing to do.
    """

    from_version: int
    to_version: int
    backup: str | None = None

    @property
    def changed(self) -> bool:
        """Whether there was anything to do."""
        return self.from_version != self.to_version

    def fields(self) -> dict[str, Any]:
        """Plain values, as `migrate --json` prints them."""
        return {"changed": self.changed, **asdict(self)}


def migrate_storage(folder: str | Path) -> Migration:
    """Bring a storage to the format of this release; one of that format is opened, and left as it is.

    The former storage is copied to `backup-v<format>` in the folder first. The copy is a storage of its own, holds what
    is deleted later, and is nobody's to remove but the user's. Namespaces are storages of their own, with formats of
    their own.

    Args:
        folder: The storage.

    Raises:
        StorageNotFoundError: There is no storage here.
        UnsupportedFormatError: A newer release wrote it, or it is older than anything this release can read.
        CorruptRecordError: It is damaged.
        StoreFullError: No space for the copy; the storage is as it was.
        StoreLockedError: Another process writes.
        StoreReadOnlyError: The storage cannot be written.
    """
    path = Path(folder).absolute()
    require_storage(path)
    version = _version(path)
    if version == FORMAT_VERSION:
        with Catalog.open(path, read_only=True) as catalog:
            manifest = Manifest.parse(catalog.get_meta(META_KEY))
        open_store(manifest, path / CONCEPTS, read_only=True).close()
        return Migration(version, version)
    for number in range(version, FORMAT_VERSION):
        if number not in STEPS:
            raise UnsupportedFormatError(
                "this release has no way from the format of this storage",
                got=f"format {version} in {path}",
                expected=f"format {min(STEPS, default=FORMAT_VERSION)} or newer",
                next_step="migrate it with an older release first, or ingest again into a new storage",
            )
    with _nobody_writes(path):
        backup = _back_up(path, version)
        with connected(path / CATALOG, writing=True) as connection:
            try:
                for number in range(version, FORMAT_VERSION):
                    _run(STEPS[number], path, connection, number + 1)
            finally:
                connection.close()
    return Migration(version, FORMAT_VERSION, str(backup))


def _version(folder: Path) -> int:
    with connected(folder / CATALOG, writing=False) as connection:
        try:
            row = connection.execute("SELECT value FROM meta WHERE key = ?", (META_KEY,)).fetchone()
        finally:
            connection.close()
    text = None if row is None else str(row[0])
    refuse_newer(text)
    try:
        version: int = json.loads(text or "")["format_version"] + 0
    except (ValueError, TypeError, KeyError):
        return Manifest.parse(text).format_version  # raises
    return version


@contextmanager
def _nobody_writes(folder: Path) -> Iterator[None]:
    with claimed(folder), ExitStack() as held:
        if (folder / CONCEPTS).is_dir():
            held.callback(WriterLock(folder / CONCEPTS / _WRITER).release)
        yield


def _run(step: Step, folder: Path, connection: sqlite3.Connection, version: int) -> None:
    connection.execute("BEGIN IMMEDIATE")
    step(folder, connection)
    connection.execute(
        "UPDATE meta SET value = json_set(value, '$.format_version', ?) WHERE key = ?", (version, META_KEY)
    )
    connection.execute("COMMIT")


def _back_up(folder: Path, version: int) -> Path:
    """Copy a storage that nobody writes to. A copy that is there already may be older than the storage is."""
    made = folder / BACKUP.format(version)
    draft = made.with_name(f"{made.name}.tmp")
    with translated_errors(made, writing=True):
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(folder, draft, ignore=shutil.ignore_patterns(*_LEFT_OUT), symlinks=True)
        for name in [name for name in _DATABASES if (folder / name).exists()]:  # concepts may lie elsewhere
            _copy_database(folder / name, draft / name)
        for path in [draft, *draft.rglob("*")]:
            if path.is_dir():
                path.chmod(0o700)
                sync_folder(path)
            elif not path.is_symlink() and path.name not in ("cache.db", CATALOG):
                _sync(path)
        shutil.rmtree(made, ignore_errors=True)
        draft.rename(made)
        sync_folder(folder)
    return made


def _copy_database(source: Path, target: Path) -> None:
    """By SQLite, which alone may open a database, and which alone knows what its journal holds."""
    make_private(target)
    with connected(source, writing=False) as reader:
        try:
            with translated_errors(target, writing=True):  # within the other, which would blame the source
                writer = sqlite3.connect(target)
                try:
                    reader.backup(writer)
                finally:
                    writer.close()  # durable: the journal is written back
        finally:
            reader.close()


def _sync(path: Path) -> None:
    path.chmod(0o600)
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
