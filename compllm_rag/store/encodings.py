"""Concepts in 8 and in 4 bits a value; deep ones are wrapped by `deep_encodings.py`.

Numbers are little-endian, rows stand one behind the other without padding between them, and H is the hidden size.
Products are rounded to float32, then to fp16, so that every reader gets the same values.

`int8.1`, H + 4 bytes a row, 0.50 of fp16:

```
4 bytes   unit u, float32: the row's largest magnitude / 127
H bytes   codes q, int8, -127..127                              value = u * q
```

`int4.1`, 4 + G + ceil(H / 2) bytes a row with G = ceil(H / 32) groups of 32 values (the last may be shorter), 0.27 of
fp16:

```
4 bytes          unit u, float32: the largest magnitude / 8 / 127
G bytes          step s of each group, int8, -127..127
ceil(H/2) bytes  codes q, 4 bits, -8..7, kept as q + 8; the earlier value of two in the lower half of the byte, and
                 an upper half that no value needs holds 8      value = (u * s) * q
```

A step may be negative: then the eighth code below zero, which has no counterpart above, goes to the group's largest
magnitude whatever its sign. How steps and codes are chosen is the writer's business and no part of the format.
"""

from __future__ import annotations

import numpy as np
import torch

from compllm_rag.errors import ConfigurationError, InvalidConceptsError, UnsupportedFormatError
from compllm_rag.store.codec import Encoding, Fp16, Quantised, check_finite
from compllm_rag.store.deep_encodings import Deep

GROUP = 32
_UNIT_BYTES = 4
_MOST = 65504.0
_MOST_CODE = 127
_BLOCK = 2**20  # values decoded in one go: what lies between codes and fp16 stays in the cache of the processor


class Int8(Quantised):
    """Eight bits a value and one unit a concept."""

    name, tag = "int8", "int8.1"

    def nbytes(self, n_concepts: int, hidden_size: int) -> int:
        """Size of that many encoded concepts in bytes."""
        return n_concepts * (_UNIT_BYTES + hidden_size)

    def _write(self, half: torch.Tensor) -> bytes:
        values = half.float()
        unit = values.abs().amax(1, keepdim=True) / _MOST_CODE
        codes = (values / _divisor(unit)).round().clamp(-_MOST_CODE, _MOST_CODE).to(torch.int8)
        return _rows(_unit_bytes(unit), codes.numpy().view(np.uint8))

    def _fill(self, made: torch.Tensor, rows: np.ndarray) -> None:
        unit = _units(rows, _MOST / _MOST_CODE)
        codes = torch.from_numpy(rows[:, _UNIT_BYTES:].view(np.int8))
        for part in _blocks(*made.shape):
            made[part] = codes[part].float().mul_(unit[part])
        if len(rows) and float(unit.max()) * 2**7 > _MOST:  # code -128 is never written, and must not overflow
            check_finite(made.numpy())


class Int4(Quantised):
    """Four bits a value, a step for each group of 32, and one unit a concept."""

    name, tag = "int4", "int4.1"

    def nbytes(self, n_concepts: int, hidden_size: int) -> int:
        """Size of that many encoded concepts in bytes."""
        return n_concepts * (_UNIT_BYTES + _n_groups(hidden_size) + _half(hidden_size))

    def _write(self, half: torch.Tensor) -> bytes:
        n, hidden_size = half.shape
        values = torch.zeros(n, _n_groups(hidden_size) * GROUP)
        values[:, :hidden_size] = half
        values = values.view(n, -1, GROUP)
        most = values.gather(-1, values.abs().argmax(-1, keepdim=True))
        unit = most.abs().amax(1, keepdim=True) / 8 / _MOST_CODE
        step, codes = _coded(values, most / -8, unit)
        # The steps that are best for those codes, by least squares; kept by the groups that it brings closer.
        fitted = (values * codes).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True).clamp(min=1)
        other_step, other = _coded(values, fitted, unit)
        closer = _loss(values, other_step * unit, other) < _loss(values, step * unit, codes)
        step, codes = torch.where(closer, other_step, step), torch.where(closer, other, codes)
        flat = (codes.view(n, -1) + 8).to(torch.uint8)[:, : 2 * _half(hidden_size)]
        packed = flat[:, 0::2] | (flat[:, 1::2] << 4)
        return _rows(_unit_bytes(unit[..., 0]), step[..., 0].to(torch.int8).numpy().view(np.uint8), packed.numpy())

    def _fill(self, made: torch.Tensor, rows: np.ndarray) -> None:
        hidden_size = made.shape[1]
        n_groups, pairs = _n_groups(hidden_size), _half(hidden_size)
        start = _UNIT_BYTES + n_groups
        unit = _units(rows, _MOST / 8 / _MOST_CODE)
        steps = torch.from_numpy(rows[:, _UNIT_BYTES:start].view(np.int8)).float().mul_(unit)[..., None]
        packed = torch.from_numpy(rows[:, start:])
        for part in _blocks(*made.shape):
            both = packed[part]
            values = torch.empty(both.shape[0], n_groups * GROUP)
            values[:, 0 : 2 * pairs : 2], values[:, 1 : 2 * pairs : 2] = both & 15, both >> 4
            values.sub_(8).view(-1, n_groups, GROUP).mul_(steps[part])
            made[part] = values[:, :hidden_size]
        if len(rows) and float(unit.max()) * 2**10 > _MOST:  # step -128 is never written, and must not overflow
            check_finite(made.numpy())


