"""One writer at a time, held by the kernel, so that a dead process never leaves a lock behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from compllm_rag.errors import StoreLockedError
from compllm_rag.store.faults import translated_errors

# Windows locks the first byte against reading, too: there the pid is read and written behind it.
_PID_AT = 1 if sys.platform == "win32" else 0


class WriterLock:
    """An exclusive lock on a file that holds the pid of its owner: `flock`, or `LockFileEx` on Windows.

    The file is never removed: whoever unlinked it could take the name from under a process that waits on it.

    Args:
        path: The lock file; made when missing.

    Raises:
        StoreLockedError: Another writer holds it; the message names its pid.
        StoreReadOnlyError: The folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        # A soft lock, where a file system has no other, would outlive its process; so would one that a thread lost.
        self._lock = FileLock(
            path, timeout=0, mode=0o600, thread_local=False, fallback_to_soft=False, preserve_lock_file=True
        )
        with translated_errors(path, writing=True):
            # FileLock would make the folder; one that was deleted under a process stays deleted.
            path.parent.stat()
            try:
                self._lock.acquire()
            except Timeout as error:
                raise StoreLockedError(
                    "another writer has this concept store open",
                    got=f"process {_owner(path)} holding {path}",
                    next_step="wait for that process or stop it, or open the store with read_only=True",
                ) from error
            try:
                _sign(path)
            except BaseException:
                self._lock.release()
                raise

    def release(self) -> None:
        """Let the next writer in."""
        self._lock.release()


def _owner(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(_PID_AT)
        return file.read(20).decode("ascii", "replace").strip(" \0\n") or "unknown"


def _sign(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(_PID_AT)
        file.write(f"{os.getpid()}\n".encode())
        file.truncate()
