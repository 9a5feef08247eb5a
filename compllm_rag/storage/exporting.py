"""Export: a storage as one file, for backups and moves, while others go on writing to it."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

from compllm_rag.errors import ConfigurationError
from compllm_rag.storage.archive import HEADER, ArchiveWriter, ExportHeader, HeldNamespace
from compllm_rag.storage.manifest import require_storage
from compllm_rag.storage.namespaces import existing_namespace, list_namespaces
from compllm_rag.storage.snapshot import EXPORT, Progress, Snapshot, SnapshotFile, snapshot
from compllm_rag.storage.staging import staged
from compllm_rag.store.faults import translated_errors
from compllm_rag.store.packs import sync_folder

logger = logging.getLogger(__name__)

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class StorageExport:
    """What an export wrote.

    Attributes:
        file: Its path.
        bytes: Its size.
        namespaces: Their names.
        chunks: Chunks of all of them.
        files: Files of all of them.
        seconds: Wall time.
    """

    file: str
    bytes: int
    namespaces: tuple[str, ...]
    chunks: int
    files: int
    seconds: float

    def fields(self) -> dict[str, Any]:
        """Plain values, as `export --json` prints them."""
        return asdict(self) | {"namespaces": list(self.namespaces)}


def export_storage(
    folder: str | Path, file: str | Path, *, namespace: str | None = None, progress: Progress | None = None
) -> StorageExport:
    """Write a storage into one file, which `import_storage` makes a storage of again.

    The file is a tar archive with the SHA-256 of everything in it. It holds one state of each namespace, whoever writes
    to it meanwhile. It is there at the end, whole and on the disk, or not at all. Packs and vectors are proven as they
    are read, so that damage is not carried into a backup. For the time that this takes, there must be room beside the
    file for a second copy of the databases (text and index).

    Args:
        folder: The storage.
        file: Where to; nothing may be there.
        namespace: The one to export; None takes all.
        progress: Called with a message and a share from 0 to 1.

    Raises:
        StorageNotFoundError: There is no storage here, or no such namespace.
        ConfigurationError: Something is there already, the file's folder is not, or the concepts do not lie in the
            storage.
        CorruptRecordError: The storage is damaged.
        UnsupportedFormatError: A newer release wrote it.
        StoreFullError: No space; nothing is left behind.
        StoreLockedError: Another process exports to this file, or the storage changed all the time.
        StoreReadOnlyError: The file cannot be written.
    """
    begun, target = time.perf_counter(), Path(file).absolute()
    folders = _folders(Path(folder).absolute(), namespace)
    if os.path.lexists(target):
        raise _taken(target)
    if not target.parent.is_dir():
        raise ConfigurationError("the folder of the export is not there", got=target.parent, next_step="make it first")
    with translated_errors(target, writing=True, subject=EXPORT), ExitStack() as held:
        drafts = held.enter_context(staged(target.with_name(f".{target.name}.exporting")))
        snapshots = []
        for number, one in enumerate(folders):
            (drafts / str(number)).mkdir(mode=0o700)
            snapshots.append(held.enter_context(snapshot(one, drafts / str(number), progress)))
        draft = drafts / "export"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        with os.fdopen(os.open(draft, flags, 0o600), "wb") as stream:
            _write(stream, folders[0] == Path(folder).absolute(), snapshots, progress)
            stream.flush()
            os.fsync(stream.fileno())
        size = draft.stat().st_size
        _put(draft, target)
        sync_folder(target.parent)
    made = StorageExport(
        str(target),
        size,
        tuple(one.namespace for one in snapshots),
        sum(one.chunks for one in snapshots),
        sum(len(one.files) for one in snapshots),
        time.perf_counter() - begun,
    )
    logger.info("exported: %d namespaces, %d chunks, %d bytes, %.1f s", len(snapshots), made.chunks, size, made.seconds)
    return made


def _folders(folder: Path, namespace: str | None) -> list[Path]:
    """Where the namespaces lie, the one of the folder itself first.

    Raises:
        StorageNotFoundError: There is none.
        ConfigurationError: One is half made or damaged.
    """
    if namespace is not None:
        found = existing_namespace(folder, namespace)
        require_storage(found)
        return [found]
    held = list_namespaces(folder)
    for one in held:
        if one.name is None:
            raise ConfigurationError(
                "a namespace of this storage was not made to its end, or is damaged",
                got=one.path,
                next_step="run the ingest into it again, or `compllm-rag repair` with this path; or export one "
                "namespace by its name",
            )
    return [one.path for one in held]


def _write(stream: BinaryIO, own: bool, snapshots: list[Snapshot], progress: Progress | None) -> None:
    writer = ArchiveWriter(stream)
    header = ExportHeader(
        release=_release(),
        namespaces=tuple(
            HeldNamespace(name=one.namespace, own=own and number == 0) for number, one in enumerate(snapshots)
        ),
    )
    data = header.model_dump_json(indent=1).encode() + b"\n"
    writer.add(HEADER, len(data), iter([data]))
    total, done = sum(file.size for one in snapshots for file in one.files), 0
    for number, one in enumerate(snapshots):
        for file in one.files:
            digest = writer.add(f"{number}/{file.name}", file.size, _shown(file, done, total, progress))
            done += file.size
            if file.sha256 and digest != file.sha256:
                raise file.damaged(digest)
    writer.finish()


def _shown(file: SnapshotFile, done: int, total: int, progress: Progress | None) -> Iterator[bytes]:
    for chunk in file.chunks():
        done += len(chunk)
        if progress:
            progress("writing the export", done / max(total, 1))
        yield chunk


def _put(draft: Path, target: Path) -> None:
    """Give a finished file its name, unless somebody else took it meanwhile."""
    try:
        os.link(draft, target)
    except FileExistsError as error:
        raise _taken(target) from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):  # a file system without hard links cannot look and rename in one step
            raise _taken(target) from error
        draft.rename(target)


def _taken(target: Path) -> ConfigurationError:
    return ConfigurationError(
        "something is there already, and an export overwrites nothing",
        got=target,
        expected="a new name",
        next_step="name another file, or remove that one first",
    )


def _release() -> str:
    try:
        return version("compllm-rag")
    except PackageNotFoundError:
        return "unknown"
