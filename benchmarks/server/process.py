"""A server process for benchmarks: `compllm-rag serve` on the loopback address, ended as an operator would."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

_START_S = 300.0
_END_S = 90.0
_LONGEST_WAIT_S = 5.0  # however long a refusal says: a benchmark must go on


@contextlib.contextmanager
def served(storage: Path, options: Sequence[object], log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server and its address.

    Args:
        storage: What it serves.
        options: Of `compllm-rag serve`, beside the storage and the port.
        log: A file for what it writes to standard error.

    Raises:
        RuntimeError: It did not start; the end of the log is told.
    """
    words = ["serve", storage, "--port", 0, "--requests-per-minute", 1_000_000, *options]
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-m", "compllm_rag.cli", *map(str, words)], stderr=file)
    try:
        deadline = time.monotonic() + _START_S
        while not (found := re.search(r"listening on (http://\S+)", log.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield found[1], process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process took; what can be trusted of a machine that does something else as well."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_refusal(response: httpx.Response) -> bool:
    """Whether the server asks to come again later."""
    return response.status_code in (429, 503)


def patience_s(response: httpx.Response) -> float:
    """Seconds to wait after a refusal."""
    return min(float(response.headers["retry-after"]), _LONGEST_WAIT_S)
