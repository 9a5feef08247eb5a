"""How concepts become bytes and come back.

An encoding treats each concept (row) by itself: the bytes of two records, joined, decode to their concepts, joined.
That is what lets a store read all segments of a chunk as one range and decode them in one step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch

from compllm_rag.errors import InvalidConceptsError, UnsupportedFormatError


class Encoding(ABC):
    """One way to write concepts.

    Attributes:
        name: What manifests and pack headers call it; ASCII, at most 16 characters.
    """

    name: str

    @abstractmethod
    def nbytes(self, n_concepts: int, hidden_size: int) -> int:
        """Size of that many encoded concepts in bytes."""

    @abstractmethod
    def encode(self, concepts: torch.Tensor) -> bytes:
        """Write concepts (n_concepts, hidden_size) of any floating dtype and device.

        Raises:
            InvalidConceptsError: A value is NaN or infinite, or becomes so in this encoding.
        """

    @abstractmethod
    def decode(self, data: np.ndarray, n_concepts: int, hidden_size: int) -> torch.Tensor:
        """Read concepts back.

        Args:
            data: Encoded concepts, uint8 (nbytes,). The tensor may share its memory.
            n_concepts: Rows to expect; `data` has exactly `nbytes(n_concepts, hidden_size)` bytes.
            hidden_size: Columns to expect.

        Returns:
            Concepts (n_concepts, hidden_size), fp16 on the CPU.

        Raises:
            InvalidConceptsError: A value is NaN or infinite.
        """


class Fp16(Encoding):
    """Half-precision floats, little-endian, row after row."""

    name = "fp16"

    def nbytes(self, n_concepts: int, hidden_size: int) -> int:
        """Size of that many encoded concepts in bytes: two for each value."""
        return 2 * n_concepts * hidden_size

    def encode(self, concepts: torch.Tensor) -> bytes:
        """Write concepts (n_concepts, hidden_size) of any floating dtype and device.

        Raises:
            InvalidConceptsError: A value is NaN, infinite, or larger than fp16 can hold (65504).
        """
        half = concepts.detach().to(device="cpu", dtype=torch.float16).contiguous().numpy()
        _check_finite(half)
        return half.astype("<f2", copy=False).tobytes()

    def decode(self, data: np.ndarray, n_concepts: int, hidden_size: int) -> torch.Tensor:
        """Read concepts (n_concepts, hidden_size) back; shares memory with `data` on little-endian machines.

        Raises:
            InvalidConceptsError: A value is NaN or infinite.
        """
        half = data.view("<f2").astype(np.float16, copy=False)
        _check_finite(half)
        return torch.from_numpy(half).view(n_concepts, hidden_size)


def _check_finite(half: np.ndarray) -> None:
    # All bits of the exponent set means NaN or infinite; on the bits this costs a tenth of isfinite().
    if half.size and (half.view(np.uint16) & 0x7FFF).max() >= 0x7C00:
        raise InvalidConceptsError(
            "concepts hold values that fp16 cannot",
            got="NaN, an infinite value or an overflow",
            expected="finite values of at most 65504 in magnitude",
            next_step="look at the compressor that made them",
        )


_ENCODINGS: dict[str, Encoding] = {"fp16": Fp16()}


def encoding_named(name: str) -> Encoding:
    """Find an encoding by its name.

    Raises:
        UnsupportedFormatError: This release has no such encoding.
    """
    if name not in _ENCODINGS:
        raise UnsupportedFormatError(
            "the concepts were written in an encoding this release does not read",
            got=repr(name),
            expected=" or ".join(_ENCODINGS),
            next_step="upgrade compllm-rag",
        )
    return _ENCODINGS[name]
