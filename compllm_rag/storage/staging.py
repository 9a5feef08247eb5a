"""A folder to make something in, out of everybody's sight, that is gone when the block ends, however it ends.

What a killed process left there is found by its name and removed by whoever comes next.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compllm_rag.errors import StoreLockedError
from compllm_rag.store.lock import WriterLock

_LOCK = "lock"


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Make an empty folder, closed to other users; it is removed at the end of the block.

    Args:
        folder: Its path, on the file system where what is made in it will lie; the same for the same purpose, so that
            what an earlier process left is found.

    Raises:
        StoreLockedError: Another process is at the same.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        lock = WriterLock(folder / _LOCK)
    except StoreLockedError as error:
        raise StoreLockedError(
            "another process is making the same", got=error.got, next_step="wait for it, or name another place"
        ) from error
    try:
        for path in folder.iterdir():
            if path.name != _LOCK:
                remove(path)
        yield folder
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all it holds; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
