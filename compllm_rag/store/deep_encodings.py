"""Deep concepts in 8 and in 4 bits a value: their places and outliers kept apart from the rest.

A deep concept is a row (H + 1): the residual stream in front of a middle layer of the LLM, H values, and behind it the
concept's place within its chunk, a whole number 0..2047. A few values of the stream are many times larger than all
others. In one unit with them the others would lose their last bits, and the place would change.

`int8.d1` and `int4.d1`, with k = min(4, H) outliers 2 + 4 k bytes a row more than `int8.1` and `int4.1` take for H
values. Outliers are the values of largest magnitude; of equal ones, those of the earlier columns. Numbers are
little-endian, rows stand one behind the other without padding between them:

```
2 bytes    place, uint16, 0..2047
2 k bytes  columns of the outliers, uint16, 0..H - 1, ascending, none twice
2 k bytes  their values, fp16, finite, in the same order
the rest   the H values, zeros in the place of the outliers, as a row of the base encoding: see `encodings.py`
```

Why four: relative RMS error by outliers kept, over 2556 states in front of layer 15 of an LLM of 30 layers, H = 576,
first tokens left out:

| | 0 | 2 | 4 | 8 | 16 |
|---|---|---|---|---|---|
| int8 | 0.0309 | 0.0136 | 0.0075 | 0.0054 | 0.0042 |
| int4 | 0.1412 | 0.0906 | 0.0718 | 0.0617 | 0.0518 |

One bit more a value, 72 bytes here, would halve an error. By that measure, int4 gains nothing from four more outliers
and their 16 bytes, and int8 with four has the error that it has on normal random values (0.0075).
"""

from __future__ import annotations

import numpy as np
import torch

from compllm_rag.errors import ConfigurationError, InvalidConceptsError
from compllm_rag.store.codec import Quantised, check_finite

_KEPT = 4
_MOST_PLACE = 2047  # fp16 holds every whole number up to here
_N_COLUMNS = 2**16  # as many as an uint16 tells apart
_REPAIR = "run `compllm-rag repair`, which makes them again from the text"


class Deep(Quantised):
    """The place and the largest values exactly, the others in an encoding of their own.

    `hidden_size` is that of the store, H + 1.

    Args:
        base: Writes the states (n_concepts, H) without their outliers.
    """

    def __init__(self, base: Quantised) -> None:
        self.name, self.tag, self._base = f"{base.name}-deep", f"{base.name}.d1", base

    def nbytes(self, n_concepts: int, hidden_size: int) -> int:
        """Size of that many encoded concepts (n_concepts, hidden_size) in bytes.

        Raises:
            ConfigurationError: No state has this width.
        """
        return n_concepts * (2 + 4 * self._kept(hidden_size) + self._base.nbytes(1, hidden_size - 1))

    def _kept(self, hidden_size: int) -> int:
        """Outliers of each row."""
        if not 1 < hidden_size <= _N_COLUMNS + 1:
            raise ConfigurationError(
                f"concepts of this width cannot be written as {self.name}",
                got=f"hidden_size {hidden_size}",
                expected=f"2 to {_N_COLUMNS + 1}: a state and its place",
            )
        return min(_KEPT, hidden_size - 1)

    def _write(self, half: torch.Tensor) -> bytes:
        (n, hidden_size), kept = half.shape, self._kept(half.shape[1])
        states, place = half[:, :-1].clone(), half[:, -1:].numpy()  # (n, H), (n, 1)
        _check_places(place, "look at what numbered the concepts")
        # Without the sign, bits of fp16 are ordered as magnitudes are. Below them stands the column, from the right.
        rank = (states.view(torch.int16) & 0x7FFF).int() << 16  # (n, H)
        rank += _N_COLUMNS - 1 - torch.arange(hidden_size - 1, dtype=torch.int32)
        columns = rank.topk(kept).indices.sort().values  # (n, k)
        outliers = states.gather(1, columns)  # (n, k)
        rest = np.frombuffer(self._base.encode(states.scatter_(1, columns, 0.0)), np.uint8)
        numbers = [place.astype(np.uint16), columns.numpy().astype(np.uint16), outliers.numpy().view(np.uint16)]
        head = np.concatenate(numbers, axis=1).astype("<u2", copy=False).view(np.uint8)  # (n, 2 + 4 k)
        return np.concatenate([head, rest.reshape(n, self._base.nbytes(1, hidden_size - 1))], axis=1).tobytes()

    def _fill(self, made: torch.Tensor, rows: np.ndarray) -> None:
        (n, hidden_size), start = made.shape, 2 + 4 * self._kept(made.shape[1])
        numbers = rows[:, :start].copy().view("<u2").astype(np.uint16, copy=False)  # (n, 1 + 2 k)
        place, columns, outliers = np.split(numbers, [1, start // 4 + 1], axis=1)  # (n, 1), (n, k), (n, k)
        outliers = outliers.copy().view(np.float16)
        _check_places(place, _REPAIR)
        _check_columns(columns, hidden_size - 1)
        check_finite(outliers)
        self._base._fill(made[:, :-1], rows[:, start:])
        made[:, -1:] = torch.from_numpy(place.astype(np.float16))
        made.numpy()[np.arange(n)[:, None], columns] = outliers  # many times as fast as `scatter_`


def _check_places(place: np.ndarray, next_step: str) -> None:
    """Look at places (n, 1), fp16 or whole numbers.

    Raises:
        InvalidConceptsError: One is not a whole number, or out of range.
    """
    wrong = place[(place < 0) | (place > _MOST_PLACE) | (place % 1 != 0)]
    if wrong.size:
        raise InvalidConceptsError(
            "deep concepts hold a place that none has",
            got=f"place {wrong[0]}",
            expected=f"whole numbers, 0 to {_MOST_PLACE}",
            next_step=next_step,
        )


def _check_columns(columns: np.ndarray, width: int) -> None:
    """Look at the columns (n, k) of outliers.

    Raises:
        InvalidConceptsError: One is no column of a state, or a row's do not ascend.
    """
    wrong = columns[(columns[:, -1] >= width) | (columns[:, 1:] <= columns[:, :-1]).any(1)]
    if len(wrong):
        raise InvalidConceptsError(
            "encoded concepts hold outliers where none can be",
            got=f"columns {wrong[0].tolist()}",
            expected=f"0 to {width - 1}, ascending",
            next_step=_REPAIR,
        )
