"""One decoding step of several rows: all layers run over all rows at once, attention alone runs row by row.

Decoding reads every weight of the LLM for each step; rows that share a step share that. Attention has no weights: each
row has its keys and values to itself (`row_cache`), so it is computed row by row by the very function that computes it
for a prompt alone, without padding and without a mask.

It is an attention function of its own in a second tree over the same tensors; see `models.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from compllm_rag.generation.row_cache import RowCache
from compllm_rag.models.attention import KNOWN, attention_function, known_attention, name_attention
from compllm_rag.models.halves import second_tree

_NAME = "compllm_rows"
_GROWING = ("dynamic", "longrope")  # RoPE that turns all rows by the longest of them


def row_tree(model: Any) -> Any:
    """A module tree over the tensors of another, for steps of one token of each row.

    Args:
        model: A decoder of transformers, or a causal LM.

    Returns:
        The same kind of model; `past_key_values` has to be a `RowsCache`.

    Raises:
        TypeError: Its attention is of a kind that is not known to work row by row.
    """
    inner = known_attention(model)
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in _GROWING:
                raise TypeError(f"positions of the kind {kind}, which depend on the longest row")
    _register()
    tree = second_tree(model)
    name_attention(tree, f"{_NAME}_{inner}")
    return tree


class RowsCache:
    """The KV caches of rows, for one step, as much like one of transformers as its models ask for.

    What `update` gives back is for attention by rows alone: a list with a tensor for each row.

    Args:
        rows: In the order of the batch.
    """

    is_compileable = False

    def __init__(self, rows: Sequence[RowCache]) -> None:
        self._rows = rows

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **options: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Put one slot into each row: keys and values (rows, heads, 1, head_dim)."""
        pairs = [
            row.layers[layer_idx].put(key_states[i : i + 1], value_states[i : i + 1])
            for i, row in enumerate(self._rows)
        ]
        return [keys for keys, _ in pairs], [values for _, values in pairs]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Rows differ in it; whoever makes a step gives positions."""
        return 0


def _register() -> None:
    """Add attention by rows to the table of transformers; again is harmless."""
    from transformers import AttentionInterface

    for inner in KNOWN:
        AttentionInterface.register(f"{_NAME}_{inner}", _attend_by(inner))


def _attend_by(inner: str) -> Callable[..., tuple[torch.Tensor, None]]:
    def attend(
        module: Any,
        query: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        mask: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention of one slot of each row: query (rows, heads, 1, head_dim)."""
        function = attention_function(inner, module)
        out = [
            function(module, query[i : i + 1], row_keys, row_values, None, **options)[0]
            for i, (row_keys, row_values) in enumerate(zip(keys, values, strict=True))
        ]
        return torch.cat(out), None  # (rows, 1, heads, head_dim)

    return attend
