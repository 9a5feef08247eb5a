"""What the tests of chats share: an index over toy models, and what its LLM was given to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_index.core import Document

import toy
from compllm_rag import Compressor, ConceptIndex, GenerationConfig
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.prompt import ConceptSpan, PromptPlan, TextSpan
from toy_embedder import HashEmbedder
from trained import trained_deep

PARAGRAPHS = toy.TEXT.strip().split("\n\n")
SHORT = GenerationConfig(max_new_tokens=8)
TALK = ["Who built the lighthouse?", "When did she die?", "What does the museum keep?"]
RETRIEVING = ("best", "condense_plus_context", "context", "condense_question")


def deep_compressor(architecture: str = "llama", **options: Any) -> DeepCompressor:
    return trained_deep(toy.llm(architecture, layers=4, **options))


def open_index(
    compressor: DeepCompressor | Compressor, path: Path | None = None, generation: GenerationConfig = SHORT
) -> ConceptIndex:
    index = ConceptIndex.create(
        path, compressor=compressor, embedder=HashEmbedder(), chunk_size=60, generation=generation
    )
    index.ingest(Document(id_=f"d{i}", text=text, metadata={"title": f"T{i}"}) for i, text in enumerate(PARAGRAPHS))
    return index


class Readings:
    """The prompts that an index's LLM reads from now on."""

    def __init__(self, index: ConceptIndex, monkeypatch: Any) -> None:
        self.plans: list[PromptPlan] = []
        self._decode = index.generator.tokenizer.decode
        stream, generate = index.generator.stream, index.generator.generate

        def spied_stream(plan: PromptPlan, *args: Any) -> Any:
            self.plans.append(plan)
            return stream(plan, *args)

        def spied_generate(plans: list[PromptPlan], *args: Any) -> Any:
            self.plans.extend(plans)
            return generate(plans, *args)

        monkeypatch.setattr(index.generator, "stream", spied_stream)
        monkeypatch.setattr(index.generator, "generate", spied_generate)

    def text(self, number: int = -1) -> str:
        """A prompt, concepts as the number of their passage."""
        return "".join(
            self._decode(list(span.ids)) if isinstance(span, TextSpan) else f"<{span.passage}>"
            for span in self.plans[number].spans
        )

    def concepts(self, number: int = -1) -> int:
        return sum(len(span) for span in self.plans[number].spans if isinstance(span, ConceptSpan))
