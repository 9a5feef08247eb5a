"""The LLM in two halves: the layers below the entry layer L, and those from L on with final norm and LM head.

Deep concepts join the residual stream in front of layer L. So passages run through the lower half when they are
compressed, the prompt's own tokens run through it when a question comes, and the upper half runs over both.

Each half is an ordinary module tree of transformers over the target's own tensors, called with `inputs_embeds`: no
memory for weights, no hooks, and the target does not notice. What transformers looks up by a layer's number (its place
in the KV cache, its kind of attention) is counted anew from 0 in each tree, on a copy of the config.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compllm_rag.errors import ConfigurationError, UnsupportedModelError
from compllm_rag.models.adapters import has_lora, merge_lora
from compllm_rag.models.llm import decoder_of

if TYPE_CHECKING:
    from compllm_rag.models.llm import TargetLLM


def lower_half(model: Any, layers: int | None) -> Any:
    """The decoder of a causal LM with its first layers only and no final norm.

    Make it when the model is on its device: a later move takes the shared parameters along, but not the buffers.

    Args:
        model: A causal LM of transformers.
        layers: How many layers, 0 to all; None means all.

    Returns:
        A bare decoder over the same tensors, frozen; its `last_hidden_state` (batch, n, hidden_size) is the residual
        stream behind its last layer.
    """
    tree = second_tree(decoder_of(model))
    keep_layers(tree, tree, 0, len(tree.layers) if layers is None else layers)
    tree.norm = nn.Identity()
    return tree


def upper_half(model: Any, first: int) -> Any:
    """A causal LM without its first layers: the layers from `first` on, the final norm and the LM head.

    Args:
        model: A causal LM of transformers.
        first: The layer that reads `inputs_embeds`.

    Returns:
        A causal LM over the same tensors, frozen. Its `inputs_embeds` (batch, n, hidden_size) are the residual stream
        in front of layer `first`, its logits those of the whole model.
    """
    tree = second_tree(model)
    decoder = decoder_of(tree)
    keep_layers(tree, decoder, first, len(decoder.layers))
    return tree


class Halves:
    """A target LLM below and above the entry layer.

    Args:
        llm: The target LLM; it stays as it is.
        layer: The entry layer L, from 0 (all layers are above) to the last layer.

    Raises:
        ConfigurationError: The LLM has no such layer, or nothing would stand above it.
        UnsupportedModelError: The halves would not do together what the LLM does: its layers share a state, or it
            changes `inputs_embeds` before the first layer. A forward over five tokens tells.
    """

    def __init__(self, llm: TargetLLM, layer: int) -> None:
        config, depth = decoder_of(llm.model).config, len(decoder_of(llm.model).layers)
        if not 0 <= layer < depth:
            raise ConfigurationError(
                "the LLM has no such entry layer",
                got=layer,
                expected=f"0 to {depth - 1}",
                next_step="choose a layer in the middle, or 0 for concepts among the input embeddings",
            )
        self.llm, self.layer, self.depth = llm, layer, depth
        if layer and (
            getattr(config, "num_kv_shared_layers", 0) or any(getattr(config, "kv_sharing_modes", None) or ())
        ):
            raise self._unsupported("layers that read the keys and values of other layers")
        if layer and getattr(config, "is_heterogeneous", False):
            raise self._unsupported("settings that differ from layer to layer")
        self.lower, self.upper = lower_half(llm.model, layer), upper_half(llm.model, layer)
        if layer:
            self._compare()

    def merged(self) -> Halves:
        """The same halves without LoRA layers: what they add is added to weights of each half's own.

        A LoRA of rank 32 makes a small LLM's layers a tenth slower or more. The price is memory for those weights, at
        most as much as the halves with a LoRA have; the target's stay as they are.
        """
        if not has_lora(self.lower) and not has_lora(self.upper):
            return self
        made = copy.copy(self)
        made.lower = merged_tree(self.lower) if has_lora(self.lower) else self.lower
        made.upper = merged_tree(self.upper) if has_lora(self.upper) else self.upper
        return made

    def caches(self) -> tuple[Any, Any]:
        """Empty KV caches of the lower and of the upper half."""
        from transformers import DynamicCache

        return DynamicCache(config=self.lower.config), DynamicCache(config=decoder_of(self.upper).config)

    def below(
        self, embeddings: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any = None
    ) -> torch.Tensor:
        """Run the lower half; with L = 0 there is nothing to run.

        Args:
            embeddings: Input embeddings (batch, n, hidden_size).
            mask: (batch, slots in the cache + n), 1 where something stands and 0 at padding, or what else transformers
                takes (training's mask by branch). It is never left out: without one transformers takes positions with
                gaps for sequences packed into one row.
            positions: (batch, n).
            cache: The lower half's KV cache, which grows by n; None keeps none.

        Returns:
            The residual stream (batch, n, hidden_size) in front of layer L.
        """
        if not self.layer:
            return embeddings
        hidden: torch.Tensor = self.lower(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return hidden

    def above(
        self, hidden: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any = None, *, keep: int = 0
    ) -> torch.Tensor:
        """Run the upper half.

        Args:
            hidden: The residual stream (batch, n, hidden_size) in front of layer L.
            mask: (batch, slots in the cache + n), as for `below`.
            positions: (batch, n).
            cache: The upper half's KV cache, which grows by n; None keeps none.
            keep: Give logits of this many slots at the end only; 0 means all.

        Returns:
            Logits (batch, n or keep, vocab_size).
        """
        logits: torch.Tensor = self.upper(
            inputs_embeds=hidden,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
        ).logits
        return logits

    @torch.inference_mode()
    def _compare(self) -> None:
        """Four tokens and a cached fifth through both halves and through the whole LLM."""
        from transformers import DynamicCache

        llm, whole, caches = self.llm, DynamicCache(config=decoder_of(self.llm.model).config), self.caches()
        # Ordinary tokens from all over the vocabulary: (1, 5) ids, (1, 5, hidden_size) embeddings.
        ids = torch.linspace(0, llm.embedding.weight.shape[0] - 1, 7, device=llm.device).long()[None, 1:-1]
        embeddings, positions = llm.embedding(ids), torch.arange(5, device=llm.device)[None]
        for begin, end in ((0, 4), (4, 5)):
            mask, at = torch.ones_like(positions[:, :end]), positions[:, begin:end]
            try:
                hidden = self.below(embeddings[:, begin:end], mask, at, caches[0])
                mine = self.above(hidden, mask, at, caches[1])
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                trouble = f"layers that do not run without the others ({type(error).__name__}: {error})"
                raise self._unsupported(trouble) from error
            theirs = llm.model(
                inputs_embeds=embeddings[:, begin:end],
                attention_mask=mask,
                position_ids=at,
                past_key_values=whole,
                use_cache=True,
            ).logits
            # The same kernels in the same order: what is left is rounding, if anything.
            tolerance = 1e-4 if llm.dtype == torch.float32 else 2e-2
            off = float((mine - theirs).float().abs().max() / theirs.float().abs().max())
            if not off <= tolerance:
                raise self._unsupported(f"logits off by {off:.2g} of the largest (inputs scaled at the start?)")

    def _unsupported(self, trouble: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            "this LLM cannot be cut in two",
            got=f"{type(self.llm.model).__name__} with {trouble}",
            expected="a decoder whose layers hand on nothing but hidden states (Llama, Qwen, Gemma 2 and 3, Mistral)",
            next_step="use entry layer 0, or choose another target LLM",
        )


def second_tree(module: Any) -> Any:
    """A second module tree, config included, over the same tensors."""
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared).requires_grad_(False).eval()


def merged_tree(tree: Any) -> Any:
    """A second module tree without LoRA layers: what they add is added to weights of its own, where they stand."""
    made = second_tree(tree)
    merge_lora(made)
    return made


def keep_layers(tree: Any, decoder: Any, first: int, last: int) -> None:
    """Cut the decoder of one's own tree down to the layers [first, last), in place.

    Args:
        tree: Of `second_tree`: its config changes, too.
        decoder: The tree itself, or the decoder in it.
        first: The first layer that stays.
        last: The one behind the last that stays.
    """
    depth = len(decoder.layers)
    decoder.layers = decoder.layers[first:last]
    for module in decoder.layers.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx -= first
    # A model for images, too, has the decoder's config twice.
    for config in {id(c): c for c in (decoder.config, tree.config.get_text_config())}.values():
        for name, value in list(vars(config).items()):
            # One entry a layer: `layer_types`, `no_rope_layers`, `layer_rope_theta` and their like.
            if isinstance(value, list | tuple) and len(value) == depth:
                setattr(config, name, value[first:last])
        if isinstance(getattr(config, "max_window_layers", None), int):
            config.max_window_layers = max(0, config.max_window_layers - first)
        config.num_hidden_layers = last - first


def default_entry_layer(depth: int) -> int:
    """Half the LLM's layers; a concept then costs half a token of text."""
    return max(1, depth // 2)
