"""Processes of their own for tests: whatever goes wrong, they and all they started end, and whoever waits goes on.

A test that fails or is cut off must leave nobody behind who writes to a folder for ever, or holds on to a pipe that
somebody reads to its end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence

LIMIT_S = 200.0
# The first lines of a script: Linux ends it when the process that started it does, be that by os._exit.
DIES_WITH_ITS_PARENT = """
import contextlib, ctypes
with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).prctl(1, 9)
"""


@contextlib.contextmanager
def started(command: Sequence[str], limit: float = LIMIT_S) -> Iterator[subprocess.Popen[str]]:
    """A process that one can talk to line by line; it and all it started are killed at the end.

    After `limit` seconds they are killed as well, so that every wait for it ends. What it says on stderr goes to a
    file, `errors` reads it: a pipe that nobody empties would stop it in the middle.
    """
    with tempfile.TemporaryFile("w+") as said_wrong:
        process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said_wrong, text=True,
            start_new_session=True,
        )  # fmt: skip
        process.said_wrong = said_wrong
        watch = threading.Timer(limit, _kill, [process])
        watch.daemon = True
        watch.start()
        try:
            yield process
        finally:
            watch.cancel()
            _kill(process)
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was not read in time
                    pipe.close()
            process.wait(60)


def run(command: Sequence[str], limit: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
    """Run a process to its end; it is killed, with all it started, after `limit` seconds."""
    with started(command, limit) as process:
        process.stdin.close()
        out = process.stdout.read()
        code = process.wait(limit)
        return subprocess.CompletedProcess(list(command), code, out, errors(process))


def hearing_interrupts(command: Sequence[str]) -> list[str]:
    """The command as a process that ends at SIGINT: a shell starts its background jobs deaf to it, and so on down."""
    script = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", script, *command]


def said(process: subprocess.Popen[str]) -> str:
    """The next line a process prints."""
    line = process.stdout.readline()
    if not line:
        raise AssertionError(f"it ended or took too long: {errors(process)}")
    return line.strip()


def tell(process: subprocess.Popen[str], line: str = "") -> None:
    """Give a process a line."""
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def errors(process: subprocess.Popen[str]) -> str:
    """What a process said on stderr so far."""
    process.said_wrong.seek(0)
    return process.said_wrong.read()


def join(threads: Sequence[threading.Thread], limit: float = 60.0) -> None:
    """Wait for threads, which should be daemons, and fail when one does not end."""
    for thread in threads:
        thread.join(limit)
    assert not any(thread.is_alive() for thread in threads)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
