"""Our deep concepts, trained from nothing, and what differs from them in one thing: means in place of kept states.

Mean pooling is after *Simple Context Compression: Mean-Pooling and Multi-Ratio Training* (arXiv 2510.20797):
an encoder tuned by LoRA reads the text, neighbouring states are averaged, and a decoder tuned by LoRA reads the means.
There the encoder is a whole LLM and its means enter as input embeddings; here both are halves of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.rivals.trained.row import UNIT, Row, Setup, joined, pooling
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import untrained_deep
from compllm_rag.prompt import ConceptSpan
from compllm_rag.training.deep_start import lora_settings
from compllm_rag.training.deep_task import concepts_of, drawn_at
from compllm_rag.training.examples import Example
from compllm_rag.training.job_options import DeepOptions


class Deep(Row):
    """Deep concepts: the states of kept tokens in front of layer L, both halves with LoRA, as `train deep` makes them.

    Args:
        setup: See `Row`.
        rate: See `Row`.
        trained: False leaves the LoRA out: the LLM reads its own states.
        unit_length: Most tokens that are read at once.
    """

    def __init__(self, setup: Setup, rate: float, *, trained: bool = True, unit_length: int = UNIT) -> None:
        super().__init__(setup, rate)
        settings = lora_settings(DeepOptions(lora_rank=setup.rank)) if trained else {}
        self.compressor: DeepCompressor = untrained_deep(
            setup.llm, setup.entry_layer, information=setup.information, unit_length=unit_length, **settings
        )
        self.halves = self.compressor.halves
        self.module = torch.nn.ModuleDict({"write": self.compressor.decoder, "read": self.halves.upper})
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(".lora_" in name)

    def concepts(self, examples: Sequence[Example]) -> list[list[ConceptSpan]]:
        """See `Row.concepts`."""
        return concepts_of(self.compressor, [drawn_at(example, self._policy) for example in examples])


class Untrained(Deep):
    """Deep concepts without any training."""

    def __init__(self, setup: Setup, rate: float) -> None:
        super().__init__(setup, rate, trained=False)


class SegmentDeep(Deep):
    """Deep concepts of 20-token segments, each read on its own, in place of chunks."""

    cut = "segments"


class MeanDeep(Deep):
    """Means of neighbouring states in front of layer L, as many as there would be kept states."""

    def concepts(self, examples: Sequence[Example]) -> list[list[ConceptSpan]]:
        """See `Row.concepts`."""
        bodies = [body for example in examples for body in example.bodies]
        hidden = iter(self.compressor.states_with_grad([unit for body in bodies for unit in body.segments]))
        out = []
        for example in examples:
            spans = []
            for number, body in enumerate(example.bodies):
                counts, means = self.counts(body), []
                for unit, k in zip(body.segments, counts, strict=True):
                    states = next(hidden)[: len(unit)]  # (n_tokens, hidden_size)
                    means.append(pooling(len(unit), k).to(states) @ states)  # (k, hidden_size)
                spans.append(joined(body, counts, means, number))
            out.append(spans)
        return out
