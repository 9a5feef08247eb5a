"""A prompt of deep concepts that is narrowed: from layer T on the LLM reads the share that the question attends to.

Below T it is read as `halves.SplitForward` reads it. There the tokens of the question have attended to all concepts,
and those they attended to least are left behind; all tokens go on. An answer's tokens see all concepts below T, and
what was kept of them above it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from compllm_rag.errors import ConfigurationError
from compllm_rag.generation.forward import Past, fork_cache
from compllm_rag.generation.halves import SplitForward, States, Tokens
from compllm_rag.models.narrowing import AttentionCount, NarrowedHalves, slots_that_go_on


class NarrowedForward(SplitForward):
    """Prefill and decoding of one left-padded batch of prompts, all narrowed alike.

    Args:
        narrowed: The LLM in its parts.
        rows: As of `SplitForward`.
        asking: Of each row: how many tokens at its end ask; they decide which concepts go on.
    """

    def __init__(
        self, narrowed: NarrowedHalves, rows: Sequence[Sequence[Tokens | States]], asking: Sequence[int]
    ) -> None:
        super().__init__(narrowed.halves, rows)
        self.narrowed = narrowed
        slots = torch.arange(self._mask.shape[1], device=self.device)  # (most slots,)
        first = self._mask.shape[1] - torch.tensor(asking, device=self.device)  # (batch,), rows end alike
        self._asking = (slots >= first[:, None]) & self._is_token & self._mask.bool()  # (batch, most slots)
        self._middle_cache, self._top_cache = narrowed.caches()
        self._count = AttentionCount(self._asking, self._mask)
        self._read: list[torch.Tensor] = []  # in front of layer T, (batch, slots of a part, hidden_size) each
        self._top_seen = self._mask  # of all slots in the top's cache, once the prompts were read

    @property
    def caches(self) -> tuple[Any, ...]:
        """The KV caches of the lower and of the upper half; layers of the latter differ in what they hold."""
        upper = fork_cache(self._middle_cache)
        upper.layers += fork_cache(self._top_cache).layers
        return self.lower_cache, upper

    def prefill_parts(self, past: Past | None = None, *, most: int | None = None) -> Iterator[torch.Tensor | None]:
        """See `SplitForward.prefill_parts`.

        Raises:
            ConfigurationError: Something was read before: which concepts go on depends on the whole prompt.
        """
        if past is not None and past.slots:
            raise ConfigurationError(
                "a narrowed prompt is read from its start",
                got=f"{past.slots} slots read before",
                expected="none",
                next_step="leave narrowing or the prefix cache out",
            )
        self._middle_cache, self._top_cache = self.narrowed.caches()
        self._count, self._read = AttentionCount(self._asking, self._mask), []
        yield from super().prefill_parts(None, most=most)

    @torch.inference_mode()
    def _above(self, joined: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Slots from `begin` to `end` through the layers below T, and, behind the last of them, the rest."""
        mask, positions = self._mask[:, :end], self._positions[:, begin:end]
        with self.narrowed.counting(self._count):
            self._read.append(self.narrowed.through_middle(joined, mask, positions, self._middle_cache))
        if end < self._mask.shape[1]:
            return self._read[-1][:, -1]  # more is to come, and nobody looks at it
        hidden, self._read = torch.cat(self._read, 1), []  # (batch, most slots, hidden_size)
        real = self._mask.bool()
        kept = slots_that_go_on(self.narrowed.narrowing, self._count, real & ~self._is_token, real)
        self._top_seen = kept.real.long()  # (batch, most kept)
        logits: torch.Tensor = self.narrowed.through_top(
            kept.of(hidden), self._top_seen, kept.of(self._positions), self._top_cache, keep=1
        )
        return logits[:, -1]

    @torch.inference_mode()
    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        """See `SplitForward.extend`."""
        at = self._next(ids)  # (batch, n)
        self._top_seen = torch.cat([self._top_seen, torch.ones_like(ids)], 1)
        hidden = self.halves.below(self.halves.llm.embedding(ids), self._low_seen, at, self.lower_cache)
        hidden = self.narrowed.through_middle(hidden, self._seen, at, self._middle_cache)
        logits: torch.Tensor = self.narrowed.through_top(hidden, self._top_seen, at, self._top_cache)
        return logits  # (batch, n, vocab_size)

    def fork(self) -> NarrowedForward:
        """See `SplitForward.fork`."""
        forked = super().fork()
        forked._middle_cache, forked._top_cache = fork_cache(self._middle_cache), fork_cache(self._top_cache)
        return forked
