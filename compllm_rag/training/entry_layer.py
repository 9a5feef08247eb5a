"""Deep concepts that enter at another layer, from those that are trained for one: where to go on training from.

The LoRA that writes concepts and the one that reads them lie in layers of the same LLM. Where the entry layer moves, a
layer in between changes sides and keeps its LoRA: what it had learned of reading a prompt's concepts, or of writing a
chunk's, is most of what it has to know on the other side. So a new entry layer begins near the old one, not untrained.
"""

from __future__ import annotations

import torch

from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.config import CompressorConfig, checked
from compllm_rag.errors import ConfigurationError
from compllm_rag.models.adapters import load_lora_state, lora_state


def at_entry_layer(made: DeepCompressor, entry_layer: int) -> DeepCompressor:
    """The same weights with concepts that enter at another layer; a learned selector is to be learned anew.

    Args:
        made: The compressor; its weights are copied.
        entry_layer: L of the new one.

    Returns:
        A compressor with a fingerprint of its own; `made` itself where that is its layer.

    Raises:
        ConfigurationError: There is no such layer, or both halves do not have the same kind of LoRA.
    """
    own = made.config
    if entry_layer == own.entry_layer:
        return made
    kinds = [
        (own.lora_rank, own.lora_alpha, sorted(own.lora_modules)),
        (own.read_rank, own.read_alpha, sorted(own.read_modules)),
    ]
    if kinds[0] != kinds[1]:
        raise ConfigurationError(
            "these concepts cannot enter at another layer",
            got=f"LoRA of rank {own.lora_rank} below the entry layer and of rank {own.read_rank} above it",
            expected="the same kind of LoRA in both halves",
            next_step="take one that was trained without --frozen-upper, or train at this layer from the start",
        )
    config = checked(CompressorConfig, **(own.model_dump() | {"entry_layer": entry_layer}))
    moved = DeepCompressor(made.llm, config, information=made.information, selector=made.selector)
    if own.lora_rank:
        by_layer = _by_layer(lora_state(made.decoder), 0) | _by_layer(lora_state(made.halves.upper), own.entry_layer)
        for tree, first in ((moved.decoder, 0), (moved.halves.upper, entry_layer)):
            load_lora_state(tree, {name: by_layer[_place(name, first)] for name in lora_state(tree)})
    # A layer that comes under the entry layer has nothing to begin with here: its LoRA starts without effect.
    known, begun = lora_state(made.halves.lower), lora_state(moved.halves.lower)
    load_lora_state(moved.halves.lower, {name: known.get(name, tensor) for name, tensor in begun.items()})
    if moved.marker is not None and made.marker is not None:
        moved.marker.data.copy_(made.marker.data)
    moved.refresh_fingerprint()
    return moved


def _by_layer(state: dict[str, torch.Tensor], first: int) -> dict[tuple[int, str], torch.Tensor]:
    return {_place(name, first): tensor for name, tensor in state.items()}


def _place(name: str, first: int) -> tuple[int, str]:
    """The LLM's layer that a tensor belongs to, and its name within it.

    Args:
        name: `...layers.N.NAME`, N counted within a half.
        first: The LLM's layer that the half begins with.
    """
    number, _, inner = name.partition("layers.")[2].partition(".")
    return first + int(number), inner
