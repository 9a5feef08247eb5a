"""Attention functions of transformers by name: which are known, and a tree that takes another.

transformers takes attention functions by name from a table that anybody may add to. The name stands in the config of a
module tree, so another function is put in place on a second tree over the same tensors, and the LLM does not notice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

# Plain functions of query, keys, values and mask; others (flash attention and its like) want their own arguments.
KNOWN = ("sdpa", "eager")


def known_attention(model: Any) -> str:
    """The name of a model's attention function.

    Raises:
        TypeError: It is of another kind than `KNOWN`.
    """
    inner = str(model.config._attn_implementation)
    if inner not in KNOWN:
        raise TypeError(f"attention of the kind {inner}")
    return inner


def name_attention(tree: Any, name: str) -> None:
    """Let a tree of one's own (`halves.second_tree`) take the attention function of a name."""
    configs = {id(found): found for module in tree.modules() if (found := getattr(module, "config", None)) is not None}
    for config in configs.values():
        config._attn_implementation = name


def attention_function(inner: str, module: Any) -> Callable[..., tuple[Any, Any]]:
    """The attention function of that name; that of plain PyTorch is each architecture's own."""
    if inner == "eager":
        found: Any = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined, unused-ignore]
        return found  # type: ignore[no-any-return]
    from transformers import AttentionInterface

    table: Any = AttentionInterface
    return table()[inner]  # type: ignore[no-any-return]
