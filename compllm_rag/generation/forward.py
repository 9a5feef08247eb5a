"""A batch of prompts that is read once and can be gone on with: what generation and scoring have in common."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import PromptInputs


@dataclass(frozen=True)
class Past:
    """The beginning of one prompt, read before.

    Attributes:
        tokens: How many tokens of the prompt it covers.
        slots: How many tokens and concepts it covers.
        caches: KV caches that hold just these and are the caller's own: of the LLM, or of the lower half (tokens) and
            of the upper half (slots).
    """

    tokens: int
    slots: int
    caches: tuple[Any, ...]


class Forward(Protocol):
    """Prefill and what follows it, of one left-padded batch."""

    def prefill(self) -> torch.Tensor:
        """Read the prompts; logits (batch, vocab_size) of the first new token of each."""
        ...

    def prefill_parts(self, *, most: int | None = None) -> Iterator[torch.Tensor | None]:
        """`prefill` step by step, each over at most so many slots: None while there is more, then the logits."""
        ...

    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        """Go on with tokens (batch, n), the first behind the prompt; logits (batch, n, vocab_size) behind each."""
        ...

    def fork(self) -> Forward:
        """The same prompts as they were read, to be gone on with in another way."""
        ...


class WholeForward:
    """The LLM as it is, over text and concepts among the input embeddings.

    Inference mode is entered for each call and left before it returns: it belongs to the thread.

    Args:
        llm: The target LLM.
        inputs: Prompts that were laid out.
    """

    def __init__(self, llm: TargetLLM, inputs: PromptInputs) -> None:
        self._llm, self._inputs = llm, inputs
        self.cache: Any = None
        self._mask = inputs.attention_mask  # (batch, slots in the cache); None where nothing is padded
        # (batch, 1), position of the next token; None where positions are slots.
        self._at = None if inputs.position_ids is None else inputs.position_ids[:, -1:] + 1

    @property
    def caches(self) -> tuple[Any, ...]:
        """The KV cache, as far as the prompts were read."""
        return (self.cache,)

    @property
    def owner(self) -> object:
        """What the KV cache belongs to."""
        return self._llm.model

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._llm.device

    def empty_caches(self) -> tuple[Any, ...]:
        """A KV cache to begin with."""
        from transformers import DynamicCache

        return (DynamicCache(config=self._llm.model.config),)

    @property
    def llm(self) -> TargetLLM:
        """The target LLM."""
        return self._llm

    @property
    def next_position(self) -> int:
        """Position of the first new token of a prompt that is alone in its batch."""
        return int(self._inputs.inputs_embeds.shape[1])

    def prefill(self, past: Past | None = None) -> torch.Tensor:
        """Read the prompts; logits (batch, vocab_size) of the first new token of each.

        Args:
            past: What was read before of a prompt that is alone in its batch.
        """
        return last_of(self.prefill_parts(past))

    def prefill_parts(self, past: Past | None = None, *, most: int | None = None) -> Iterator[torch.Tensor | None]:
        """See `Forward.prefill_parts`, and `prefill`."""
        [self.cache] = past.caches if past else self.empty_caches()
        last = self._inputs.inputs_embeds.shape[1]
        for begin, end in cuts(past.slots if past else 0, last, most):
            logits = self._read(begin, end)
            yield logits if end == last else None

    @torch.inference_mode()
    def _read(self, begin: int, end: int) -> torch.Tensor:
        """Slots from `begin` to `end`; logits (batch, vocab_size) behind them."""
        positions = self._inputs.position_ids
        logits: torch.Tensor = self._llm.model(
            inputs_embeds=self._inputs.inputs_embeds[:, begin:end],
            attention_mask=None if self._mask is None else self._mask[:, :end],
            position_ids=None if positions is None else positions[:, begin:end],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits

    @torch.inference_mode()
    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        """Go on with tokens (batch, n), the first behind the prompt; logits (batch, n, vocab_size) behind each."""
        n, positions = ids.shape[1], None
        if self._mask is not None and self._at is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(ids.shape[0], n)], 1)
            positions = self._at + torch.arange(n, device=ids.device)  # (batch, n)
            self._at = self._at + n
        logits: torch.Tensor = self._llm.model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits

    def fork(self) -> WholeForward:
        """The same prompts as they were read, to be gone on with in another way."""
        forked = copy.copy(self)
        forked.cache = fork_cache(self.cache)
        return forked


def cuts(first: int, last: int, most: int | None) -> Iterator[tuple[int, int]]:
    """Ranges of at most so many that cover [first, last), in order; None makes one range of it."""
    size = most or max(1, last - first)
    for begin in range(first, last, size):
        yield begin, min(last, begin + size)


def last_of(parts: Iterator[torch.Tensor | None]) -> torch.Tensor:
    """The logits at the end of `prefill_parts`."""
    return next(part for part in parts if part is not None)


def fork_cache(cache: Any) -> Any:
    """A cache that can grow on its own: its layers put new tensors in place of theirs and never write into them."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked


def cropped_cache(cache: Any, slots: int) -> Any | None:
    """A cache of its own with the first slots of another, which stays as it is; None where they are not all there.

    A layer with a sliding window forgets what has left its window, unless it was told to remember
    (`remembering_cache`); layers of other kinds (states of recurrent layers, quantised ones) cannot be cut at all.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    made = fork_cache(cache)
    for layer in made.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized:
            return None
        n, kept = layer.get_seq_length(), layer.keys.shape[-2]
        first = 0
        if type(layer) is DynamicSlidingWindowLayer:
            first, layer.cumulative_length = n - kept, slots  # slots in front of `first` are forgotten
            if first > max(0, slots - layer.sliding_window + 1):
                return None
        if slots > n:
            return None
        layer.keys, layer.values = (each[..., : slots - first, :] for each in (layer.keys, layer.values))
    return made


def remembering_cache(cache: Any) -> Any:
    """The same empty cache, its sliding windows told to remember what leaves them, where transformers can do so."""
    for layer in cache.layers:
        tell = getattr(layer, "activate_past_recording", None)
        if tell is not None:
            tell()
    return cache


def as_rows(tokens: Sequence[int], device: torch.device) -> torch.Tensor:
    """One token of each row as ids (batch, 1)."""
    return torch.tensor(list(tokens), device=device)[:, None]
