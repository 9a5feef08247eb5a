"""Learned slots behind the text, after the in-context autoencoder (ICAE, arXiv 2307.06945).

The LLM with LoRA reads a chunk and, behind it, embeddings that are learned, one for each slot; the last hidden states
there are what the frozen LLM reads in place of the chunk. Unlike the paper: the number of slots follows the chunk's
length at a rate, where theirs is 128; chunks of at most 240 tokens are compressed each on its own; no pretraining by
autoencoding and language modelling, the answers alone; and the slots' output is brought to the size of
embeddings by one learned number, which is in its favour.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.rivals.trained.row import Row, Setup, most
from compllm_rag.compression.spec import embedding_rms
from compllm_rag.models.halves import lower_half
from compllm_rag.training.examples import Example


class Slots(nn.Module):
    """What is learned besides LoRA: an embedding for each slot, and the size of what comes out."""

    def __init__(self, n: int, hidden_size: int, scale: float) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(scale * torch.randn(n, hidden_size))
        self.scale = nn.Parameter(torch.tensor(scale))


class ICAE(Row):
    """Slots that the LLM fills; see the module."""

    def __init__(self, setup: Setup, rate: float) -> None:
        super().__init__(setup, rate)
        self.encoder = setup.lora(lower_half(setup.llm.model, None))
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        self.slots = Slots(most(rate), setup.llm.hidden_size, embedding_rms(setup.llm)).to(setup.llm.device)
        self.module = nn.ModuleDict({"write": self.encoder, "slots": self.slots})

    def concepts(self, examples: Sequence[Example]) -> list[list[torch.Tensor]]:
        """See `Row.concepts`."""
        bodies = [body for example in examples for body in example.bodies]
        counts = [k for body in bodies for k in self.counts(body)]
        filled = iter(self._filled([unit for body in bodies for unit in body.segments], counts))
        return [[torch.cat([next(filled) for _ in body.segments]) for body in e.bodies] for e in examples]

    def _filled(self, units: Sequence[Sequence[int]], counts: Sequence[int]) -> list[torch.Tensor]:
        """What comes out at the slots, (k, hidden_size) of each unit.

        Rows are padded in front of their tokens and behind their slots; positions count as if they were not.
        """
        n, k, device = max(map(len, units)), max(counts), self.llm.device
        ids = torch.tensor([[*[0] * (n - len(unit)), *unit] for unit in units], device=device)  # (batch, n)
        begins = torch.tensor([n - len(unit) for unit in units], device=device)[:, None]  # (batch, 1)
        wanted = torch.tensor(list(counts), device=device)[:, None]  # (batch, 1)
        places, ordinals = torch.arange(n + k, device=device), torch.arange(k, device=device)
        slots = self.slots.embeddings[:k].to(self.llm.dtype).expand(len(units), -1, -1)  # (batch, k, hidden_size)
        hidden = self.encoder(
            inputs_embeds=torch.cat([self.llm.embedding(ids), slots], 1),
            attention_mask=torch.cat([places[:n] >= begins, ordinals < wanted], 1).long(),
            position_ids=(places - begins).clamp_min(0),
            use_cache=False,
        ).last_hidden_state[:, n:]  # (batch, k, hidden_size)
        made = self.slots.scale * F.rms_norm(hidden.float(), (hidden.shape[-1],), eps=1e-6)
        return [row[:count] for row, count in zip(made, counts, strict=True)]
