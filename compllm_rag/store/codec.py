"""How concepts become bytes and come back.

An encoding treats each concept (row) by itself: the bytes of two records, joined, decode to their concepts, joined.
That is what lets a store read all segments of a chunk as one range and decode them in one step. Whatever the encoding,
concepts go in and come out as fp16: a storage that is encoded anew from fp16 is the one that was encoded so at first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch

from compllm_rag.errors import CorruptRecordError, InvalidConceptsError

_INFINITE = 0x7C00  # bits of infinity; those of NaN are larger
_BLOCK = 2**19  # values looked at in one go; they stay in the cache of the processor


class Encoding(ABC):
    """One way to write concepts.

    Attributes:
        name: What users call it.
        tag: What manifests and pack headers call it, with its version; ASCII, at most 16 characters.
    """

    name: str
    tag: str

    @abstractmethod
    def nbytes(self, n_concepts: int, hidden_size: int) -> int:
        """Size of that many encoded concepts in bytes."""

    @abstractmethod
    def _write(self, half: torch.Tensor) -> bytes:
        """Write finite concepts (n_concepts, hidden_size), fp16 on the CPU."""

    @abstractmethod
    def _read(self, data: np.ndarray, n_concepts: int, hidden_size: int) -> torch.Tensor:
        """Read concepts (n_concepts, hidden_size), fp16; `data` is of the right size."""

    def encode(self, concepts: torch.Tensor) -> bytes:
        """Write concepts (n_concepts, hidden_size) of any floating dtype and device.

        Raises:
            InvalidConceptsError: A value is NaN, infinite, or larger than fp16 can hold (65504).
        """
        half = concepts.detach().to(device="cpu", dtype=torch.float16).contiguous()
        check_finite(half.numpy())
        return self._write(half)

    def check(self, data: np.ndarray) -> None:  # noqa: B027 - quantised values are looked at as they are decoded
        """Look for values that no concept has in encoded concepts, uint8 (n,), as far as `_read` does not.

        Raises:
            InvalidConceptsError: A value is NaN or infinite.
        """

    def decode(self, data: np.ndarray, n_concepts: int, hidden_size: int, *, checked: bool = False) -> torch.Tensor:
        """Read concepts back.

        Args:
            data: Encoded concepts, uint8 (nbytes,). The tensor may share its memory.
            n_concepts: Rows to expect.
            hidden_size: Columns to expect.
            checked: `check` has seen all of it.

        Returns:
            Concepts (n_concepts, hidden_size), fp16 on the CPU.

        Raises:
            CorruptRecordError: `data` is too short or too long for that.
            InvalidConceptsError: A value is NaN or infinite.
        """
        expected = self.nbytes(n_concepts, hidden_size)
        if data.size != expected:
            raise CorruptRecordError(
                f"encoded concepts ({self.name}) have a wrong size",
                got=f"{data.size} bytes for {n_concepts} concepts of {hidden_size} values",
                expected=f"{expected} bytes",
                next_step="run `compllm-rag repair`, which makes them again from the text",
            )
        if not checked:
            self.check(data)
        return self._read(data, n_concepts, hidden_size)

    def rounded(self, concepts: torch.Tensor) -> torch.Tensor:
        """What a store with this encoding gives back for concepts (n_concepts, hidden_size): fp16 on the CPU.

        Raises:
            InvalidConceptsError: A value is NaN, infinite, or larger than fp16 can hold (65504).
        """
        data = np.frombuffer(bytearray(self.encode(concepts)), dtype=np.uint8)
        return self.decode(data, *concepts.shape)


class Quantised(Encoding):
    """An encoding whose rows can be read into a part of a wider tensor."""

    def _read(self, data: np.ndarray, n_concepts: int, hidden_size: int) -> torch.Tensor:
        made = torch.empty(n_concepts, hidden_size, dtype=torch.float16)
        self._fill(made, data.reshape(n_concepts, self.nbytes(1, hidden_size)))
        return made

    @abstractmethod
    def _fill(self, made: torch.Tensor, rows: np.ndarray) -> None:
        """Read encoded concepts, uint8 (n_concepts, bytes of a row), into `made` (n_concepts, hidden_size), fp16.

        The rows of both may have gaps between them.
        """


class Fp16(Encoding):
    """Half-precision floats, little-endian, row after row."""

    name = tag = "fp16"

    def nbytes(self, n_concepts: int, hidden_size: int) -> int:
        """Size of that many encoded concepts in bytes: two for each value."""
        return 2 * n_concepts * hidden_size

    def check(self, data: np.ndarray) -> None:
        """Look for NaN and infinite values in encoded concepts, uint8 (n,)."""
        check_finite(data.view("<f2").astype(np.float16, copy=False))

    def _write(self, half: torch.Tensor) -> bytes:
        return half.numpy().astype("<f2", copy=False).tobytes()

    def _read(self, data: np.ndarray, n_concepts: int, hidden_size: int) -> torch.Tensor:
        return torch.from_numpy(data.view("<f2").astype(np.float16, copy=False)).view(n_concepts, hidden_size)


def largest(half: np.ndarray) -> float:
    """The largest magnitude in contiguous fp16 values; infinite when one of them is infinite or NaN."""
    # The bits of fp16 are ordered by magnitude: those of positive values as signed numbers, those of negative values as
    # unsigned ones, where they stand above all others. Two reductions, then, and no copy.
    bits, most = half.reshape(-1).view(np.int16), 0
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK]
        most = max(most, int(block.max()), int(block.view(np.uint16).max()) & 0x7FFF)
    return float(np.array(most, dtype=np.uint16).view(np.float16)) if most < _INFINITE else float("inf")


def check_finite(half: np.ndarray) -> None:
    """Look at fp16 values.

    Raises:
        InvalidConceptsError: One is NaN or infinite.
    """
    if largest(np.ascontiguousarray(half)) == float("inf"):
        raise InvalidConceptsError(
            "concepts hold values that fp16 cannot",
            got="NaN, an infinite value or an overflow",
            expected="finite values of at most 65504 in magnitude",
            next_step="look at the compressor that made them",
        )
