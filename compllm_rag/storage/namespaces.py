"""Several tenants in one storage folder: each namespace is a storage of its own in a sub-folder of its own.

```
<storage>/                          the namespace `default` (or whichever a storage of before was made with)
<storage>/namespaces/<digest>/      any other, by the SHA-256 of its name
```

Nothing is shared: no text, no vectors, no packs, no index, no counts, no locks. So there is nothing through which one
tenant could see another, be it by how long something takes, and deleting a namespace is deleting a folder.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from compllm_rag.catalog.database import claimed
from compllm_rag.catalog.faults import translated_errors
from compllm_rag.catalog.generations import sync_folder
from compllm_rag.config import IngestConfig, checked
from compllm_rag.errors import CompLLMError, ConfigurationError, StorageNotFoundError
from compllm_rag.storage.manifest import CATALOG, CONCEPTS, read_manifest
from compllm_rag.storage.stores import open_store
from compllm_rag.store.lock import WriterLock
from compllm_rag.store.manifest import MANIFEST_NAME
from compllm_rag.store.redis import RedisStore
from compllm_rag.store.writing import LOCK_NAME

FOLDER = "namespaces"
DEFAULT: str = IngestConfig.model_fields["namespace"].default
_DELETED = ".deleted-"
# Parts of a storage, in the order in which they are deleted where they have no folder to themselves: as long as the
# catalog is there, it can be seen that the rest has to go.
_STORE_PARTS = {MANIFEST_NAME, "packs", "index", LOCK_NAME}  # of a concept store; one that was just begun has fewer
# Of these names a folder may have parts that were never a storage's: without a catalog they are left alone.
_COMMON = ("backup-v[0-9]*", "compressor", "reader")
_PARTS = (
    "vectors-[0-9]*.faiss", "vectors-[0-9]*.faiss.tmp", "vectors-[0-9]*.log", "concepts", "concepts.damaged[0-9]*",
    "backup-v[0-9]*", "compressor", "reader", "watch.lock", "catalog.lock", "catalog.db-wal", "catalog.db-shm",
    "catalog.db",
)  # fmt: skip


def holds_storage(folder: Path) -> bool:
    """Whether files of a storage lie in a folder, be it damaged or half made; perhaps beside others."""
    parts = (CONCEPTS, "compressor", "reader", FOLDER)
    try:
        return (folder / CATALOG).is_file() and any((folder / part).is_dir() for part in parts)
    except OSError:  # it may not be entered
        return False


def is_part(name: str) -> bool:
    """Whether a file or folder of this name, in a folder that holds a storage, is the storage's."""
    return name.startswith(_DELETED) or any(fnmatch.fnmatchcase(name, part) for part in (*_PARTS, FOLDER))


@dataclass(frozen=True)
class Namespace:
    """One tenant of a storage folder.

    Attributes:
        name: Its name; None where the making was interrupted or the manifest is damaged.
        path: Where its storage lies; `verify`, `repair` and `compact` take this path.
        bytes: Of all its files.
    """

    name: str | None
    path: Path
    bytes: int


def namespace_folder(storage: str | Path, name: str | None) -> Path:
    """Where the storage of a namespace lies, or would lie.

    Args:
        storage: The storage folder.
        name: The namespace; None for the one that lies in the folder itself.

    Raises:
        ConfigurationError: This cannot be a name.
    """
    folder = Path(storage)
    if name is None or _check(name) == (_own(folder) or DEFAULT):
        return folder
    return folder / FOLDER / _digest(name)


def existing_namespace(storage: str | Path, name: str | None) -> Path:
    """The same for one that should be there.

    Raises:
        ConfigurationError: This cannot be a name.
        StorageNotFoundError: It is not there.
    """
    root = Path(storage)
    folder = namespace_folder(root, name)
    if (folder / CATALOG).is_file() or (name in (None, DEFAULT) and not any(_sub_folders(root))):
        return folder  # or whoever opens it will say what is missing
    raise StorageNotFoundError(
        "there is no such namespace in this storage",
        got=repr(name or DEFAULT),
        expected="one of those that `compllm-rag namespace list` tells",
        next_step="name another, or ingest into this one first",
    )


def list_namespaces(storage: str | Path) -> list[Namespace]:
    """All namespaces of a storage folder, the one of the folder itself first, then by name.

    Raises:
        StorageNotFoundError: There is none.
    """
    folder = Path(storage)
    found = [_described(path) for path in _sub_folders(folder)]
    found.sort(key=lambda namespace: namespace.name or "")
    if _is_begun(folder):
        own = sum(_size(path) for path in _own_parts(folder))
        found.insert(0, Namespace(_own(folder), folder, own))
    if not found:
        raise StorageNotFoundError(
            "there is no storage here", got=folder, next_step=f"run `compllm-rag ingest PATH --storage {folder}` first"
        )
    return found


