"""API keys: a file of digests, one key for one namespace.

A key is 256 random bits, so a plain SHA-256 of it cannot be undone by trying, and there is nothing to salt. All digests
are compared, each in constant time, so that how long it takes tells nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock
from pydantic import Field, ValidationError

from compllm_rag.config import Frozen, IngestConfig
from compllm_rag.errors import ConfigurationError, UnsupportedFormatError

Rights = Literal["read", "write", "metrics"]
DEFAULT_NAMESPACE: str = IngestConfig.model_fields["namespace"].default
_PREFIX = "crag-"
_LONGEST = 200


class ApiKey(Frozen):
    """What is kept of a key.

    Attributes:
        name: Whose it is; stands in logs.
        namespace: The one it belongs to.
        rights: `read`, `write` (and read), or `metrics` alone.
        sha256: Of the key.
        created: When, UTC.
    """

    name: str = Field(min_length=1, max_length=100)
    namespace: str = Field(min_length=1, max_length=200)
    rights: Rights = "write"
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    created: str = ""


class _KeyFile(Frozen):
    format_version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()


class KeyFile:
    """The keys in a file; looked at again whenever it has changed.

    Args:
        path: The file; it need not be there.

    Raises:
        UnsupportedFormatError: It is no file of keys.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._keys: tuple[ApiKey, ...] = ()
        self._read()

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """All of them, as the file has them now.

        Raises:
            UnsupportedFormatError: It is no file of keys any more.
        """
        self._read()
        return self._keys

    def find(self, given: str) -> ApiKey | None:
        """What is known of a key that a client sent; None when it is no key."""
        if len(given) > _LONGEST:
            return None
        digest, found = _digest(given), None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def add(self, name: str, namespace: str = DEFAULT_NAMESPACE, rights: Rights = "write") -> str:
        """Make a key.

        Returns:
            The key itself, which is nowhere else.

        Raises:
            ConfigurationError: There is one of this name, or a value makes no sense.
        """
        given = _PREFIX + secrets.token_urlsafe(32)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            made = ApiKey(name=name, namespace=namespace, rights=rights, sha256=_digest(given), created=created)
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigurationError(
                f"{first['loc'][0]} of an API key makes no sense",
                got=ascii(first["input"])[:80],
                expected=first["msg"],
                next_step="choose another",
            ) from error
        with self._changing():
            if any(key.name == name for key in self.keys):
                raise ConfigurationError(
                    "there is a key of this name",
                    got=ascii(name),
                    next_step="choose another name, or remove that key first",
                )
            self._write((*self.keys, made))
        return given

    def remove(self, name: str) -> ApiKey:
        """Remove a key; it is refused from now on.

        Raises:
            ConfigurationError: There is none of this name.
        """
        with self._changing():
            gone = next((key for key in self.keys if key.name == name), None)
            if gone is None:
                known = ", ".join(ascii(key.name) for key in self.keys) or "none"
                raise ConfigurationError("there is no key of this name", got=ascii(name), expected=known)
            self._write(tuple(key for key in self.keys if key.name != name))
        return gone

    def _changing(self) -> FileLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self.path}.lock", timeout=10)

    def _read(self) -> None:
        with self._lock:
            try:
                facts = self.path.stat()
            except FileNotFoundError:
                self._seen, self._keys = None, ()
                return
            seen = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
            if seen == self._seen:
                return
            try:
                self._keys = _KeyFile.model_validate_json(self.path.read_bytes()).keys
            except (ValidationError, UnicodeDecodeError) as error:
                raise UnsupportedFormatError(
                    "this is no file of API keys that this release reads",
                    got=self.path,
                    expected="one made by `compllm-rag keys add`",
                    next_step="restore it, or make a new one",
                ) from error
            self._seen = seen

    def _write(self, keys: tuple[ApiKey, ...]) -> None:
        """Replace the file in one step; only its owner may read it."""
        text = json.dumps(_KeyFile(keys=keys).model_dump(), indent=1)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        self._read()


def _digest(given: str) -> str:
    return hashlib.sha256(given.encode(errors="surrogatepass")).hexdigest()
