"""Concepts made for a question: kept in memory for the next one, within bounds, and never written."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch

MEMO_BYTES = 64 * 2**20


class ConceptMemo:
    """The latest concepts by record key, as a store would give them back. Safe between threads.

    Args:
        max_bytes: Most bytes of all concepts together; what was asked for longest ago goes first.
    """

    def __init__(self, max_bytes: int = MEMO_BYTES) -> None:
        self._max, self._bytes = max_bytes, 0
        self._held: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._guard = threading.Lock()

    def find(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Concepts (n_concepts, width) of those keys that are there."""
        with self._guard:
            found = {key: self._held[key] for key in keys if key in self._held}
            for key in found:
                self._held.move_to_end(key)
        return found

    def keep(self, records: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Remember concepts (n_concepts, width), each a tensor of its own."""
        with self._guard:
            for key, concepts in records:
                if key not in self._held:
                    self._held[key] = concepts
                    self._bytes += concepts.nbytes
            while self._bytes > self._max:
                _, gone = self._held.popitem(last=False)
                self._bytes -= gone.nbytes

    def __len__(self) -> int:
        return len(self._held)
