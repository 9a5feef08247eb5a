"""One writer at a time, held by the kernel, so that a dead process never leaves a lock behind."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from compllm_rag.errors import StoreLockedError
from compllm_rag.store.faults import translated_errors


class WriterLock:
    """An exclusive `flock` on a file that holds the pid of its owner.

    The file is never removed: whoever unlinked it could take the name from under a process that waits on it.

    Args:
        path: The lock file; made when missing.

    Raises:
        StoreLockedError: Another writer holds it; the message names its pid.
        StoreReadOnlyError: The folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        with translated_errors(path, writing=True):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                self._acquire(path)
            except BaseException:
                os.close(self._file)
                raise

    def _acquire(self, path: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(self._file, 20, 0).decode("ascii", "replace").strip() or "unknown"
            raise StoreLockedError(
                "another writer has this concept store open",
                got=f"process {pid} holding {path}",
                next_step="wait for that process or stop it, or open the store with read_only=True",
            ) from error
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let the next writer in."""
        os.close(self._file)
