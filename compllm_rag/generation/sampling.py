"""How the next token is chosen: the likeliest, or drawn at random by transformers' own logits processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

    from compllm_rag.config import GenerationConfig


class Constraint(Protocol):
    """Forbids tokens step by step, such as those that no JSON goes on with."""

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (batch, vocab_size) with the tokens that may not come now at minus infinity."""
        ...

    def accept(self, tokens: Sequence[int]) -> None:
        """Take note of the token of each row that was chosen."""
        ...


class Choice:
    """Chooses the tokens of one batch.

    Each row is drawn with a random generator of its own, from the same seed: a prompt gets the same answer alone and in
    any batch. Greedy decoding without further settings is one `argmax` and nothing else.

    Args:
        config: Temperature, top_p, top_k, repetition_penalty and seed.
        rows: Prompts of the batch.
        constraint: Forbids tokens before anything else is done; None forbids none.
    """

    def __init__(self, config: GenerationConfig, rows: int, constraint: Constraint | None = None) -> None:
        self._processors = _processors(config)
        self._sampled, self._constraint = config.temperature > 0, constraint
        self._generators = [_generator(config.seed) for _ in range(rows)] if self._sampled else []
        self._chosen: list[list[int]] = [[] for _ in range(rows)]

    def __call__(self, logits: torch.Tensor) -> list[int]:
        """One token of each row.

        Args:
            logits: (batch, vocab_size).
        """
        if self._constraint is not None:
            logits = self._constraint.mask(logits)
        if self._processors:
            ids = torch.tensor(self._chosen, dtype=torch.long, device=logits.device)  # (batch, tokens so far)
            # A copy, since some processors write into what they get, and the LLM's logits may be kept by others.
            logits = self._processors(ids, logits.float().clone())  # type: ignore[arg-type]
        if self._sampled:
            # On the CPU, so that a seed gives one answer on every device that computes the same logits.
            shares = logits.float().softmax(-1).cpu()  # (batch, vocab_size)
            tokens = [
                int(torch.multinomial(row, 1, generator=g)) for row, g in zip(shares, self._generators, strict=True)
            ]
        else:
            tokens = logits.argmax(-1).tolist()
        if self._processors:
            for row, token in zip(self._chosen, tokens, strict=True):
                row.append(token)
        if self._constraint is not None:
            self._constraint.accept(tokens)
        return tokens


def _processors(config: GenerationConfig) -> LogitsProcessorList | None:
    """In the order of transformers' `generate`; None where nothing is to be done."""
    from transformers.generation import logits_process as stock

    made = stock.LogitsProcessorList()
    if config.repetition_penalty != 1.0:
        made.append(stock.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.temperature > 0:
        if config.temperature != 1.0:
            made.append(stock.TemperatureLogitsWarper(config.temperature))
        if config.top_k is not None:
            made.append(stock.TopKLogitsWarper(config.top_k))
        if config.top_p is not None:
            made.append(stock.TopPLogitsWarper(config.top_p))
    return made or None


def _generator(seed: int | None) -> torch.Generator:
    made = torch.Generator()
    if seed is None:
        made.seed()
    else:
        made.manual_seed(seed)
    return made
