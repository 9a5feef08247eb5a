"""A store that several servers share: concepts in Redis or Valkey.

Every record is there or not for all of them at once, since nothing is kept in this process: what one put the others
find, what one deleted they miss. How long records last is Redis's own to say (`appendonly yes`, `appendfsync`); one
that is lost is a miss, and made again from the text. See `redis_layout` for what lies where.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from compllm_rag.errors import (
    ConfigurationError,
    CorruptRecordError,
    InvalidConceptsError,
    StorageMismatchError,
    StoreReadOnlyError,
    UnsupportedFormatError,
)
from compllm_rag.store.base import StoreStats, check_hidden_size, check_keys, encode_record
from compllm_rag.store.durable import DurableStore
from compllm_rag.store.encodings import FP16, encoding_named
from compllm_rag.store.index_rows import Totals
from compllm_rag.store.redis_layout import FIND, PUT, SPACE_VERSION, Names, opened, sealed
from compllm_rag.store.redis_server import RETRY_S, RedisServer

if TYPE_CHECKING:
    import redis

    from compllm_rag.store.compaction import CompactReport
    from compllm_rag.store.reading import Progress
    from compllm_rag.store.verification import StoreCheck

_KEYS_PER_CALL = 256
_BYTES_PER_CALL = 8 * 2**20  # Redis does nothing else meanwhile
_OWNER = re.compile(r"[\w.-]{1,64}", re.ASCII)


class RedisStore(DurableStore):
    """Concepts in a Redis or Valkey server, shared by all that name the same `space`. Not for Redis Cluster.

    A call that loses its connection is tried again for `retry_s` seconds. A record belongs to every owner that put or
    looked for it while writing (`put`, `contains`), and goes when the last of them gives it up.

    Args:
        url: `redis://[USER[:PASSWORD]@]HOST[:PORT][/NUMBER]`, or `rediss://` for TLS. Without a password in it, that of
            the environment variable `COMPLLM_REDIS_PASSWORD`.
        hidden_size: Width of every concept.
        space: Whose records these are; stores of another space on the same server know nothing of them.
        owner: Who puts records; of several storages that share a space each has a name of its own.
        read_only: Write nothing.
        encoding: `fp16`, `int8` or `int4`, or for deep concepts what `deep_encoding` makes of these.
        retry_s: Seconds for which a call is tried again where the server cannot be reached.

    Raises:
        MissingExtraError: The package redis is not installed (`pip install 'compllm-rag[redis]'`).
        ConfigurationError: An argument makes no sense, or the server evicts keys when its memory is short.
        StorageMismatchError: The space holds concepts of another width or encoding.
        UnsupportedFormatError: It was written by another format version.
        StoreUnavailableError: The server cannot be reached, or does not let this client in.
    """

    _opened_by = "open it again there: RedisStore(url, hidden_size=..., space=...)"
    shared = True

    def __init__(
        self,
        url: str,
        *,
        hidden_size: int,
        space: str = "default",
        owner: str = "default",
        read_only: bool = False,
        encoding: str = FP16.name,
        retry_s: float = RETRY_S,
    ) -> None:
        super().__init__()
        self.hidden_size, self.read_only = check_hidden_size(hidden_size), read_only
        self.encoding = encoding_named(encoding)
        if not space or _OWNER.fullmatch(owner) is None:
            raise ConfigurationError(
                "space or owner makes no sense",
                got=f"{space!r:.80}, {owner!r:.80}",
                expected="a space, and an owner of 1 to 64 letters, digits, dots and dashes",
            )
        self.names = Names(space, owner)
        self.server = RedisServer(url, retry_s=retry_s)
        self._row_bytes = self.encoding.nbytes(1, hidden_size)
        self._description = {
            "format_version": SPACE_VERSION,
            "hidden_size": hidden_size,
            "encoding": self.encoding.tag,
            "space": space,
        }
        self._guard = threading.Lock()
        self._hits = self._misses = 0
        self._closed = False
        self.server.check_settings()
        self._check_description()

    @property
    def url(self) -> str:
        """Where the server is, without a password."""
        return self.server.url

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """Tell which records are stored; see `ConceptStore.contains`. What a writer finds is its own from then on."""
        check_keys(keys)
        self._require_open()
        found: list[bool] = []
        for batch in _batches(keys):
            names = self.record_names(batch)
            if self.read_only:
                found += self._exist(names)
            else:
                owned = [self.names.owners, self.names.owned, *names]
                found += map(bool, self.server.run(FIND, owned, [self.names.owner, *map(bytes.fromhex, batch)]))
        return found

    def _exist(self, names: Sequence[str]) -> list[bool]:
        def look(client: redis.Redis) -> list[bool]:
            with client.pipeline(transaction=False) as pipeline:
                for name in names:
                    pipeline.exists(name)
                return [bool(there) for there in pipeline.execute()]

        return self.server.call(look)

    def put(self, records: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Store concepts (n_concepts, hidden_size) by key; see `ConceptStore.put`.

        They are visible to everybody on return. A call that is tried again after a lost answer may count fewer records
        as new than it brought.

        Raises:
            StoreFullError: The server refuses writes: its memory is used up, or it cannot save. Nothing was evicted.
            StoreUnavailableError: The server cannot be reached.
        """
        self._require_writable()
        stream, written = iter(records), 0
        while True:
            batch: dict[str, tuple[int, bytes]] = {}
            size = 0
            try:
                for key, concepts in islice(stream, _KEYS_PER_CALL):
                    payload = encode_record(key, concepts, self.hidden_size, self.encoding)
                    batch.setdefault(key, (concepts.shape[0], payload))
                    size += len(payload)
                    if size >= _BYTES_PER_CALL:
                        break
            finally:
                written += self._put(batch)
            if not batch:
                return written

    def _put(self, batch: dict[str, tuple[int, bytes]]) -> int:
        if not batch:
            return 0
        own = [self.names.store, self.names.totals, self.names.owners, self.names.owned]
        given: list[str | bytes | int] = [json.dumps(self._description), self.names.owner]
        for key, (n_concepts, payload) in batch.items():
            given += [bytes.fromhex(key), n_concepts, len(payload), sealed(key, n_concepts, payload)]
        new = int(self.server.run(PUT, [*own, *self.record_names(list(batch))], given))
        with self._guard:
            self.traffic.bytes_written += sum(len(payload) for _, payload in batch.values())
        return new

    def get(self, keys: Sequence[str]) -> list[torch.Tensor | None]:
        """Read records, each (n_concepts, hidden_size) fp16; see `ConceptStore.get`."""
        return [None if value is None else self._decoded([value]) for value in self._find(keys)]

    def get_joined(self, keys: Sequence[str]) -> torch.Tensor | None:
        """Read records as one tensor (sum of n_concepts, hidden_size) fp16; see `ConceptStore.get_joined`."""
        found = self._find(keys)
        values = [value for value in found if value is not None]
        return self._decoded(values) if len(values) == len(found) else None

    def flush(self) -> None:
        """See that the server is there; what was put is visible to all, and as durable as Redis was told to make it."""
        self._require_open()
        self.server.call(lambda client: client.ping())

    def stats(self) -> StoreStats:
        """Count what is stored, by all owners together, and what this instance was asked for."""
        totals = self.totals()
        sums = (totals.records, totals.concepts, totals.payload_bytes)
        with self._guard:
            return StoreStats(*sums, self._hits, self._misses, self.encoding.name)

    def totals(self) -> Totals:
        """The sums over all records of the space."""
        self._require_open()
        held = self.server.call(lambda client: client.hgetall(self.names.totals))
        return Totals(*(int(held.get(name, 0)) for name in (b"records", b"concepts", b"payload_bytes")))

    def verify(self, *, deep: bool = False, progress: Progress | None = None) -> StoreCheck:
        """Look for damage: heads, sums and times to live; `deep` reads every payload and proves its checksum."""
        from compllm_rag.store.redis_upkeep import check_space

        self._require_open()
        return check_space(self, deep=deep, progress=progress)

    def discard(self, check: StoreCheck) -> None:
        """Take damaged records away; see `DurableStore.discard`."""
        from compllm_rag.store.redis_upkeep import discard_damaged

        self._require_writable()
        discard_damaged(self, check)

    def compact(
        self, live: Callable[[Sequence[str]], Sequence[bool]] | None = None, *, progress: Progress | None = None
    ) -> CompactReport:
        """Give up this owner's dead records; those that no other owner has are deleted. See `DurableStore.compact`."""
        from compllm_rag.store.redis_upkeep import give_up_dead

        self._require_writable()
        return give_up_dead(self, live, progress)

    def release(self) -> int:
        """Give up all records of this owner, and the owner: its storage is deleted. Tells how many bytes are free."""
        self._require_writable()
        before = self.totals().payload_bytes
        self.compact(lambda keys: [False] * len(keys))
        self.server.call(lambda client: client.srem(self.names.owners, self.names.owner))
        return before - self.totals().payload_bytes

    def close(self) -> None:
        """Close all connections. Closing twice is harmless."""
        if not self._closed:
            self._closed = True
            self.server.close()

    def record_names(self, keys: Sequence[str]) -> list[str]:
        """What records are called in Redis."""
        start = self.names.record_start
        return [start + key for key in keys]

    def wrong(self, key: str, value: bytes) -> str | None:
        """What is wrong with the bytes of a record, its values included; None when nothing is."""
        try:
            n_concepts, payload = opened(key, value, self._row_bytes)
            self.encoding.decode(np.frombuffer(payload, dtype=np.uint8).copy(), n_concepts, self.hidden_size)
        except (CorruptRecordError, InvalidConceptsError) as error:
            return str(error.got)
        return None

    def _find(self, keys: Sequence[str]) -> list[tuple[str, bytes] | None]:
        check_keys(keys)
        self._require_open()
        found: list[bytes | None] = []
        if keys:
            found = self.server.call(lambda client: self._read(client, keys))
        misses = found.count(None)
        with self._guard:
            self._misses += misses
            self._hits += len(found) - misses
        return [None if value is None else (key, value) for key, value in zip(keys, found, strict=True)]

    def _read(self, client: redis.Redis, keys: Sequence[str]) -> list[bytes | None]:
        with client.pipeline(transaction=False) as pipeline:
            for batch in _batches(keys):
                pipeline.mget(self.record_names(batch))
            return [value for values in pipeline.execute() for value in values]

    def _decoded(self, values: Sequence[tuple[str, bytes]]) -> torch.Tensor:
        parts = [opened(key, value, self._row_bytes) for key, value in values]
        data = np.empty(sum(len(payload) for _, payload in parts), dtype=np.uint8)
        data.data[:] = b"".join(payload for _, payload in parts)
        with self._guard:
            self.traffic.bytes_read += data.size
        return self.encoding.decode(data, sum(n for n, _ in parts), self.hidden_size)

    def _check_description(self) -> None:
        text = self.server.call(lambda client: client.get(self.names.store))
        if text is None:
            return  # nobody has put anything yet, or all of it was lost: records are misses then
        try:
            held = dict(json.loads(text))
        except (ValueError, TypeError):
            held = {}
        if held.get("format_version") != SPACE_VERSION:
            raise UnsupportedFormatError(
                "the concepts in Redis were written in another format version",
                got=held.get("format_version"),
                expected=SPACE_VERSION,
                next_step="update compllm-rag, or name another database number",
            )
        for name in ("hidden_size", "encoding"):
            if held.get(name) != self._description[name]:
                raise StorageMismatchError(
                    f"the concepts in Redis have another {name}",
                    got=self._description[name],
                    expected=f"{held.get(name)} in the space {self.names.space!r:.80} of {self.url}",
                    next_step="name another space, or another database number",
                )

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigurationError("the concept store is closed", got=self.url, next_step="open it again")

    def _require_writable(self) -> None:
        self._require_open()
        if self.read_only:
            raise StoreReadOnlyError(
                "the concept store was opened for reading", got=self.url, next_step="open it without read_only"
            )


def _batches(keys: Sequence[str]) -> Iterable[Sequence[str]]:
    return (keys[start : start + _KEYS_PER_CALL] for start in range(0, len(keys), _KEYS_PER_CALL))
