"""Libraries over toy.TEXT and what a read policy is told of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

import toy
from compllm_rag.compression.late_interaction import LateInteraction
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.library import ConceptLibrary
from compllm_rag.reading.budget import ReadBudget
from compllm_rag.reading.choice import ReadPolicy
from compllm_rag.reading.passages import Decision, PassageReading, ReadPassage, Retrieved
from compllm_rag.store.memory import MemoryStore
from trained import trained, trained_deep

PARTS = [part.strip() for part in toy.TEXT.split("\n\n")]
QUESTION = "When did Marsh die?"


@cache
def compressor(codec: str) -> ConceptCompressor:
    """Of either kind, over a toy LLM of four layers."""
    return trained_deep(toy.llm(layers=4)) if codec == "deep" else trained(toy.llm(layers=4))


def library(
    codec: str = "deep", *, rate: float = 1.0, also: tuple[float, ...] = (), fill: bool = True
) -> ConceptLibrary:
    """A library in memory, with the concepts of all parts or empty."""
    made = compressor(codec)
    out = ConceptLibrary(made, MemoryStore(made.spec.width), rate=rate, also_rates=also)
    if fill:
        out.ensure(PARTS)
    return out


def learned_library(**options: Any) -> ConceptLibrary:
    """A library of deep concepts with a relevance that was learned for them: random numbers."""
    made = trained_deep(toy.llm(layers=4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made.interaction = LateInteraction(made.hidden_size, 8).requires_grad_(False)
    made.interaction.compressor = made.fingerprint
    out = ConceptLibrary(made, MemoryStore(made.spec.width), rate=options.get("rate", 1.0))
    if options.get("fill", True):
        out.ensure(PARTS)
    return out


def retrieved() -> list[Retrieved]:
    """The parts, each with five positions of its own around it."""
    return [Retrieved(f"n{i}", text, f"Part {i}", 1 - i / 4, 5) for i, text in enumerate(PARTS)]


def read(
    of: ConceptLibrary, policy: ReadPolicy, limits: dict[str, Any] | None = None, **options: Any
) -> tuple[list[ReadPassage], dict[str, float]]:
    """What a policy decides of the parts, within limits by the fields of `ReadBudget`."""
    made = decided(of, policy, limits, **options)
    return made.passages, made.taken


def decided(of: ConceptLibrary, policy: ReadPolicy, limits: dict[str, Any] | None = None, **options: Any) -> Decision:
    """The same, with what the policy wants told."""
    return PassageReading(of, policy, ReadBudget(**limits or {}), **options).read(QUESTION, retrieved(), 30)
