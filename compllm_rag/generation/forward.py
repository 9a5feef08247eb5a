"""A batch of prompts that is read once and can be gone on with: what generation and scoring have in common."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch

from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import PromptInputs


class Forward(Protocol):
    """Prefill and what follows it, of one left-padded batch."""

    def prefill(self) -> torch.Tensor:
        """Read the prompts; logits (batch, vocab_size) of the first new token of each."""
        ...

    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        """Go on with tokens (batch, n), the first behind the prompt; logits (batch, n, vocab_size) behind each."""
        ...

    def fork(self) -> Self:
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

    @torch.inference_mode()
    def prefill(self) -> torch.Tensor:
        """Read the prompts; logits (batch, vocab_size) of the first new token of each."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self._llm.model.config)
        logits: torch.Tensor = self._llm.model(
            inputs_embeds=self._inputs.inputs_embeds,
            attention_mask=self._mask,
            position_ids=self._inputs.position_ids,
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


def fork_cache(cache: Any) -> Any:
    """A cache that can grow on its own: its layers put new tensors in place of theirs and never write into them."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked


def as_rows(tokens: Sequence[int], device: torch.device) -> torch.Tensor:
    """One token of each row as ids (batch, 1)."""
    return torch.tensor(list(tokens), device=device)[:, None]
