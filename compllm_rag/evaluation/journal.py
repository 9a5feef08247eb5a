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


class Journal:
    """Results by what they depend on, one a line.

    Args:
        path: File of JSON lines, made when the first result comes. None keeps results in memory alone.

    Raises:
        ConfigurationError: The file is no journal; it is left as it is.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, dict[str, Any]] = {}
        self._torn = False
        if path is None or not path.exists():
            return
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

    def get(self, what: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of what it depends on, None if it is not there."""
        return self._known.get(_key(what))

    def put(self, what: Mapping[str, Any], result: dict[str, Any]) -> None:
        """Keep a result, durable on return.

        Args:
            what: All that the result depends on, as JSON can hold it.
            result: As JSON can hold it.
        """
        self._known[_key(what)] = result
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            if self._torn:
                file.truncate(self._path.read_bytes().rfind(b"\n") + 1)
                self._torn = False
            file.write(json.dumps({"key": _key(what), "result": result}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _foreign(path: Path, number: int, line: bytes) -> ConfigurationError:
    return ConfigurationError(
        f"line {number} of {path} is no finished part of a run",
        got=repr(line[:60]),
        expected="lines that a run wrote there",
        next_step="name another file, or remove this one and start again",
    )


def _key(what: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
