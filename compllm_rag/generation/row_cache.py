"""The KV cache of one prompt, apart from those of other prompts, with room for what its answer will add.

Rows of one step have caches of their own, so none is padded for the length of another, and a row joins or leaves
without a copy. What a step writes counts only once the whole step has come to its end (`count`): a step that failed
halfway can be taken again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_FIRST_ROOM, _LEAST_ROOM = 64, 32  # slots


class RowLayer:
    """Keys and values of one row in one layer.

    Args:
        keys: (1, heads, n, head_dim).
        values: As many.
        window: Slots that a query sees, itself included; None: all.
        room: Slots to make room for.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, window: int | None, room: int) -> None:
        self._window, self._length = window, 0
        self._keys, self._values = self._grown(keys, room), self._grown(values, room)
        self._length = min(keys.shape[-2], self._keys.shape[-2] - room)

    def put(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one slot behind those that count; called again before `count`, it writes the same slot.

        Args:
            keys: (1, heads, 1, head_dim).
            values: As many.

        Returns:
            Keys and values (1, heads, slots, head_dim) that the slot sees, itself at the end.
        """
        end = self._length + 1
        if end > self._keys.shape[-2]:
            seen_keys, seen_values = self._keys, self._values
            room = max(_LEAST_ROOM, self._length // 2)
            self._keys, self._values = self._grown(seen_keys, room), self._grown(seen_values, room)
            self._length = self._keys.shape[-2] - room
            end = self._length + 1
        self._keys[:, :, end - 1 : end], self._values[:, :, end - 1 : end] = keys, values
        first = 0 if self._window is None else max(0, end - self._window)
        return self._keys[:, :, first:end], self._values[:, :, first:end]

    def count(self) -> None:
        """Count what was put: the step has come to its end."""
        self._length += 1

    def _grown(self, full: torch.Tensor, room: int) -> torch.Tensor:
        """A tensor of its own with what later slots can see of a full one, and room behind it."""
        seen = full if self._window is None else full[:, :, max(0, full.shape[-2] - self._window + 1) :]
        made = seen.new_empty(*seen.shape[:2], seen.shape[-2] + room, seen.shape[-1])
        made[:, :, : seen.shape[-2]] = seen
        return made


class RowCache:
    """The KV cache of one row: a `RowLayer` for each layer.

    Args:
        layers: From the first to the last.
    """

    def __init__(self, layers: Sequence[RowLayer]) -> None:
        self.layers = list(layers)

    @classmethod
    def of(cls, cache: Any, new_tokens: int) -> RowCache:
        """A copy of the cache of a prompt that was read alone.

        Args:
            cache: A `DynamicCache` of transformers, batch 1.
            new_tokens: Most that will follow.

        Raises:
            TypeError: A layer keeps something else than keys and values of slots (states of recurrent layers, say).
        """
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        room, made = min(new_tokens, _FIRST_ROOM), []
        for layer in cache.layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized:
                raise TypeError(f"a cache layer of the kind {type(layer).__name__}")
            window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None
            made.append(RowLayer(layer.keys, layer.values, window, room))
        return cls(made)

    def count(self) -> None:
        """Count what a step put into all layers."""
        for layer in self.layers:
            layer.count()