def _coded(values: torch.Tensor, step: torch.Tensor, unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps as whole numbers (n, groups, 1), and the codes (n, groups, 32) that go with them.

    Magnitudes are rounded up: the largest code then reaches the group's largest value.
    """
    whole = step / _divisor(unit)
    # What is whole already must stay so, whatever the division made of its last digit.
    whole = (whole.abs() * (1 - 1e-6)).ceil().clamp(max=_MOST_CODE) * whole.sign()
    return whole, (values / _divisor(whole * unit)).round().clamp(-8, 7)


def _loss(values: torch.Tensor, step: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Squared error (n, groups, 1) of what these codes would be read as; infinite where that overflows."""
    return (values - (step * codes).half().float()).square().sum(-1, keepdim=True)


def _divisor(step: torch.Tensor) -> torch.Tensor:
    """Steps, with ones in the place of zeros: where all values are zero, so are the codes."""
    return torch.where(step == 0, 1.0, step)


def _unit_bytes(unit: torch.Tensor) -> np.ndarray:
    return unit.numpy().astype("<f4").view(np.uint8)


def _rows(*columns: np.ndarray) -> bytes:
    """Columns of bytes, each (n, its width), as rows."""
    return np.concatenate(columns, axis=1).tobytes()


def _units(rows: np.ndarray, most: float) -> torch.Tensor:
    """The units (n, 1) that rows begin with.

    Raises:
        InvalidConceptsError: One is NaN, negative, or larger than any concept needs.
    """
    unit = rows[:, :_UNIT_BYTES].copy().view("<f4").astype(np.float32, copy=False)
    if not ((unit >= 0) & (unit <= most * (1 + 1e-6))).all():
        raise InvalidConceptsError(
            "encoded concepts hold a unit that no concept has",
            got="NaN, a negative value or an overflow",
            expected=f"0 to {most:.6g}",
            next_step="run `compllm-rag repair`, which makes them again from the text",
        )
    return torch.from_numpy(unit)


def _n_groups(hidden_size: int) -> int:
    return -(-hidden_size // GROUP)


def _half(hidden_size: int) -> int:
    return -(-hidden_size // 2)


def _blocks(n_concepts: int, hidden_size: int) -> list[slice]:
    size = max(1, _BLOCK // hidden_size)
    return [slice(start, start + size) for start in range(0, n_concepts, size)]


FP16, _INT8, _INT4 = Fp16(), Int8(), Int4()
# What users choose from, and what storages of deep concepts take instead.
ENCODINGS: dict[str, Encoding] = {encoding.name: encoding for encoding in (FP16, _INT8, _INT4)}
_DEEP = {base.name: Deep(base) for base in (_INT8, _INT4)}
_NAMED = ENCODINGS | {encoding.name: encoding for encoding in _DEEP.values()}
_READ = {encoding.tag: encoding for encoding in _NAMED.values()}


def deep_encoding(name: str) -> str:
    """The encoding that keeps deep concepts as `fp16`, `int8` or `int4` keep others: its name.

    Raises:
        ConfigurationError: There is none of this name.
    """
    return _DEEP.get(name, encoding_named(name)).name


def encoding_named(name: str) -> Encoding:
    """Find an encoding for a new store.

    Raises:
        ConfigurationError: There is none of this name.
    """
    if name not in _NAMED:
        raise ConfigurationError("unknown encoding of concepts", got=repr(name), expected=" or ".join(ENCODINGS))
    return _NAMED[name]


def encoding_tagged(tag: str) -> Encoding:
    """Find the encoding that something on disk was written in.

    Raises:
        UnsupportedFormatError: This release has no such encoding.
    """
    if tag not in _READ:
        raise UnsupportedFormatError(
            "the concepts were written in an encoding this release does not read",
            got=repr(tag),
            expected=" or ".join(_READ),
            next_step="upgrade compllm-rag",
        )
    return _READ[tag]
