"""Narrowing: from a layer on, the LLM reads only those concepts that the question attends to.

All concepts of a prompt pass the layers from the entry layer L up to a layer T. There the question's own tokens have
attended to them, which tells better than anything known at ingestion which of them it needs. From T on the others are
gone: they take neither computation nor room in the KV cache. Texts alone are pruned in this way by FastV (arXiv
2403.06764, section 4: after a layer, the tokens with the least attention) and LazyLLM (arXiv 2407.14057); here what
passes the layers below T are concepts already.

Two module trees over the upper half's own tensors, LoRA included, as in `models.halves`; the attention of the layers
just below T also tells how much the question attends to each slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compllm_rag.config import Narrowing
from compllm_rag.errors import ConfigurationError, UnsupportedModelError
from compllm_rag.models.attention import KNOWN, attention_function, known_attention, name_attention
from compllm_rag.models.halves import Halves, keep_layers, second_tree
from compllm_rag.models.llm import decoder_of

_NAME = "compllm_counting"
# How many layers below T tell what the question attends to.
_LAYERS = 2
# Of a longer question the last tokens tell, as in SnapKV (arXiv 2404.14469, section 4): scores take bounded memory.
_TOKENS = 128


class AttentionCount:
    """How much the tokens of each row's question attend to each slot.

    Of each token the head that attends most counts, since most heads look at no passage at all; the mean over the
    question's tokens (the last 128 of them), summed over layers.

    Args:
        asking: (batch, n), True where a token of the question stands.
        real: (batch, n), False at padding.
    """

    def __init__(self, asking: torch.Tensor, real: torch.Tensor) -> None:
        self._real = real.bool()
        places = [row.nonzero()[-_TOKENS:, 0] for row in asking.bool()]
        most = max(map(len, places))
        # (batch, most): slots of the question's tokens, and where there are any.
        self._rows = torch.stack([nn.functional.pad(row, (0, most - len(row))) for row in places])
        ends = torch.tensor([[len(row)] for row in places], device=asking.device)
        self._counted = torch.arange(most, device=asking.device)[None] < ends
        self.total = torch.zeros(asking.shape, device=asking.device)  # (batch, n)

    @torch.no_grad()
    def add(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """Count one layer's attention, for as many of the question's tokens as are among the queries.

        Args:
            query: (batch, heads, q, head_dim), the last q of the slots so far.
            key: (batch, kv_heads, slots so far, head_dim).
            scaling: Of their products.
        """
        slots, kv_heads = key.shape[2], key.shape[1]
        begin = slots - query.shape[2]
        here = self._counted & (self._rows >= begin) & (self._rows < slots)  # (batch, most)
        if not here.any():
            return
        at = torch.where(here, self._rows - begin, 0)[:, None, :, None]
        asked = query.gather(2, at.expand(-1, query.shape[1], -1, query.shape[3]))  # (batch, heads, most, head_dim)
        # Heads that share keys stand behind one another: (batch, kv_heads, heads / kv_heads * most, head_dim).
        grouped = asked.reshape(len(asked), kv_heads, -1, asked.shape[3])
        scores = (grouped @ key.transpose(2, 3)).float() * scaling
        scores = scores.reshape(*asked.shape[:3], slots)  # (batch, heads, most, slots)
        earlier = torch.arange(slots, device=key.device)[None, None] <= self._rows[:, :, None]  # (batch, most, slots)
        seen = earlier & self._real[:, None, :slots]
        scores = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        share = scores.amax(1) * here[:, :, None]  # (batch, most, slots)
        self.total[:, :slots] += share.sum(1) / self._counted.sum(1, keepdim=True).clamp_min(1)


_COUNTING: ContextVar[tuple[AttentionCount, frozenset[int]] | None] = ContextVar("compllm_counting", default=None)


class NarrowedHalves:
    """The upper half of an LLM in two: the layers [L, T) that read all concepts, and those from T on.

    Args:
        halves: The LLM in two halves.
        narrowing: T, and the share of concepts that is read from there on.

    Attributes:
        middle: A decoder of the layers [L, T), without final norm.
        top: A causal LM of the layers from T on.

    Raises:
        ConfigurationError: T is not above the entry layer or not below the last layer.
        UnsupportedModelError: The LLM's attention is of a kind that cannot be looked into.
    """

    def __init__(self, halves: Halves, narrowing: Narrowing) -> None:
        check_narrowing(narrowing, halves.layer, halves.depth)
        self.halves, self.narrowing = halves, narrowing
        below = narrowing.layer - halves.layer
        self.middle = second_tree(decoder_of(halves.upper))
        keep_layers(self.middle, self.middle, 0, below)
        self.middle.norm = nn.Identity()
        self.top = second_tree(halves.upper)
        decoder = decoder_of(self.top)
        keep_layers(self.top, decoder, below, len(decoder.layers))
        self._looked: frozenset[int] = frozenset()
        if narrowing.by == "attention" and 0 < narrowing.share < 1:  # else there is no need to know
            self._looked = frozenset(_whole_layers(self.middle)[-_LAYERS:])
            if not self._looked:
                raise UnsupportedModelError(
                    "attention to concepts cannot be counted",
                    got=f"layers {halves.layer} to {narrowing.layer - 1} with sliding windows alone",
                    expected="a layer that sees the whole prompt",
                    next_step="narrow at a later layer or to a share of 0, or not at all",
                )
            _look_into(self.middle)

    def caches(self) -> tuple[Any, Any]:
        """Empty KV caches of the middle and of the top."""
        from transformers import DynamicCache

        return DynamicCache(config=self.middle.config), DynamicCache(config=decoder_of(self.top).config)

    @contextmanager
    def counting(self, count: AttentionCount) -> Iterator[None]:
        """The middle tells `count` what is attended to while this lasts, in this thread."""
        token = _COUNTING.set((count, self._looked))
        try:
            yield
        finally:
            _COUNTING.reset(token)

    def through_middle(self, hidden: torch.Tensor, mask: Any, positions: torch.Tensor, cache: Any = None) -> Any:
        """Run the layers [L, T).

        Args:
            hidden: The residual stream (batch, n, hidden_size) in front of layer L.
            mask: As for `Halves.above`.
            positions: (batch, n).
            cache: The middle's KV cache, which grows by n; None keeps none.

        Returns:
            The residual stream (batch, n, hidden_size) in front of layer T.
        """
        return self.middle(
            inputs_embeds=hidden,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def through_top(
        self, hidden: torch.Tensor, mask: Any, positions: torch.Tensor, cache: Any = None, *, keep: int = 0
    ) -> Any:
        """Run the layers from T on; see `Halves.above`.

        Returns:
            Logits (batch, n or keep, vocab_size).
        """
        return self.top(
            inputs_embeds=hidden,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
        ).logits


def slots_that_go_on(narrowing: Narrowing, count: AttentionCount, concepts: torch.Tensor, real: torch.Tensor) -> Kept:
    """All tokens, and the share of each row's concepts that goes on; see `kept_slots`."""
    score = count.total
    if narrowing.by == "chance":
        score = torch.rand(score.shape, generator=torch.Generator().manual_seed(0)).to(score)  # (batch, n)
    return kept_slots(score, concepts, real, narrowing.share)


