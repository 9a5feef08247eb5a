"""Deep concepts for a vLLM that runs `deep_llama`: a prompt as rows that hold an embedding and, of concepts, a state.

Every position of vLLM runs every layer, and a request states no positions. So below the entry layer each concept is
the token it stands for, which the prompt's other tokens see, and positions have no gaps. This is another way to read
deep concepts than that of the local generator, with other answers: `compllm-rag bench placeholders` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from compllm_rag.errors import ConfigurationError, InvalidConceptsError
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import ConceptSpan, PromptPlan


@dataclass(frozen=True)
class RowLayout:
    """How wide a row is, as a checkpoint's config says it.

    Attributes:
        hidden_size: Of the LLM.
        row_width: Of a row: an embedding, a state, whether there is one, and zeros up to a width that the attention
            heads divide, which is what transformers wants of a hidden size.
        entry_layer: The layer in front of which states stand.
    """

    hidden_size: int
    row_width: int
    entry_layer: int

    @classmethod
    def of(cls, config: Any, entry_layer: int) -> RowLayout:
        """The layout for an LLM, by its config of transformers."""
        return cls(config.hidden_size, 2 * config.hidden_size + config.num_attention_heads, entry_layer)

    @classmethod
    def served(cls, config: Any) -> RowLayout | None:
        """The layout of a checkpoint that `write_deep_checkpoint` wrote, None of any other."""
        if getattr(config, "compllm_entry_layer", None) is None:
            return None
        return cls(config.compllm_hidden_size, config.hidden_size, config.compllm_entry_layer)

    def fields(self) -> dict[str, int]:
        """What the config of such a checkpoint says."""
        return {
            "hidden_size": self.row_width,
            "compllm_hidden_size": self.hidden_size,
            "compllm_entry_layer": self.entry_layer,
        }


def deep_rows(plan: PromptPlan, llm: TargetLLM, layout: RowLayout) -> torch.Tensor:
    """A prompt as rows (positions, row_width) on the CPU, in the LLM's dtype.

    Raises:
        ConfigurationError: It is not known of a deep concept which token it stands for, or the prompt is narrowed.
        InvalidConceptsError: Concepts are of another width.
    """
    if plan.narrowing is not None and plan.deep:
        raise ConfigurationError(
            "vLLM cannot narrow a prompt",
            got=f"narrowing {plan.narrowing}",
            expected="a prompt all of whose concepts are read by all layers from the entry layer on",
            next_step="leave narrowing out, or use the generator of this process",
        )
    rows = torch.zeros(plan.positions, layout.row_width, dtype=llm.dtype)
    width, at = layout.hidden_size, 0
    for span in plan.spans:
        mine = rows[at : at + len(span)]
        at += len(span)
        if isinstance(span, ConceptSpan):
            _check(span, width)
            if not span.deep:
                mine[:, :width] = span.concepts.to(mine)
                continue
            mine[:, width : 2 * width] = span.concepts.to(mine)
            mine[:, 2 * width] = 1.0
        mine[:, :width] = llm.embed(list(span.ids)).to(mine)
    return rows


def _check(span: ConceptSpan, width: int) -> None:
    if span.concepts.ndim != 2 or span.concepts.shape[1] != width:
        raise InvalidConceptsError(
            "concepts do not fit the LLM",
            got=f"shape {tuple(span.concepts.shape)}",
            expected=f"(n_concepts, {width})",
            next_step="use the LLM the storage was made for",
        )
    if span.deep and len(span.ids) != len(span):
        raise ConfigurationError(
            "vLLM reads deep concepts with the tokens they stand for",
            got=f"{len(span)} concepts and {len(span.ids)} token ids",
            expected="one each",
            next_step="give the span its `ids`, or use the generator of this process",
        )
