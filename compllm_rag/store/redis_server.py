"""A Redis or Valkey server as the store sees it: where it is, whether it keeps what it is given, and its errors."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from compllm_rag.errors import (
    CompLLMError,
    ConfigurationError,
    CorruptRecordError,
    MissingExtraError,
    StoreFullError,
    StoreReadOnlyError,
    StoreSettingsWarning,
    StoreUnavailableError,
)

if TYPE_CHECKING:
    import redis

Made = TypeVar("Made")

SCHEMES = ("redis", "rediss")
PASSWORD_VARIABLE = "COMPLLM_REDIS_PASSWORD"  # noqa: S105 - its name, not a password
RETRY_S = 15.0
_CONNECT_S, _ANSWER_S = 5.0, 60.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 1.0


def without_password(url: str) -> str:
    """The address of a server as it may be kept and shown: scheme, user, host, port, number of the database.

    Raises:
        ConfigurationError: It is none, or has a part that is not heeded.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 6379
    except ValueError as error:
        raise _senseless(str(error)) from error
    number = parts.path.strip("/") or "0"
    if parts.scheme not in SCHEMES or not host or not number.isdigit():
        raise _senseless(f"{parts.scheme or 'no scheme'}://{host or ''}{parts.path}")
    if parts.query or parts.fragment:
        raise _senseless("something behind ? or #")
    user = f"{quote(unquote(parts.username), safe='')}@" if parts.username else ""
    shown = f"[{host}]" if ":" in host else host
    return urlunsplit((parts.scheme, f"{user}{shown}:{port}", f"/{number}", "", ""))


def _senseless(got: str) -> ConfigurationError:
    return ConfigurationError(
        "this is no address of a Redis server",
        got=got,
        expected="redis://HOST:PORT/NUMBER, or rediss:// for TLS; user and password as redis://USER:PASSWORD@HOST",
        next_step=f"correct it; a password can also stand in the environment variable {PASSWORD_VARIABLE}",
    )


class RedisServer:
    """A connection pool that tries again when a connection is lost, for so long, and speaks this package's errors.

    Args:
        url: Its address; a password in it goes before that of the environment variable COMPLLM_REDIS_PASSWORD.
        retry_s: Seconds for which a call is tried again where the server cannot be reached.

    Raises:
        MissingExtraError: The package redis is not installed.
        ConfigurationError: The address makes no sense.
    """

    def __init__(self, url: str, *, retry_s: float = RETRY_S) -> None:
        self.url, self._retry_s = without_password(url), retry_s
        self._redis = _package()
        parts = urlsplit(url)
        password = unquote(parts.password) if parts.password else os.environ.get(PASSWORD_VARIABLE)
        # Trying again is ours, by time: the client's own retries of a command and of its connection multiply.
        self.client: redis.Redis = self._redis.Redis.from_url(
            self.url,
            password=password or None,
            socket_connect_timeout=_CONNECT_S,
            socket_timeout=_ANSWER_S,
            retry=self._redis.retry.Retry(self._redis.backoff.NoBackoff(), 0),
            client_name="compllm-rag",
        )

    def call(self, work: Callable[[redis.Redis], Made]) -> Made:
        """Do something that may be done twice; a lost connection is no error until `retry_s` have passed.

        Raises:
            StoreUnavailableError: The server cannot be reached, or refuses this client.
            StoreFullError: It has no memory or disk left for writes.
            StoreReadOnlyError: It is a replica, or the user may not do this.
            CorruptRecordError: Something else lies under a name of ours.
        """
        exceptions, deadline, wait = self._redis.exceptions, time.monotonic() + self._retry_s, _FIRST_WAIT_S
        refused = (exceptions.AuthenticationError, exceptions.AuthorizationError)
        while True:
            try:
                return work(self.client)
            except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
                if isinstance(error, refused) or time.monotonic() + wait > deadline:
                    raise self._translated(error) from error
            except exceptions.RedisError as error:
                raise self._translated(error) from error
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_S)

    def run(self, script: str, names: Sequence[str], given: Sequence[str | bytes | int]) -> Any:
        """Run a script as one step; errors as of `call`."""
        return self.call(lambda client: client.register_script(script)(names, given))

    def check_settings(self) -> None:
        """Refuse a server that would drop records without a word, and warn of one that may.

        Raises:
            ConfigurationError: It evicts any key when memory is short.
            StoreUnavailableError: It cannot be reached.
        """
        found = self.call(lambda client: {**client.info("memory"), **client.info("persistence")})
        policy = found.get("maxmemory_policy")
        if isinstance(policy, str) and policy.startswith("allkeys"):
            raise ConfigurationError(
                "this Redis server evicts records when its memory is short",
                got=f"maxmemory-policy {policy} at {self.url}",
                expected="noeviction",
                next_step="set `maxmemory-policy noeviction` in its configuration (CONFIG SET maxmemory-policy "
                "noeviction until it restarts), or name another server",
            )
        if policy != "noeviction":
            _warn(f"the Redis server at {self.url} has maxmemory-policy {policy}: expected noeviction")
        if not found.get("aof_enabled") and found.get("rdb_bgsave_in_progress") is not None and not self._saves():
            _warn(f"the Redis server at {self.url} keeps nothing on a disk: set `appendonly yes`, or records are lost "
                  "whenever it restarts, and made again from the text")  # fmt: skip

    def _saves(self) -> bool:
        """Whether it takes snapshots; true where it does not tell."""
        try:
            return bool(self.call(lambda client: client.config_get("save")).get("save", "?"))
        except CompLLMError:
            return True

    def close(self) -> None:
        """Close all connections."""
        self.client.close()

    def _translated(self, error: Exception) -> CompLLMError:
        exceptions, said = self._redis.exceptions, f"{str(error)[:160]} ({self.url})"
        if isinstance(error, exceptions.OutOfMemoryError) or str(error).startswith(("OOM", "MISCONF")):
            return StoreFullError(
                "the Redis server refuses writes; nothing was evicted",
                got=said,
                next_step="give it more memory (maxmemory) or disk, or run `compllm-rag compact`; then do it again",
            )
        if isinstance(error, exceptions.ReadOnlyError | exceptions.NoPermissionError):
            return StoreReadOnlyError(
                "the Redis server does not let this be done",
                got=said,
                next_step="name the primary in place of a replica, or give the user the right to read and write "
                "compllm:* and to run EVALSHA, SCAN and INFO",
            )
        if isinstance(error, exceptions.AuthenticationError | exceptions.AuthorizationError):
            return StoreUnavailableError(
                "the Redis server does not let this client in",
                got=said,
                next_step=f"put the password into the environment variable {PASSWORD_VARIABLE}, or into the address",
            )
        if str(error).startswith("WRONGTYPE"):
            return CorruptRecordError(
                "something else lies under a name of the concept store", got=said, next_step="use another database"
            )
        return StoreUnavailableError(
            "the Redis server cannot be used",
            got=said,
            next_step="start it, or look at its log, and do the same again once it answers; nothing was committed that "
            "needs what it did not take",
        )


def _package() -> Any:
    try:
        import redis
        import redis.backoff
        import redis.retry
    except ImportError as error:
        raise MissingExtraError(
            "a concept store in Redis needs a package that is not installed",
            got=str(error),
            expected="redis",
            next_step="pip install 'compllm-rag[redis]'",
        ) from error
    return redis


def _warn(text: str) -> None:
    warnings.warn(text, StoreSettingsWarning, stacklevel=5)