def delete_namespace(storage: str | Path, name: str) -> int:
    """Delete a namespace: text, vectors, concepts, counts, adapters. A deletion that was killed is run again.

    A process that has it open goes on with what it has opened; end it first.

    Returns:
        How many bytes there were.

    Raises:
        StorageNotFoundError: There is no such namespace.
        StoreLockedError: A process writes to it.
        StoreReadOnlyError: The folder cannot be written.
        StoreUnavailableError: Its concepts lie in a shared store that cannot be reached; nothing was deleted.
    """
    root = Path(storage)
    folder, freed = namespace_folder(root, _check(name)), _purge(root)
    if not (_is_begun(folder) if folder == root else folder.is_dir()):
        if freed:
            return freed  # what a deletion that was killed had left
        raise StorageNotFoundError(
            "there is no such namespace", got=repr(name), next_step=f"see `compllm-rag namespace list --storage {root}`"
        )
    with _locked(folder), translated_errors(folder, writing=True):
        _release_concepts(folder)
        if folder == root:
            freed += sum(_size(path) for path in _own_parts(folder))
            for path in _own_parts(folder):
                _remove(path)
            sync_folder(folder)
        else:
            freed += _size(folder)
            # In one step out of everybody's sight, then file by file.
            folder.rename(folder.parent / f"{_DELETED}{secrets.token_hex(8)}")
            sync_folder(folder.parent)
    _purge(root)
    return freed


def prepare_namespace(storage: Path, folder: Path) -> None:
    """Make what a namespace's folder lies in, closed to other users.

    Raises:
        ConfigurationError: The storage is a file.
        StoreReadOnlyError: It cannot be written.
    """
    if folder != storage:
        if storage.exists() and not storage.is_dir():
            raise ConfigurationError("storage is not a folder", got=storage, expected="a folder")
        with translated_errors(folder, writing=True):
            storage.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.parent.mkdir(mode=0o700, exist_ok=True)


def _release_concepts(folder: Path) -> None:
    """Give up what a storage has in a shared concept store; as long as that fails, the folder stays as it is."""
    try:
        manifest = read_manifest(folder)
    except CompLLMError:
        return  # damaged, or half made: it cannot be told
    store = open_store(manifest, folder / CONCEPTS) if manifest.concept_store is not None else None
    if isinstance(store, RedisStore):
        with store:
            store.release()


def _check(name: str) -> str:
    try:
        str.encode(name)
    except (UnicodeEncodeError, TypeError) as error:
        raise _senseless(name) from error
    try:
        return checked(IngestConfig, namespace=name).namespace
    except ConfigurationError as error:
        raise _senseless(name) from error


def _senseless(name: str) -> ConfigurationError:
    return ConfigurationError(
        "namespace makes no sense", got=ascii(name)[:80], expected="1 to 200 characters of valid Unicode"
    )


def _digest(name: str) -> str:
    return hashlib.sha256(b"compllm-rag/namespace/1\0" + name.encode()).hexdigest()


def _own(folder: Path) -> str | None:
    """The namespace of the storage that lies in the folder itself; None when none is made, or it cannot be told."""
    with suppress(CompLLMError):
        return read_manifest(folder).ingest.namespace
    return None


def _sub_folders(folder: Path) -> Iterator[Path]:
    if (folder / FOLDER).is_dir():
        yield from (path for path in sorted((folder / FOLDER).iterdir()) if not path.name.startswith("."))


def _described(path: Path) -> Namespace:
    name = _own(path)
    return Namespace(name if name is not None and _digest(name) == path.name else None, path, _size(path))


def _own_parts(folder: Path) -> list[Path]:
    named = (folder / CATALOG).exists()
    patterns = [
        pattern
        for pattern in _PARTS
        if named or (pattern not in _COMMON and (pattern != CONCEPTS or _is_store(folder / CONCEPTS)))
    ]
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def _is_begun(folder: Path) -> bool:
    there = (folder / CATALOG).exists() or _is_store(folder / CONCEPTS)
    return there or any(folder.glob("vectors-[0-9]*.faiss"))


def _is_store(folder: Path) -> bool:
    """Whether a folder holds parts of a concept store and nothing else; `concepts` is a name that others use, too."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    names = {path.name for path in folder.iterdir()}
    return bool(names) and all(name in _STORE_PARTS or name.startswith(f"{MANIFEST_NAME}.") for name in names)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Both writers' locks, so that nobody writes into what is being deleted."""
    with claimed(folder):
        concepts = folder / CONCEPTS
        lock = WriterLock(concepts / "writer.lock") if concepts.is_dir() else None
        try:
            yield
        finally:
            if lock is not None:
                lock.release()


def _purge(root: Path) -> int:
    """Remove what was put out of sight; gives its bytes."""
    freed = 0
    for path in (root / FOLDER).glob(f"{_DELETED}*"):
        freed += _size(path)
        _remove(path)
    return freed


def _remove(path: Path) -> None:
    with translated_errors(path, writing=True):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, onerror=_raise_unless_gone)
        else:
            path.unlink(missing_ok=True)


def _raise_unless_gone(function: object, path: str, error: tuple[type[BaseException], BaseException, object]) -> None:
    """What somebody else has deleted meanwhile need not be deleted."""
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


def _size(path: Path) -> int:
    if not path.is_dir():
        return bytes_of(path)
    return sum(bytes_of(Path(top) / name) for top, _, names in os.walk(path) for name in names)


def bytes_of(path: Path) -> int:
    """Size of a file, 0 for one that is gone: writers replace files while they are counted."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
