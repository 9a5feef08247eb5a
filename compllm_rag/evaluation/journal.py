"""Finished parts of a long run, kept in a file, so that a run that was interrupted goes on where it stood."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compllm_rag.errors import ConfigurationError

_START = b'{"key": "'  # of every line
_RUN = "run"  # key of the line that says which run a file is of


class Journal:
    """Results by what they depend on, one a line.

    Args:
        path: File of JSON lines, made when the first result comes. None keeps results in memory alone.
        run: What all results of a run depend on, as JSON can hold it; it is the file's first line, so that a file of
            another run is told from this one's. None: results of several runs may lie in one file.

    Raises:
        ConfigurationError: The file is no journal, or that of another run; it is left as it is.
    """

    def __init__(self, path: Path | None = None, run: Mapping[str, Any] | None = None) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        self._torn = False
        if path is not None and path.exists():
            self._read(path)
        self._run = None if run is None or self._known else json.loads(json.dumps(run))
        if run is not None and self._known and self._known.get(_RUN) != json.loads(json.dumps(run)):
            raise _of_another_run(path, self._known.get(_RUN) or {}, run)

    def _read(self, path: Path) -> None:
        lines = path.read_bytes().split(b"\n")
        last = lines.pop()  # a run was killed within its last line, else empty
        self._torn = bool(last)
        for number, line in enumerate(lines, 1):
            try:
                part = json.loads(line)
                self._known[part["key"]] = part["result"]
            except (ValueError, KeyError, TypeError):
                raise _foreign(path, number, line) from None
        if not (last.startswith(_START) or _START.startswith(last)):
            raise _foreign(path, len(lines) + 1, last)

    def get(self, what: Mapping[str, Any]) -> Any:
        """The result of what it depends on, None if it is not there."""
        return self._known.get(_key(what))

    def put(self, what: Mapping[str, Any], result: Any) -> None:
        """Keep a result, durable on return.

        Args:
            what: All that the result depends on, as JSON can hold it.
            result: As JSON can hold it.
        """
        self._known[_key(what)] = result
        lines = [{"key": _key(what), "result": result}]
        if self._run is not None:
            lines.insert(0, {"key": _RUN, "result": self._run})
            self._run = None
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            if self._torn:
                file.truncate(self._path.read_bytes().rfind(b"\n") + 1)
                self._torn = False
            file.write("".join(f"{json.dumps(line)}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())


def _of_another_run(path: Path | None, there: Mapping[str, Any], run: Mapping[str, Any]) -> ConfigurationError:
    other = sorted(name for name in there.keys() | run.keys() if there.get(name) != run.get(name))
    return ConfigurationError(
        f"{path} is of another run",
        got=", ".join(f"{name} {there.get(name)!r}" for name in other),
        expected=", ".join(f"{name} {run.get(name)!r}" for name in other),
        next_step="name another file, or remove this one and start again",
    )


def _foreign(path: Path, number: int, line: bytes) -> ConfigurationError:
    return ConfigurationError(
        f"line {number} of {path} is no finished part of a run",
        got=repr(line[:60]),
        expected="lines that a run wrote there",
        next_step="name another file, or remove this one and start again",
    )


def _key(what: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
