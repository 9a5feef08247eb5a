"""A store that lives and dies with its process: for tests, notebooks and small corpora."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from compllm_rag.store.base import ConceptStore, StoreStats, check_hidden_size, check_keys, encode_record
from compllm_rag.store.compaction import CompactReport
from compllm_rag.store.encodings import FP16, encoding_named
from compllm_rag.store.reading import Progress


class MemoryStore(ConceptStore):
    """Concepts in a dictionary, encoded as the durable store encodes them.

    Args:
        hidden_size: Width of every concept.
        encoding: `fp16`, `int8` or `int4`, or for deep concepts what `deep_encoding` makes of these.

    Raises:
        ConfigurationError: `hidden_size` is not a positive integer, or there is no such encoding.
    """

    def __init__(self, hidden_size: int, *, encoding: str = FP16.name) -> None:
        super().__init__()
        self.hidden_size = check_hidden_size(hidden_size)
        self.encoding = encoding_named(encoding)
        self._records: dict[str, bytes] = {}
        self._payload_bytes = self._hits = self._misses = 0
        self._guard = threading.RLock()

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """Tell which records are stored; see `ConceptStore.contains`."""
        check_keys(keys)
        with self._guard:
            return [key in self._records for key in keys]

    def put(self, records: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Store concepts (n_concepts, hidden_size) by key; see `ConceptStore.put`."""
        written = 0
        for key, concepts in records:
            payload = encode_record(key, concepts, self.hidden_size, self.encoding)
            with self._guard:
                if key not in self._records:
                    self._records[key] = payload
                    self._payload_bytes += len(payload)
                    self.traffic.bytes_written += len(payload)
                    written += 1
        return written

    def get(self, keys: Sequence[str]) -> list[torch.Tensor | None]:
        """Read records, each (n_concepts, hidden_size) fp16; see `ConceptStore.get`."""
        return [None if payload is None else self._decode([payload]) for payload in self._find(keys)]

    def get_joined(self, keys: Sequence[str]) -> torch.Tensor | None:
        """Read records as one tensor (sum of n_concepts, hidden_size) fp16; see `ConceptStore.get_joined`."""
        found = self._find(keys)
        payloads = [payload for payload in found if payload is not None]
        return self._decode(payloads) if len(payloads) == len(found) else None

    def compact(
        self, live: Callable[[Sequence[str]], Sequence[bool]] | None = None, *, progress: Progress | None = None
    ) -> CompactReport:
        """Forget records that nothing refers to; see `DiskStore.compact`."""
        with self._guard:
            keys = list(self._records)
            before = self._payload_bytes
            dead = [] if live is None else [k for k, alive in zip(keys, live(keys), strict=True) if not alive]
            for key in dead:
                self._payload_bytes -= len(self._records.pop(key))
            return CompactReport(len(self._records), len(dead), 0, 0, before, self._payload_bytes)

    def flush(self) -> None:
        """Do nothing: memory is as durable as it gets."""

    def stats(self) -> StoreStats:
        """Count what is stored and what was asked for."""
        with self._guard:
            concepts = self._payload_bytes // self.encoding.nbytes(1, self.hidden_size)
            sums = (len(self._records), concepts, self._payload_bytes)
            return StoreStats(*sums, self._hits, self._misses, self.encoding.name)

    def close(self) -> None:
        """Keep everything: the records go when the store goes."""

    def _find(self, keys: Sequence[str]) -> list[bytes | None]:
        check_keys(keys)
        with self._guard:
            found = [self._records.get(key) for key in keys]
            misses = found.count(None)
            self._misses += misses
            self._hits += len(found) - misses
            return found

    def _decode(self, payloads: Sequence[bytes]) -> torch.Tensor:
        with self._guard:
            self.traffic.bytes_read += sum(map(len, payloads))
        data = np.empty(sum(map(len, payloads)), dtype=np.uint8)
        data.data[:] = b"".join(payloads)
        return self.encoding.decode(data, data.size // self.encoding.nbytes(1, self.hidden_size), self.hidden_size)
