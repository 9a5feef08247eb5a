"""Which tokens of a chunk deep concepts stand for: how much each is worth keeping.

Unigram information, with half the LLM's surprisal on top where nothing is learned; or a learned vector over the states
of the LLM without LoRA and information (`train selector`); or chance, to compare with. See `CompressorConfig.selector`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from compllm_rag.compression.selection import learned_scores, random_scores
from compllm_rag.config import CompressorConfig
from compllm_rag.models.llm import TargetLLM

# Positions of one forward, and of one that gives logits over the vocabulary: (positions, vocab_size) in float32.
_BATCH_POSITIONS = {"cpu": 4096, "cuda": 65536}
_LOGIT_POSITIONS = {"cpu": 1024, "cuda": 8192}


class TokenWorth:
    """Scores the tokens of units.

    Args:
        llm: The target LLM.
        config: Of the compressor.
        information: Of each token, (vocab_size,) in nats.
        selector: Weights of a learned selector, (hidden_size + 1,).
        plain: The LLM's layers below the entry layer, without any LoRA.
    """

    def __init__(
        self,
        llm: TargetLLM,
        config: CompressorConfig,
        information: torch.Tensor,
        selector: torch.Tensor | None,
        plain: Any,
    ) -> None:
        self._llm, self._config, self._information, self._selector = llm, config, information, selector
        self._plain = plain

    @torch.inference_mode()
    def plain_states(self, units: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """What stands in front of the entry layer without any LoRA: (n_tokens, hidden_size) of each unit."""
        begin = len(self._config.opening)
        size = max(1, most_positions(self._llm.device) // (begin + self._config.unit_length))
        for at in range(0, len(units), size):
            ids, mask = rows_behind(self._config.opening, units[at : at + size], self._llm.device)  # (batch, n) each
            hidden = self._plain(
                inputs_embeds=self._llm.embedding(ids),
                attention_mask=mask,
                position_ids=torch.arange(ids.shape[1], device=ids.device).expand_as(ids),  # (batch, n)
                use_cache=False,
            ).last_hidden_state  # (batch, n, hidden_size)
            yield from (row[begin : begin + len(unit)] for row, unit in zip(hidden, units[at : at + size], strict=True))

    @torch.inference_mode()
    def of(self, units: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """How much each token of each unit is worth keeping, (n_tokens,) float32 on the CPU each."""
        if self._config.selector == "random":
            yield from map(random_scores, units)
            return
        known = [self._information[torch.tensor(list(unit), device=self._llm.device)] for unit in units]
        if self._config.selector == "information":
            yield from (row.cpu() for row in known)
            return
        if self._selector is not None:
            for states, table in zip(self.plain_states(units), known, strict=True):
                yield learned_scores(states, table, self._selector).cpu()
            return
        begin = len(self._config.opening)
        size = max(1, _of(_LOGIT_POSITIONS, self._llm.device) // (begin + self._config.unit_length))
        for at in range(0, len(units), size):
            ids, mask = rows_behind(self._config.opening, units[at : at + size], self._llm.device)  # (batch, n) each
            logits = self._llm.model(
                input_ids=ids, attention_mask=None if bool(mask.all()) else mask, use_cache=False
            ).logits  # (batch, n, vocab_size)
            for row, unit, table in zip(logits, units[at : at + size], known[at : at + size], strict=True):
                # What stands at a place foretells the next: the opening's last token foretells the unit's first.
                said = row[max(begin - 1, 0) : begin - 1 + len(unit)].float().log_softmax(-1)
                wanted = torch.tensor(list(unit), device=row.device)[-len(said) :]
                surprisal = -said.gather(1, wanted[:, None])[:, 0]  # (n_tokens,), one less without an opening
                missing = torch.zeros(len(unit) - len(said), device=row.device)
                yield (table + 0.5 * torch.cat([missing, surprisal])).cpu()


def rows_behind(
    opening: Sequence[int], units: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Opening and unit of each row as ids and mask, (batch, n) each; what pads a row stands behind it."""
    rows = [[*opening, *unit] for unit in units]
    n = max(map(len, rows))
    ids = torch.tensor([row + [0] * (n - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(n, device=device) < lengths[:, None]).long()


def most_positions(device: torch.device) -> int:
    """Positions of one forward of half an LLM on a device, padding counted."""
    return _of(_BATCH_POSITIONS, device)


def _of(limits: Mapping[str, int], device: torch.device) -> int:
    return limits["cpu" if device.type == "cpu" else "cuda"]