@dataclass(frozen=True)
class Kept:
    """Which slots go on from layer T, as one left-padded batch.

    Attributes:
        order: (batch, most kept), slots in their order; padding in front.
        real: (batch, most kept), False at padding.
    """

    order: torch.Tensor
    real: torch.Tensor

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """What stands there of (batch, n, ...)."""
        at = self.order.reshape(*self.order.shape, *[1] * (rows.ndim - 2)).expand(-1, -1, *rows.shape[2:])
        return rows.gather(1, at)


def kept_slots(attention: torch.Tensor, concepts: torch.Tensor, real: torch.Tensor, share: float) -> Kept:
    """All tokens, and of each row's concepts the share that is attended to most.

    Args:
        attention: (batch, n), see `AttentionCount.total`.
        concepts: (batch, n), True where a concept stands.
        real: (batch, n), False at padding.
        share: Of the concepts of each row, see `kept_concepts`.
    """
    concepts, real = concepts.bool() & real.bool(), real.bool()
    counts = [kept_concepts(int(n), share) for n in concepts.sum(1)]
    ranked = attention.masked_fill(~concepts, -torch.inf).argsort(dim=1, descending=True, stable=True)  # (batch, n)
    rank = ranked.argsort(dim=1)  # (batch, n), of each slot
    chosen = rank < torch.tensor(counts, device=rank.device)[:, None]
    kept = (real & ~concepts) | (chosen & concepts)  # (batch, n)
    most = int(kept.sum(1).max())
    order = kept.long().argsort(dim=1, stable=True)[:, -most:]  # (batch, most): what is left out stands in front
    return Kept(order, kept.gather(1, order))


def check_narrowing(narrowing: Narrowing, entry_layer: int, depth: int) -> None:
    """Refuse a layer T at which nothing can be narrowed.

    Raises:
        ConfigurationError: It is not above the entry layer, or there is no such layer.
    """
    if not entry_layer < narrowing.layer < depth:
        raise ConfigurationError(
            "concepts cannot be narrowed at this layer",
            got=narrowing.layer,
            expected=f"{entry_layer + 1} to {depth - 1}, above entry layer {entry_layer}"
            if entry_layer + 1 < depth
            else f"an LLM with two layers or more from entry layer {entry_layer} on",
            next_step="choose a layer between the entry layer and the last, or leave narrowing out",
        )


def kept_concepts(n_concepts: int, share: float) -> int:
    """How many of a prompt's concepts are read from layer T on: one at least, unless none are to be read."""
    return min(n_concepts, max(1, round(share * n_concepts))) if share else 0


def _whole_layers(decoder: Any) -> list[int]:
    """The layers that see the whole prompt, without a sliding window."""
    kinds = getattr(decoder.config, "layer_types", None) or ()
    if not kinds:
        sliding = getattr(decoder.config, "sliding_window", None)
        on = getattr(decoder.config, "use_sliding_window", True)
        return [] if sliding and on else list(range(len(decoder.layers)))
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


def _look_into(tree: Any) -> None:
    """Let the attention of a tree tell the count that is current."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    try:
        inner = known_attention(tree)
    except TypeError as error:
        raise UnsupportedModelError(
            "attention to concepts cannot be counted",
            got=str(error),
            expected=f"attention of the kind {' or '.join(KNOWN)}",
            next_step="load the LLM with one of these, narrow to a share of 0, or not at all",
        ) from error
    AttentionInterface.register(f"{_NAME}_{inner}", _attend_by(inner))  # again is harmless
    AttentionMaskInterface.register(f"{_NAME}_{inner}", ALL_MASK_ATTENTION_FUNCTIONS[inner])
    name_attention(tree, f"{_NAME}_{inner}")


def _attend_by(inner: str) -> Callable[..., Any]:
    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> Any:
        """Attention as it is; query (batch, heads, q, head_dim)."""
        counting = _COUNTING.get()
        if counting is not None and module.layer_idx in counting[1]:
            scaling = options.get("scaling")
            counting[0].add(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return attention_function(inner, module)(module, query, key, value, mask, **options)

    return attend
