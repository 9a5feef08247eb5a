"""What a compressor's lower half said of a chunk, kept for the settings that ask again.

A benchmark that compares rates or policies compresses the same passages once for each of them, and every time it is the
same states at other places. Kept, they are made once; which are taken, and all that comes behind, stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.spec import ConceptCompressor

# Of each kind; (n_tokens, hidden_size) in float32 are half a megabyte for 240 tokens of the embedded LLM.
_MOST = 4000
Unit = tuple[int, ...]


def remember_states(compressor: ConceptCompressor, most: int = _MOST) -> ConceptCompressor:
    """Let a compressor keep states and scores of units that it read; one that is not of deep concepts stays as it is.

    For measuring answers alone: what is timed would be too fast.

    Args:
        compressor: Changed in place; its weights must not change any more.
        most: Units that are kept; then those that were made first are let go.

    Returns:
        The compressor itself.
    """
    if isinstance(compressor, DeepCompressor):
        kept = _Kept(compressor, most)
        for name in ("states", "scores"):
            setattr(compressor, name, getattr(kept, name))
    return compressor


class _Kept:
    """Stands in front of two methods of a compressor."""

    def __init__(self, compressor: DeepCompressor, most: int) -> None:
        self._states_of, self._scores_of, self._most = compressor.states, compressor.scores, most
        self._marked = compressor.config.marked
        self._states, self._scores = dict[tuple[Unit, Unit], torch.Tensor](), dict[Unit, torch.Tensor]()

    def states(self, units: Sequence[Sequence[int]], kept: Sequence[Sequence[int]] | None = None) -> torch.Tensor:
        """See `DeepCompressor.states`."""
        # Where what is kept is marked, it makes other states; elsewhere they are the same whatever is kept.
        known = kept if self._marked and kept is not None else [range(len(unit)) for unit in units]
        rows = [(tuple(unit), tuple(own)) for unit, own in zip(units, known, strict=True)]
        missing = [row for row in dict.fromkeys(rows) if row not in self._states]
        found = dict[tuple[Unit, Unit], torch.Tensor]()
        if missing:
            # (batch, most tokens, hidden_size)
            made = self._states_of([unit for unit, _ in missing], [own for _, own in missing])
            # Copies: a slice would keep the whole batch, padding and all.
            found = {row: states[: len(row[0])].clone() for row, states in zip(missing, made, strict=True)}
        found |= {row: self._states[row] for row in rows if row not in found}
        _keep(self._states, found, self._most)
        return torch.nn.utils.rnn.pad_sequence([found[row] for row in rows], batch_first=True)

    def scores(self, units: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """See `DeepCompressor.scores`."""
        rows = [tuple(unit) for unit in units]
        missing = [row for row in dict.fromkeys(rows) if row not in self._scores]
        found: dict[Unit, Any] = dict(zip(missing, self._scores_of(missing), strict=True))
        found |= {row: self._scores[row] for row in rows if row not in found}
        _keep(self._scores, found, self._most)
        yield from (found[row] for row in rows)


def _keep(known: dict[Any, torch.Tensor], found: dict[Any, torch.Tensor], most: int) -> None:
    known |= found
    for row in list(known)[: max(0, len(known) - most)]:
        del known[row]
