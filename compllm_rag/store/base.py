"""What every concept store does, and the checks they share.

A store maps record keys (64 hexadecimal characters, `fingerprint.record_key`) to concepts. It knows nothing about
text, tokens or compressors: two records with the same key are the same record, and the first one written stays.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from compllm_rag.errors import ConfigurationError, InvalidConceptsError
from compllm_rag.handles import ProcessBound
from compllm_rag.metrics import Traffic
from compllm_rag.store.codec import Encoding
from compllm_rag.store.encodings import FP16

_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoreStats:
    """What a store holds, and how often this instance found what it was asked for.

    Attributes:
        records: Unique segments, those not yet flushed included.
        concepts: Sum of their concepts.
        payload_bytes: Bytes of their encoded concepts, headers and index not counted.
        hits: Keys found by `get` and `get_joined` of this instance.
        misses: Keys they did not find.
        encoding: How concepts are written.
    """

    records: int
    concepts: int
    payload_bytes: int
    hits: int
    misses: int
    encoding: str = FP16.name


class ConceptStore(ProcessBound, ABC):
    """Concepts by record key. Safe to share between threads.

    Attributes:
        hidden_size: Width of every concept, that of the target LLM's input embeddings.
        read_only: Whether `put` is refused.
        encoding: How concepts are written, and what precision that leaves them.
        traffic: Bytes of payloads read and written so far.
    """

    _opened_by = "open it again there: DiskStore(path, hidden_size=..., read_only=True)"
    hidden_size: int
    read_only: bool = False
    encoding: Encoding = FP16

    def __init__(self) -> None:
        self.traffic = Traffic()

    @abstractmethod
    def contains(self, keys: Sequence[str]) -> list[bool]:
        """Tell which records are stored, without reading them and without counting hits or misses.

        Args:
            keys: Record keys.

        Returns:
            One answer per key, in the order asked.

        Raises:
            ConfigurationError: A key is not 64 hexadecimal characters.
            CorruptRecordError: An index row is damaged.
        """

    @abstractmethod
    def put(self, records: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Store concepts; a key already present is left as it is.

        The records are consumed as a stream. When one is refused, those before it stay stored.

        Args:
            records: Pairs of record key and concepts (n_concepts, hidden_size), of any floating dtype and device.

        Returns:
            How many records are new.

        Raises:
            ConfigurationError: A key is not 64 hexadecimal characters.
            InvalidConceptsError: Wrong shape or dtype, NaN or infinite values, or values that overflow the encoding.
            StoreFullError: The disk or the size limit is reached; nothing was evicted.
            StoreReadOnlyError: The store was opened for reading.
        """

    @abstractmethod
    def get(self, keys: Sequence[str]) -> list[torch.Tensor | None]:
        """Read records.

        Args:
            keys: Record keys, repeats allowed.

        Returns:
            Per key its concepts (n_concepts, hidden_size), fp16 on the CPU and the caller's own, or None for a miss.

        Raises:
            ConfigurationError: A key is not 64 hexadecimal characters.
            CorruptRecordError: A record fails its checksum or its bounds; the message names the key.
            InvalidConceptsError: A record holds NaN or infinite values.
        """

    @abstractmethod
    def get_joined(self, keys: Sequence[str]) -> torch.Tensor | None:
        """Read all records of one chunk as one tensor.

        Args:
            keys: Record keys in reading order, repeats allowed.

        Returns:
            Concepts (sum of n_concepts, hidden_size), fp16 on the CPU, in the order asked; None when any is missing.

        Raises:
            ConfigurationError: A key is not 64 hexadecimal characters.
            CorruptRecordError: A record fails its checksum or its bounds; the message names the key.
            InvalidConceptsError: A record holds NaN or infinite values.
        """

    @abstractmethod
    def flush(self) -> None:
        """Make everything put so far durable, and visible to other processes.

        Raises:
            StoreFullError: The disk is full; what was flushed before is still there.
        """

    @abstractmethod
    def stats(self) -> StoreStats:
        """Count what is stored and what was asked for."""

    @abstractmethod
    def close(self) -> None:
        """Flush and release everything held. Closing twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_key(text: object) -> bool:
    """Whether this is a record key: 64 lower-case hexadecimal characters."""
    return isinstance(text, str) and _KEY.fullmatch(text) is not None


def check_keys(keys: Iterable[str]) -> None:
    """Refuse anything that is not a record key.

    Raises:
        ConfigurationError: A key is not 64 lower-case hexadecimal characters.
    """
    asked = list(keys)
    # All at once, since the keys of a long prompt are thousands; one by one only to find the one to name.
    if set(map(type, asked)) <= {str} and set(map(len, asked)) <= {64} and _is_hexadecimal("".join(asked)):
        return
    for key in asked:
        if not is_key(key):
            raise ConfigurationError(
                "not a record key",
                got=repr(key)[:80],
                expected="64 lower-case hexadecimal characters",
                next_step="make keys with compllm_rag.fingerprint.record_key",
            )


def check_hidden_size(hidden_size: int) -> int:
    """Return `hidden_size` when it can be one.

    Raises:
        ConfigurationError: It is not a positive integer.
    """
    if isinstance(hidden_size, bool) or not isinstance(hidden_size, int) or not 0 < hidden_size < 2**31:
        raise ConfigurationError("hidden_size makes no sense", got=repr(hidden_size), expected="a positive integer")
    return hidden_size


def encode_record(key: str, concepts: torch.Tensor, hidden_size: int, encoding: Encoding) -> bytes:
    """Check one record and write it.

    Args:
        key: Record key.
        concepts: Concepts (n_concepts, hidden_size), of any floating dtype and device.
        hidden_size: Width the store takes.
        encoding: How to write them.

    Raises:
        ConfigurationError: The key is not 64 lower-case hexadecimal characters.
        InvalidConceptsError: Wrong shape or dtype, or values the encoding cannot hold.
    """
    check_keys([key])
    if not isinstance(concepts, torch.Tensor):
        raise _refusal(key, f"a {type(concepts).__name__}", "a torch.Tensor")
    if concepts.layout is not torch.strided or concepts.is_meta:
        raise _refusal(key, f"a tensor of layout {concepts.layout} on {concepts.device}", "a dense tensor with values")
    if not concepts.is_floating_point():
        raise _refusal(key, f"dtype {concepts.dtype}", "a floating dtype")
    if concepts.ndim != 2 or concepts.shape[0] < 1 or concepts.shape[1] != hidden_size:
        raise _refusal(key, f"shape {tuple(concepts.shape)}", f"shape (n_concepts >= 1, {hidden_size})")
    try:
        return encoding.encode(concepts)
    except InvalidConceptsError as error:
        raise _refusal(key, error.got, error.expected) from error


def _is_hexadecimal(text: str) -> bool:
    try:
        return len(bytes.fromhex(text)) * 2 == len(text) and text == text.lower()  # it skips white space
    except ValueError:
        return False


def _refusal(key: str, got: object, expected: object) -> InvalidConceptsError:
    return InvalidConceptsError(
        f"concepts of record {key} cannot be stored",
        got=got,
        expected=expected,
        next_step="look at the compressor that made them",
    )
