"""The lock of a catalog's writer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compllm_rag.errors import StoreLockedError
from compllm_rag.store.lock import WriterLock


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The writer's lock of a catalog whose vectors may be damaged, for a block.

    Raises:
        StoreLockedError: Another writer has uncommitted work.
    """
    lock = locked(folder)
    try:
        yield
    finally:
        lock.release()


def locked(folder: Path) -> WriterLock:
    """Take the lock.

    Raises:
        StoreLockedError: Another writer has uncommitted work.
    """
    try:
        return WriterLock(folder / "catalog.lock")
    except StoreLockedError as error:
        raise StoreLockedError(
            "another writer has uncommitted work in this catalog",
            got=error.got,
            next_step="wait for its commit, or open the catalog with read_only=True",
        ) from error
