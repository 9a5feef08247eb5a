"""Real Redis servers for tests: each in a folder of its own, on a free port of the loopback interface."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

import pytest
import redis

_PROGRAMS = ("redis-server", "valkey-server")
_START_S = 30.0


def installed() -> str:
    """The server's program; where it is not installed the test is skipped, and fails in CI, which installs it."""
    found = next((path for path in map(shutil.which, _PROGRAMS) if path), None)
    if found is None:
        message = "redis-server is not installed (apt-get install redis-server)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return found


class RedisProcess:
    """One server; ends with the block.

    Args:
        folder: Where it keeps its files; made.
        *settings: More words of its command line.
    """

    def __init__(self, folder: Path, *settings: str) -> None:
        folder.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        self._settings = ["--save", "", "--appendonly", "yes", "--appendfsync", "always", *settings]
        self.password: str | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, password=self.password)

    def start(self) -> None:
        """Start it, on the same port and in the same folder as before, and wait until it answers."""
        own = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--daemonize", "no"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen([installed(), *own, *self._settings], stdout=log, stderr=log)
        deadline = time.monotonic() + _START_S
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.exceptions.AuthenticationError:
                return
            except redis.exceptions.ConnectionError:
                assert self._process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.02)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(60)
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
