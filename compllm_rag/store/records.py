"""Records of a disk store as tensors: their payloads read, proved and decoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compllm_rag.errors import InvalidConceptsError
from compllm_rag.metrics import Traffic
from compllm_rag.store.codec import Encoding
from compllm_rag.store.packs import Location
from compllm_rag.store.reading import PackReader


class RecordReader:
    """Reads located records.

    Args:
        packs: Where their payloads lie.
        encoding: Of the store.
        hidden_size: Width of every concept.
        traffic: Where bytes are counted.
    """

    def __init__(self, packs: PackReader, encoding: Encoding, hidden_size: int, traffic: Traffic) -> None:
        self._packs, self._encoding, self._hidden_size, self._traffic = packs, encoding, hidden_size, traffic

    def read(self, keys: Sequence[str], locations: Sequence[Location]) -> torch.Tensor:
        """Concepts (sum of n_concepts, hidden_size) fp16 of located records, checked.

        Raises:
            CorruptRecordError: A record fails its checksum or its bounds.
            InvalidConceptsError: A record holds NaN or infinite values.
        """
        each = self._encoding.nbytes(1, self._hidden_size)
        sizes = [each * location.n_concepts for location in locations]
        try:
            data = self._packs.read(keys, locations, sizes, self._encoding.check)
            self._traffic.bytes_read += data.size
            return self._encoding.decode(data, data.size // each, self._hidden_size, checked=True)
        except InvalidConceptsError as error:
            raise self._named(keys, locations) from error

    def _named(self, keys: Sequence[str], locations: Sequence[Location]) -> InvalidConceptsError:
        """The error with the record in it: they were decoded together."""
        for key, location in zip(keys, locations, strict=True):
            data = self._packs.read([key], [location], [self._encoding.nbytes(location.n_concepts, self._hidden_size)])
            try:
                self._encoding.decode(data, location.n_concepts, self._hidden_size)
            except InvalidConceptsError as error:
                return InvalidConceptsError(f"record {key} holds values no concept can have", got=error.got)
        return InvalidConceptsError("records hold values no concept can have")

    def close(self) -> None:
        """Close the packs; the next read opens them again."""
        self._packs.close()
