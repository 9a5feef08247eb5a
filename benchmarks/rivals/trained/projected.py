"""What the retrieval embedder knows, through a trained projection: xRAG, and an encoder-only compressor.

xRAG (arXiv 2405.13792) puts one embedding in the place of a document: its retrieval vector through two
linear layers, all that is trained. Unlike the paper: the embedder is MiniLM, whose vector has 384 numbers; there is one
embedding for each chunk of at most 240 tokens; no paraphrase pretraining, only its second stage,
cross-entropy of answers and KL to the LLM that reads text.

An encoder-only compressor is the seed article's future work: the states of the embedder's last layer through a
projection of the same kind are the concepts, so that one pass of a small encoder gives vector and concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.rivals.trained.row import Cost, Projector, Row, Setup, joined, pooling
from compllm_rag.compression.spec import embedding_rms, state_rms
from compllm_rag.config import CompressorConfig
from compllm_rag.models.halves import Halves
from compllm_rag.training.examples import Body, Example


class XRag(Row):
    """One input embedding a chunk, from its retrieval vector; see the module."""

    def __init__(self, setup: Setup, rate: float) -> None:
        super().__init__(setup, rate)
        width = setup.encoder.width
        self.projector = Projector(width, setup.llm.hidden_size, embedding_rms(setup.llm)).to(setup.llm.device)
        self.module = nn.ModuleDict({"projector": self.projector})

    def counts(self, body: Body) -> list[int]:
        """One each."""
        return [1] * len(body.segments)

    def concepts(self, examples: Sequence[Example]) -> list[list[torch.Tensor]]:
        """See `Row.concepts`."""
        return [[self._made(body) for body in example.bodies] for example in examples]

    def _made(self, body: Body) -> torch.Tensor:
        vectors = torch.stack([self.setup.encoder.vector(unit) for unit in body.segments])  # (n_units, width)
        made: torch.Tensor = self.projector(vectors.to(self.llm.device))
        return made

    def cost(self, achieved_rate: float) -> Cost:
        """Nothing is stored that retrieval does not keep anyway."""
        return Cost(1 / achieved_rate, 1 / achieved_rate, 1 / achieved_rate, 0.0)


class EncoderInput(Row):
    """States of the embedder's word pieces, averaged to K runs and projected, read as input embeddings."""

    def __init__(self, setup: Setup, rate: float) -> None:
        super().__init__(setup, rate)
        self._project(embedding_rms(setup.llm))

    def _project(self, scale: float) -> None:
        width = self.setup.encoder.width
        self.projector = Projector(width, self.llm.hidden_size, scale).to(self.llm.device)
        self.module = nn.ModuleDict({"projector": self.projector})

    def concepts(self, examples: Sequence[Example]) -> list[list[Any]]:
        """See `Row.concepts`."""
        return [[torch.cat(self._made(body)) for body in example.bodies] for example in examples]

    def _made(self, body: Body) -> list[torch.Tensor]:
        """Concepts (K, hidden_size) of each unit of a passage."""
        out = []
        for unit, k in zip(body.segments, self.counts(body), strict=True):
            states = self.setup.encoder.states(unit)  # (n_pieces, width)
            out.append(self.projector((pooling(len(states), k) @ states).to(self.llm.device)))
        return out


class EncoderDeep(EncoderInput):
    """The same, in front of layer L, with LoRA on the layers that read it, as ours has."""

    def __init__(self, setup: Setup, rate: float) -> None:
        Row.__init__(self, setup, rate)
        self._project(state_rms(setup.llm, CompressorConfig(entry_layer=setup.entry_layer, opening=setup.opening)))
        self.halves = Halves(setup.llm, setup.entry_layer)
        setup.lora(self.halves.upper)
        for name, parameter in self.halves.upper.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        self.module = nn.ModuleDict({"projector": self.projector, "read": self.halves.upper})

    def concepts(self, examples: Sequence[Example]) -> list[list[Any]]:
        """See `Row.concepts`."""
        return [
            [joined(body, self.counts(body), self._made(body), number) for number, body in enumerate(example.bodies)]
            for example in examples
        ]
