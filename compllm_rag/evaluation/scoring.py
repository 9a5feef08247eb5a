"""Answers and likelihoods from one prefill of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compllm_rag.config import GenerationConfig
from compllm_rag.generation.forward import Forward
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import PromptPlan


@dataclass(frozen=True)
class Prefilled:
    """A batch of prompts that was read, and can be continued any number of times.

    Attributes:
        forward: The prompts as they were read; only forks of it go on.
        logits: (batch, vocab_size) of the first token behind each prompt.
    """

    forward: Forward
    logits: torch.Tensor

    @torch.inference_mode()
    def log_likelihoods(self, continuations: Sequence[Sequence[int]]) -> list[float]:
        """Log-probability of one continuation per prompt, teacher-forced.

        Args:
            continuations: Token ids, at least one for each prompt.

        Returns:
            Sums over the tokens, in nats.
        """
        device, longest = self.logits.device, max(map(len, continuations))
        # What pads a continuation stands behind it, where nothing that counts can see it.
        ids = torch.tensor([[*c, *[0] * (longest - len(c))] for c in continuations], device=device)  # (batch, longest)
        lengths = torch.tensor([len(c) for c in continuations], device=device)
        counted = torch.arange(longest, device=device) < lengths[:, None]  # (batch, longest)
        logits = self.logits[:, None]
        if longest > 1:
            logits = torch.cat([logits, self.forward.fork().extend(ids[:, :-1])], 1)
        logits = logits.float()  # (batch, longest, vocab_size)
        each = logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)  # (batch, longest)
        sums: list[float] = each.double().masked_fill(~counted, 0.0).sum(1).tolist()
        return sums


class ScoringGenerator(LocalGenerator):
    """A `LocalGenerator` that keeps what it prefilled last, so that scoring need not read the prompts again."""

    def __init__(self, llm: TargetLLM, config: GenerationConfig | None = None, *, halves: Halves | None = None) -> None:
        super().__init__(llm, config, halves=halves)
        self._kept: list[Prefilled] = []

    def begin(self, forward: Forward) -> torch.Tensor:
        """See `LocalGenerator.begin`."""
        logits = super().begin(forward)
        self._kept = [Prefilled(forward.fork(), logits)]
        return logits

    def run(self, plans: Sequence[PromptPlan], *, answer: bool) -> tuple[list[str | None], Prefilled]:
        """Read prompts of one kind as one batch, and answer them if asked to.

        Returns:
            The answers (None each without `answer`), and the prompts as they were read.

        Raises:
            PromptTooLongError: A prompt and its answer do not fit the window.
        """
        if answer:
            answers: list[str | None] = [made.text for made in self.generate(plans)]
        else:
            self.begin(self.lay_out(plans))
            answers = [None] * len(plans)
        return answers, self._kept.pop()
