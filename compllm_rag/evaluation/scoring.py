"""Answers and likelihoods from one prefill of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compllm_rag.config import GenerationConfig
from compllm_rag.errors import DeviceMemoryError
from compllm_rag.generation.base import Generation
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


@dataclass(frozen=True)
class PrefilledParts:
    """Prompts that were read in one batch, or, where memory was short, in several.

    Attributes:
        parts: In the order of the prompts.
    """

    parts: Sequence[Prefilled]

    def log_likelihoods(self, continuations: Sequence[Sequence[int]]) -> list[float]:
        """See `Prefilled.log_likelihoods`; one continuation per prompt of all parts."""
        out: list[float] = []
        for part in self.parts:
            out += part.log_likelihoods(continuations[len(out) : len(out) + len(part.logits)])
        return out


class ScoringGenerator(LocalGenerator):
    """A `LocalGenerator` that keeps what it prefilled, so that scoring need not read the prompts again."""

    def __init__(self, llm: TargetLLM, config: GenerationConfig | None = None, *, halves: Halves | None = None) -> None:
        super().__init__(llm, config, halves=halves)
        self._kept: list[Prefilled] = []

    def begin(self, forward: Forward) -> torch.Tensor:
        """See `LocalGenerator.begin`."""
        logits = super().begin(forward)
        self._kept.append(Prefilled(forward.fork(), logits))
        return logits

    def run(self, plans: Sequence[PromptPlan], *, answer: bool) -> tuple[list[str | None], PrefilledParts]:
        """Read prompts of one kind as one batch, halved where memory is short, and answer them if asked to.

        Returns:
            The answers (None each without `answer`), and the prompts as they were read.

        Raises:
            PromptTooLongError: A prompt and its answer do not fit the window.
            DeviceMemoryError: Not even a single prompt fits the memory.
        """
        self._kept = []
        answers: list[str | None] = [None] * len(plans)
        if answer:
            answers = [made.text for made in self.generate(plans)]
        else:
            self._read(plans)
        kept, self._kept = self._kept, []
        return answers, PrefilledParts(kept)

    def _generate(self, plans: Sequence[PromptPlan], config: GenerationConfig) -> list[Generation]:
        before = len(self._kept)
        try:
            return super()._generate(plans, config)
        except DeviceMemoryError:
            del self._kept[before:]  # what was read in vain: its halves are read anew
            raise

    def _read(self, plans: Sequence[PromptPlan]) -> None:
        try:
            forward = self.lay_out(plans)
            with self._room_for(plans):
                self.begin(forward)
        except DeviceMemoryError:
            if len(plans) == 1:
                raise
        else:
            return
        half = len(plans) // 2
        self._read(plans[:half])
        self._read(plans[half:])
