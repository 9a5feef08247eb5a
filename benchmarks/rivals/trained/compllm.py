"""CompLLM as published (arXiv 2509.19228, section 3), and what differs from it in one thing.

The whole LLM with LoRA reads a segment of at most 20 tokens and, behind it, an end-of-sequence token for each of its
concepts; the last hidden states there pass through one linear layer. The loss is the paper's: smooth-L1 between the
frozen LLM's hidden states with text and with concepts in front, at the answer tokens, each layer in units of its
standard deviation. Unlike the paper: gold answers in place of the LLM's own; the head is trained over standardised
states (`compllm_rag.training.standardised`) and starts with outputs as large as embeddings, which is in its favour; it
learns for minutes. What the layer starts as the paper does not tell. It must not be zero: an LLM's first norm brings
the smallest vector to full size, so that a step away from zero is no small one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.rivals.trained.row import SEGMENT, UNIT, Row, Setup, joined
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.spec import embedding_rms, state_rms
from compllm_rag.config import CompressorConfig
from compllm_rag.models.halves import Halves
from compllm_rag.training.compressor_task import Drawn, concepts_of, trainable
from compllm_rag.training.examples import Example
from compllm_rag.training.job_options import LINEARS
from compllm_rag.training.standardised import standardise

_SEEN = 400  # segments that the head's inputs are standardised by


class _Segments(Row):
    """Concepts of segments by a compressor of concepts at the input embeddings."""

    cut = "segments"

    def __init__(self, setup: Setup, rate: float, scale: float, *, identity: bool = False, **settings: Any) -> None:
        super().__init__(setup, rate)
        lora: dict[str, Any] = {"lora_rank": setup.rank, "lora_alpha": 2 * setup.rank, "lora_modules": LINEARS}
        config = CompressorConfig(segment_length=SEGMENT, unit_length=UNIT, scale=scale, **lora, **settings)
        self.compressor = Compressor(setup.llm, config, information=setup.information)
        if identity:
            nn.init.eye_(self.compressor.head.weight)
        standardise(self.compressor, *self._some_segments())
        trainable(self.compressor)
        self.module = nn.ModuleDict({"write": self.compressor.decoder, "head": self.compressor.head})

    def _some_segments(self) -> tuple[list[tuple[int, ...]], list[int]]:
        """A few hundred segments with their K, the same whenever the row is made."""
        rng, segments, counts = random.Random(0), list[tuple[int, ...]](), list[int]()
        while len(segments) < _SEEN:
            for body in self.material.draw(rng).bodies:
                segments += body.segments
                counts += self.counts(body)
        return segments[:_SEEN], counts[:_SEEN]

    def concepts(self, examples: Sequence[Example]) -> list[list[Any]]:
        """See `Row.concepts`."""
        drawn = [Drawn(example, [self.counts(body) for body in example.bodies]) for example in examples]
        return list(concepts_of(self.compressor, drawn))


class CompLLM(_Segments):
    """CompLLM as published; see the module."""

    objective = "hidden"

    def __init__(self, setup: Setup, rate: float) -> None:
        super().__init__(setup, rate, embedding_rms(setup.llm), queries="eos")
        nn.init.normal_(self.compressor.head.weight, std=setup.llm.hidden_size**-0.5)  # over standardised states


class CompLLMDeep(_Segments):
    """The same segments, queries, head and loss with the layers below L alone; concepts enter at layer L.

    They stand at the middles of the runs of tokens that they stand for. The linear layer starts as the identity: what
    it reads and what it writes are states in front of the same layer.
    """

    objective = "hidden"

    def __init__(self, setup: Setup, rate: float) -> None:
        here = CompressorConfig(entry_layer=setup.entry_layer, opening=setup.opening)
        scale, layer = state_rms(setup.llm, here), setup.entry_layer
        super().__init__(setup, rate, scale, identity=True, queries="eos", layers=layer)
        self.halves = Halves(setup.llm, setup.entry_layer)

    def concepts(self, examples: Sequence[Example]) -> list[list[Any]]:
        """See `Row.concepts`."""
        out = []
        for example, made in zip(examples, super().concepts(examples), strict=True):
            spans = []
            for number, (body, states) in enumerate(zip(example.bodies, made, strict=True)):
                counts = self.counts(body)
                spans.append(joined(body, counts, torch.split(states, counts), number))
            out.append(spans)
        return out


class MeanInput(_Segments):
    """Means of the embeddings of neighbouring tokens, with a learned correction, read as input embeddings.

    The compressor's own way to start from means: the LLM with LoRA reads them behind the segment, and what stands
    there passes through the head. It learns from answers, as ours does.
    """

    def __init__(self, setup: Setup, rate: float) -> None:
        super().__init__(setup, rate, embedding_rms(setup.llm), queries="mean")
