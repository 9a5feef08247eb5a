"""Import: a file that `export_storage` made becomes a storage again, whole or not at all."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from compllm_rag.catalog.generations import sync_folder
from compllm_rag.errors import (
    ConfigurationError,
    CorruptRecordError,
    StorageMismatchError,
    StorageNotFoundError,
    UnreadableFileError,
)
from compllm_rag.storage.archive import (
    HEADER,
    SUMS,
    ArchivedFile,
    ArchiveReader,
    ExportHeader,
    check_sums,
    damaged_export,
    no_export,
)
from compllm_rag.storage.manifest import CATALOG, read_manifest
from compllm_rag.storage.namespaces import DEFAULT, FOLDER, holds_storage, namespace_folder
from compllm_rag.storage.snapshot import INDEX, Progress
from compllm_rag.storage.staging import staged
from compllm_rag.storage.verification import verify_storage
from compllm_rag.store.faults import Subject, translated_errors

logger = logging.getLogger(__name__)

_IMPORT = Subject("the storage", "the storage", "free some space, then import again; nothing was left behind")


@dataclass(frozen=True)
class StorageImport:
    """What an import made.

    Attributes:
        folder: The storage.
        namespaces: Names of what was brought in.
        documents: Documents of all of them.
        chunks: Their chunks.
        bytes: Of all their files.
        seconds: Wall time.
    """

    folder: str
    namespaces: tuple[str, ...]
    documents: int
    chunks: int
    bytes: int
    seconds: float

    def fields(self) -> dict[str, Any]:
        """Plain values, as `import --json` prints them."""
        return asdict(self) | {"namespaces": list(self.namespaces)}


def import_storage(
    file: str | Path, folder: str | Path, *, namespace: str | None = None, progress: Progress | None = None
) -> StorageImport:
    """Make a storage of a file that `export_storage` wrote.

    Everything is unpacked beside its place, compared with the digests in the file, verified as `verify_storage` does,
    and renamed into place at the end. Into a storage that exists, other namespaces can be brought, each in one step.

    Args:
        file: The export.
        folder: The storage: a new or an empty folder, or a storage that has none of these namespaces.
        namespace: The one to import; None takes all that the file holds.
        progress: Called with a message and a share from 0 to 1.

    Raises:
        StorageNotFoundError: The file does not hold such a namespace.
        StorageMismatchError: Something lies there already; nothing is ever overwritten.
        UnsupportedFormatError: It is no export, a newer release made it, or it holds what no export does.
        CorruptRecordError: It is damaged.
        UnreadableFileError: It cannot be read.
        StoreFullError: No space; nothing is left behind.
        StoreLockedError: Another process imports to this place.
        StoreReadOnlyError: The folder cannot be written.
    """
    begun, source, target = time.perf_counter(), Path(file), Path(folder).absolute()
    with _opened(source) as stream:
        reader = ArchiveReader(stream, os.fstat(stream.fileno()).st_size)
        files = reader.files()
        first = next(files, None)
        if first is None or first.name != HEADER:
            raise no_export("another file than its header first" if first else "an empty archive")
        data = reader.bytes_of(first)
        header = ExportHeader.parse(data)
        digests: dict[str, str | None] = {HEADER: hashlib.sha256(data).hexdigest()}
        wanted = _wanted(header, namespace)
        places, new = _places(header, wanted, target)
        root = target if new else target / FOLDER
        with translated_errors(target, writing=True, subject=_IMPORT):
            root.parent.mkdir(parents=True, exist_ok=True)
            if not new:
                root.mkdir(mode=0o700, exist_ok=True)
            beside = target.with_name(f".{target.name}.importing") if new else root / ".importing"
            with staged(beside) as draft:
                size = _unpack(reader, files, wanted, draft, digests, progress)
                checks = [_verified(draft / str(number), header.namespaces[number].name, progress) for number in wanted]
                _settle(draft, places, target, new=new)
    made = StorageImport(
        str(target),
        tuple(header.namespaces[number].name for number in wanted),
        sum(check[0] for check in checks),
        sum(check[1] for check in checks),
        size,
        time.perf_counter() - begun,
    )
    logger.info("imported: %d namespaces, %d chunks, %d bytes, %.1f s", len(wanted), made.chunks, size, made.seconds)
    return made


def _opened(file: Path) -> BinaryIO:
    """Open the export.

    Raises:
        UnreadableFileError: It is not there, no plain file, or may not be read.
    """
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise UnreadableFileError(
            "the export cannot be read", got=f"{file}: {(error.strerror or '').lower()}", next_step="check its path"
        ) from error
    stream = os.fdopen(handle, "rb") if stat.S_ISREG(os.fstat(handle).st_mode) else None
    if stream is None:
        os.close(handle)
        raise UnreadableFileError("the export is no plain file", got=file, next_step="name a file")
    return stream


def _wanted(header: ExportHeader, namespace: str | None) -> list[int]:
    """Numbers of the namespaces to bring in."""
    names = [held.name for held in header.namespaces]
    if namespace is None:
        return list(range(len(names)))
    if namespace not in names:
        raise StorageNotFoundError(
            "the export holds no such namespace",
            got=repr(namespace),
            expected=f"one of {', '.join(map(repr, names[:10]))}",
            next_step="name one of these, or none to import all",
        )
    return [names.index(namespace)]


def _places(header: ExportHeader, wanted: list[int], target: Path) -> tuple[dict[int, Path], bool]:
    """Where each namespace goes, relative to the storage, and whether the storage is a new one.

    Raises:
        StorageMismatchError: Something is there already.
        ConfigurationError: A name can be none.
    """
    if os.path.ismount(target) and not any(target.iterdir()):
        raise ConfigurationError(
            "a volume's own folder cannot be imported to: a storage is put in its place whole, by one rename",
            got=target,
            expected="a new folder",
            next_step=f"name a folder in it, such as {target / 'storage'}",
        )
    new = not os.path.lexists(target) or (target.is_dir() and not target.is_symlink() and not any(target.iterdir()))
    if not new and not (holds_storage(target) or (target / FOLDER).is_dir()):
        raise StorageMismatchError(
            "something else lies where the storage should be",
            got=target,
            expected="a new or an empty folder, or a storage",
            next_step="name another folder",
        )
    places = {}
    for number in wanted:
        held = header.namespaces[number]
        place = namespace_folder(target, held.name)
        if new:
            # A storage may be of another name than `default` in its own folder: then it is again.
            place = target if held.own else target / FOLDER / namespace_folder(Path(os.devnull), held.name).name
            if held.name == DEFAULT:
                place = target
        elif place == target or os.path.lexists(place):
            there = os.path.lexists(target / CATALOG) if place == target else True
            raise StorageMismatchError(
                "a namespace of this name is there already"
                if there
                else "this namespace can only be brought into a folder of its own",
                got=f"{held.name!r} in {target}",
                expected="a new folder, or a storage without it",
                next_step="import into a new folder, or delete that namespace first",
            )
        places[number] = place.relative_to(target)
    return places, new


def _unpack(
    reader: ArchiveReader,
    files: Iterator[ArchivedFile],
    wanted: list[int],
    draft: Path,
    digests: dict[str, str | None],
    progress: Progress | None,
) -> int:
    """Write the files of the namespaces wanted, prove all digests, and tell how many bytes they have."""
    size, sums = 0, None
    for found in files:
        if sums is not None:
            raise no_export(f"a file behind its digests: {found.name}")
        if found.name == SUMS:
            sums = reader.bytes_of(found)
            continue
        first, _, rest = found.name.partition("/")
        if int(first) not in wanted or first != str(int(first)):
            digests[found.name] = None
            continue
        digests[found.name] = _write(reader, found, draft / first / rest, progress)
        size += found.size
    if sums is None:
        raise damaged_export("no list of digests at its end: it was cut off")
    check_sums(sums, digests)
    for number in wanted:
        for name in (CATALOG, INDEX):
            if f"{number}/{name}" not in digests:
                raise damaged_export(f"no {number}/{name}")
    return size


def _write(reader: ArchiveReader, found: ArchivedFile, path: Path, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, flags, 0o600)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise no_export(f"a file in the place of a folder: {found.name}") from error
    with os.fdopen(handle, "wb") as stream:
        for chunk in reader.chunks(found):
            digest.update(chunk)
            stream.write(chunk)
            if progress:
                progress("unpacking the export", reader.share)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _verified(folder: Path, name: str, progress: Progress | None) -> tuple[int, int]:
    """Prove that a storage was unpacked; gives its documents and chunks."""
    own = read_manifest(folder).ingest.namespace
    if own != name:
        raise damaged_export(f"a storage of the namespace {own!r}", repr(name))
    check = verify_storage(folder, progress=progress)
    if not check.sound:
        first = check.findings[0]
        raise CorruptRecordError(
            "the storage in the export is damaged; nothing was imported",
            got=f"{check.n_findings} findings, the first in {first.part}: {first.what}",
            next_step="take another export",
        )
    return check.documents, check.chunks


def _settle(draft: Path, places: Mapping[int, Path], target: Path, *, new: bool) -> None:
    """Move what was unpacked and proven into its place."""
    for folder in [path for path in draft.rglob("*") if path.is_dir()]:
        folder.chmod(0o700)
        sync_folder(folder)
    if not new:
        for number, place in places.items():
            (draft / str(number)).rename(target / place)
        sync_folder(target / FOLDER)
        return
    whole = draft / "whole"
    for number, place in sorted(places.items(), key=lambda item: len(item[1].parts)):
        (whole / place).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        (draft / str(number)).rename(whole / place)
    for folder in (whole, whole / FOLDER):
        if folder.is_dir():
            sync_folder(folder)
    try:
        if target.is_dir():
            target.rmdir()  # it was empty a moment ago
        whole.rename(target)
    except OSError as error:
        if os.path.lexists(target):
            raise ConfigurationError(
                "something came to lie where the storage should be, while it was unpacked",
                got=target,
                next_step="name another folder",
            ) from error
        raise
    sync_folder(target.parent)
