"""A prompt of up to 128k tokens, read in chunks: its slots, its prefill, whole or by some of its chunks, decoding.

How long a chunk takes depends on what stands in front of it, in a straight line: its products with weights are always
as many, its attention grows with the KV cache. So a prefill of hours can be had from a few of its chunks, each behind a
cache of the length that it would find there. The values in a cache do not matter for its speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.ttft.cost_model import AROUND, MARKER, PASSAGE
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import decoder_of

Caches = tuple[Any, Any]  # of the lower and of the upper half
_BLOCK = 512  # slots that are drawn for a cache; its further slots repeat them


def slots(length: int, rate: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots of a prompt over that many source tokens: which are tokens of its own, and at which position each is.

    Args:
        length: Source tokens, in passages of `PASSAGE`.
        rate: Source tokens per concept; None reads them as text, so that all slots are tokens.

    Returns:
        Boolean (n,), and positions (n,) with gaps where tokens of a passage were not kept.
    """
    is_token, where = [True] * (AROUND // 2), list(range(AROUND // 2))
    at = len(where)
    for begin in range(0, length, PASSAGE):
        size = min(PASSAGE, length - begin)
        where += range(at, at + MARKER)
        is_token += [True] * MARKER
        at += MARKER
        kept = size if rate is None else max(1, round(size / rate))
        where += [at + place * size // kept for place in range(kept)]
        is_token += [rate is None] * kept
        at += size
    where += range(at, at + AROUND - AROUND // 2)
    is_token += [True] * (AROUND - AROUND // 2)
    return torch.tensor(is_token), torch.tensor(where)


@dataclass(frozen=True)
class Prompt:
    """A prompt for both halves; concepts are random states.

    Attributes:
        halves: The LLM in two halves; with an entry layer of 0 the whole LLM is the upper one.
        ids: Token ids (tokens,).
        is_token: Boolean (n,), which slots are tokens.
        positions: (n,).
        chunk: Slots of one forward; 0 takes all at once.
    """

    halves: Halves
    ids: torch.Tensor
    is_token: torch.Tensor
    positions: torch.Tensor
    chunk: int

    @property
    def begins(self) -> range:
        """The first slot of every chunk."""
        return range(0, len(self.is_token), self.chunk or len(self.is_token))

    @torch.inference_mode()
    def read(self, begin: int, caches: Caches) -> torch.Tensor:
        """Read the chunk that begins at a slot, behind caches that hold all in front of it.

        Returns:
            Logits (vocab_size,) behind its last slot.
        """
        llm, end = self.halves.llm, begin + self.begins.step
        here = self.is_token[begin:end].to(llm.device)
        at = self.positions[begin:end].to(llm.device)[None]  # (1, slots of the chunk)
        before, count = int(self.is_token[:begin].sum()), int(here.sum())
        hidden = torch.randn(1, len(here), llm.hidden_size, device=llm.device, dtype=llm.dtype)
        if count:
            ids = self.ids[before : before + count].to(llm.device)[None]  # (1, count)
            mask = torch.ones(1, before + count, dtype=torch.long, device=llm.device)
            # (1, count, hidden_size)
            hidden[:, here] = self.halves.below(llm.embedding(ids), mask, at[:, here], caches[0])
        mask = torch.ones(1, begin + len(here), dtype=torch.long, device=llm.device)
        return self.halves.above(hidden, mask, at, caches[1], keep=1)[0, -1]

    def whole(self) -> tuple[torch.Tensor, Caches]:
        """Read all of it.

        Returns:
            Logits (vocab_size,) of the first new token, and the KV caches of both halves.
        """
        caches, logits = self.halves.caches(), torch.empty(0)
        for begin in self.begins:
            logits = self.read(begin, caches)
        return logits, caches

    def sampled(self, timed: int, clock: Callable[[], float] = time.perf_counter) -> tuple[float, torch.Tensor, Caches]:
        """Read some chunks at even distances, the first and the last two among them.

        Args:
            timed: How many full chunks; the last one of all comes on top, since it may be shorter.
            clock: Seconds.

        Returns:
            Seconds that all chunks take, by straight lines between those that were read; logits (vocab_size,) of the
            first new token, and KV caches as long as those of the whole prompt.
        """
        begins = self.begins
        full, last = begins[:-1], begins[-1]
        chosen = sorted({round(part * (len(full) - 1) / max(1, timed - 1)) for part in range(timed)}) if full else []
        took: list[float] = []
        logits, caches = torch.empty(0), self.halves.caches()
        for begin in [*(full[place] for place in chosen), last]:
            del caches  # makes room for the next
            caches = self._filled(begin)
            begun = clock()
            logits = self.read(begin, caches)
            int(logits.argmax())  # waits for a GPU
            took.append(clock() - begun)
        between = np.interp(range(len(full)), chosen, took[:-1]) if full else np.zeros(1)
        return float(between.sum()) + took[-1], logits, caches

    def _filled(self, n: int) -> Caches:
        """Caches as the first `n` slots would leave them, with random values."""
        caches, halves = self.halves.caches(), self.halves
        own = int(self.is_token[:n].sum())
        for cache, tree, length in ((caches[0], halves.lower, own), (caches[1], decoder_of(halves.upper), n)):
            config = tree.config
            heads, width = config.num_key_value_heads, config.head_dim
            block = torch.empty(1, heads, _BLOCK, width, device=halves.llm.device, dtype=halves.llm.dtype)
            for layer in range(len(tree.layers) if length else 0):
                # (1, heads of keys and values, length, width of a head), twice
                keys, values = (
                    torch.randn_like(block).repeat(1, 1, -(-length // _BLOCK), 1)[:, :, :length] for _ in range(2)
                )
                cache.update(keys, values, layer)
        return caches


@torch.inference_mode()
def decode(halves: Halves, token: torch.Tensor, at: int, caches: Caches, steps: int) -> Sequence[float]:
    """Seconds of each further token, the first at position `at`."""
    llm, took = halves.llm, []
    for step in range(steps):
        begun = time.perf_counter()
        where = torch.tensor([[at + step]], device=llm.device)
        seen = [cache.get_seq_length() + 1 for cache in caches]
        masks = [torch.ones(1, n, dtype=torch.long, device=llm.device) for n in seen]
        hidden = halves.below(llm.embedding(token[None, None]), masks[0], where, caches[0])
        token = halves.above(hidden, masks[1], where, caches[1], keep=1)[0, -1].argmax()
        int(token)  # waits for a GPU
        took.append(time.perf_counter() - begun)
    return took
