"""Deep concepts as an engine could read them that runs every position of a prompt through every layer.

Each concept stands for a token that was kept. Such an engine runs that token through the layers below the entry layer
L, a *placeholder*, and in front of L its hidden state gives way to the concept's stored one. What the prompt's own
tokens do with placeholders below L is the engine's matter: they see them, or a mask hides them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig
from compllm_rag.evaluation.bodies import Bodies, Segmented
from compllm_rag.evaluation.scoring import ScoringGenerator
from compllm_rag.generation.forward import Forward
from compllm_rag.generation.halves import SplitForward, split_rows
from compllm_rag.models.halves import Halves
from compllm_rag.prompt import ConceptSpan, PromptPlan, Span, TextSpan

# How the tokens that were kept are read: as concepts with gaps where others were dropped, or without gaps; so, with
# themselves as placeholders below the entry layer, which others see or not; as text.
Way = Literal["gaps", "no gaps", "seen", "masked", "pruned"]


class WayBodies:
    """Passages in one of the ways to read them.

    Args:
        concepts: Makes the concepts, for all ways alike.
        way: Which one.
        tokens: Shared by the settings of a run.
    """

    def __init__(self, concepts: Bodies, way: Way, tokens: Segmented) -> None:
        self._concepts, self._way, self._tokens = concepts, way, tokens
        self.size, self.prepare = concepts.size, concepts.prepare

    def spans(self, text: str, passage: int) -> list[Span]:
        """The span of a passage that was prepared."""
        made = self._concepts.spans(text, passage)
        return [self._span(text, span) if isinstance(span, ConceptSpan) else span for span in made]

    def _span(self, text: str, span: ConceptSpan) -> Span:
        if self._way == "gaps" or span.places is None:
            return span
        places, n = torch.arange(len(span)), len(span)
        if self._way == "no gaps":
            return replace(span, places=places, n_tokens=n)
        tokens = [token for unit in self._tokens(text) for token in unit]
        ids = tuple(tokens[place] for place in span.places.tolist())
        if self._way == "pruned":
            return TextSpan(ids, span.passage)
        return replace(span, places=places, n_tokens=n, ids=ids)


class PlaceholderForward(SplitForward):
    """A batch of prompts whose concepts have placeholders below the entry layer, all at the positions they have above.

    Args:
        halves: The LLM in two halves.
        plans: Their deep concepts say which tokens they stand for (`ids`), and leave no gaps.
        seen: Whether other tokens see placeholders below the entry layer.

    Raises:
        ConfigurationError, InvalidConceptsError: See `SplitForward`.
    """

    def __init__(self, halves: Halves, plans: Sequence[PromptPlan], *, seen: bool) -> None:
        super().__init__(halves, split_rows(plans))
        ids = [[token for span in plan.spans for token in span.ids] for plan in plans]
        # Below as above, (batch, most slots): what is masked there has slots of its own that nothing looks at.
        self._ids, _ = self._padded(ids)
        self._low_positions = self._positions
        self._low_mask = self._mask if seen else self._mask * self._is_token

    @torch.inference_mode()
    def _joined(self, hidden: torch.Tensor, tokens: int, slots: int) -> torch.Tensor:
        """What came through the lower half, (batch, most slots, hidden_size), concepts in place of placeholders."""
        joined = hidden.clone()
        if self._states is not None:
            joined[self._mask.bool() & ~self._is_token] = self._states
        return joined


class PlaceholderGenerator(ScoringGenerator):
    """A generator that reads deep concepts as such an engine would, and all else as ever.

    Args:
        compressor: Of deep concepts.
        config: Limits of an answer.
        halves: Those of the compressor, merged.
        seen: Whether other tokens see placeholders below the entry layer.
    """

    def __init__(self, compressor: ConceptCompressor, config: GenerationConfig, halves: Halves, *, seen: bool) -> None:
        super().__init__(compressor.llm, config, halves=halves)
        self._seen = seen

    def lay_out(self, plans: Sequence[PromptPlan]) -> Forward:
        """See `LocalGenerator.lay_out`."""
        if self.halves is None or not any(plan.deep for plan in plans):
            return super().lay_out(plans)
        with self._room_for(plans):
            return PlaceholderForward(self.halves, plans, seen=self._seen)
