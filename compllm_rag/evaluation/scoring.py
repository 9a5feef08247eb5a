"""Answers and likelihoods from one prefill of each prompt."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compllm_rag.config import GenerationConfig
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import PromptInputs, PromptPlan, lay_out


@dataclass(frozen=True)
class Prefilled:
    """A batch of prompts that was read, and can be continued any number of times.

    Attributes:
        inputs: The prompts.
        logits: (batch, vocab_size) of the first token behind each prompt.
        cache: Keys and values; never written to.
    """

    inputs: PromptInputs
    logits: torch.Tensor
    cache: Any

    @torch.inference_mode()
    def log_likelihoods(self, model: Any, continuations: Sequence[Sequence[int]]) -> list[float]:
        """Log-probability of one continuation per prompt, teacher-forced.

        Args:
            model: The target LLM's causal LM.
            continuations: Token ids, at least one for each prompt.

        Returns:
            Sums over the tokens, in nats.
        """
        device, longest = self.logits.device, max(map(len, continuations))
        # What pads a continuation stands behind it, where nothing that counts can see it.
        ids = torch.tensor([[*c, *[0] * (longest - len(c))] for c in continuations], device=device)
        lengths = torch.tensor([len(c) for c in continuations], device=device)
        counted = torch.arange(longest, device=device) < lengths[:, None]
        logits = self.logits[:, None]
        if longest > 1:
            mask, positions = self.inputs.attention_mask, self.inputs.position_ids
            if mask is not None and positions is not None:
                mask = torch.cat([mask, mask.new_ones(mask.shape[0], longest - 1)], 1)
                positions = positions[:, -1:] + 1 + torch.arange(longest - 1, device=device)
            more = model(
                input_ids=ids[:, :-1],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=_fork(self.cache),
                use_cache=True,
            ).logits
            logits = torch.cat([logits, more], 1)
        logits = logits.float()
        each = logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)
        sums: list[float] = each.double().masked_fill(~counted, 0.0).sum(1).tolist()
        return sums


class ScoringGenerator(LocalGenerator):
    """A `LocalGenerator` that keeps what it prefilled last, so that scoring need not read the prompts again."""

    def __init__(self, llm: TargetLLM, config: GenerationConfig | None = None) -> None:
        super().__init__(llm, config)
        self._kept: list[Prefilled] = []

    def prefill(self, inputs: PromptInputs) -> tuple[torch.Tensor, Any]:
        """See `LocalGenerator.prefill`."""
        logits, cache = super().prefill(inputs)
        self._kept = [Prefilled(inputs, logits, _fork(cache))]
        return logits, cache

    def run(self, plans: Sequence[PromptPlan], *, answer: bool) -> tuple[list[str | None], Prefilled]:
        """Read prompts as one batch, and answer them if asked to.

        Returns:
            The answers (None each without `answer`), and the prompts as they were read.

        Raises:
            PromptTooLongError: A prompt and its answer do not fit the window.
        """
        if answer:
            answers: list[str | None] = [made.text for made in self.generate(plans)]
        else:
            self.prefill(lay_out(plans, self.llm))
            answers = [None] * len(plans)
        return answers, self._kept.pop()


def _fork(cache: Any) -> Any:
    """A cache that can grow on its own: its layers put new tensors in place of theirs and never write into them."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked
