"""Training examples read as a narrowed prompt is: from layer T on with the share of concepts that the question needs.

As in generation (`generation.narrowed`), the tokens behind the last passage decide which concepts go on. Which ones is
no matter of gradients; what they and the tokens carry to layer T is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from compllm_rag.errors import ConfigurationError
from compllm_rag.models.llm import decoder_of
from compllm_rag.models.narrowing import AttentionCount, Kept, NarrowedHalves, slots_that_go_on
from compllm_rag.prompt import ConceptSpan
from compllm_rag.training.examples import Example, Packed, pack_deep


def narrowed_states(
    parts: NarrowedHalves, examples: Sequence[Example], concepts: Sequence[Sequence[ConceptSpan]]
) -> torch.Tensor:
    """Hidden states (n_predictions, hidden_size) after the final norm, of the LLM that reads narrowed prompts.

    Args:
        parts: The LLM in its parts, with whatever LoRA is trained.
        examples: At least one, each with a single branch: another question needs other concepts.
        concepts: For each example, deep concepts of each of its passages; gradients flow into them.

    Raises:
        ConfigurationError: An example has several branches.
    """
    if any(len(example.branches) != 1 for example in examples):
        raise ConfigurationError(
            "a narrowed prompt asks one question",
            got=f"{max(len(example.branches) for example in examples)} branches",
            expected="1",
            next_step="read examples with one branch each",
        )
    packed = pack_deep(examples, parts.halves, concepts)
    is_concept, asking, real = _places(examples, concepts, packed)  # (batch, seq_len) each
    count = AttentionCount(asking, real)
    with parts.counting(count):
        hidden = parts.through_middle(packed.inputs_embeds, packed.attention_mask, packed.position_ids)
    kept = slots_that_go_on(parts.narrowing, count, is_concept, real)
    top: torch.Tensor = decoder_of(parts.top)(
        inputs_embeds=kept.of(hidden),
        attention_mask=_masks(packed.attention_mask, kept),
        position_ids=kept.of(packed.position_ids),
        use_cache=False,
    ).last_hidden_state  # (batch, most kept, hidden_size)
    # (batch, seq_len): where each slot stands among those kept.
    moved = torch.zeros_like(packed.position_ids).scatter_(
        1, kept.order, torch.arange(kept.order.shape[1], device=top.device).expand_as(kept.order)
    )
    columns = moved[packed.rows, packed.columns]
    return top.flatten(0, 1).index_select(0, packed.rows * top.shape[1] + columns)


def one_question(example: Example, number: int) -> Example:
    """An example with one of its branches."""
    return replace(example, branches=(example.branches[number],))


def _places(
    examples: Sequence[Example], concepts: Sequence[Sequence[ConceptSpan]], packed: Packed
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where concepts, tokens that ask, and anything at all stand: (batch, seq_len) each."""
    rows: list[tuple[list[bool], list[bool]]] = []
    for example, spans in zip(examples, concepts, strict=True):
        is_concept = [isinstance(span, ConceptSpan) for span in example.spans(spans) for _ in range(len(span))]
        behind = len(is_concept) - is_concept[::-1].index(True) if True in is_concept else 0
        [branch] = example.branches
        asked = [i >= behind for i in range(len(is_concept))] + [True] * len(branch.prompt)
        rows.append((is_concept, asked))
    length, device = packed.position_ids.shape[1], packed.position_ids.device

    def padded(flags: list[bool]) -> list[bool]:
        return flags + [False] * (length - len(flags))

    ends = [len(asked) + len(e.branches[0].target) for (_, asked), e in zip(rows, examples, strict=True)]
    return (
        torch.tensor([padded(is_concept) for is_concept, _ in rows], device=device),
        torch.tensor([padded(asked) for _, asked in rows], device=device),
        torch.arange(length, device=device)[None] < torch.tensor(ends, device=device)[:, None],
    )


def _masks(masks: Any, kept: Kept) -> Any:
    """The masks of a batch (batch, 1, n, n), or by layer type, of what was kept; padding sees itself alone."""
    if isinstance(masks, dict):
        return {kind: _masks(mask, kept) for kind, mask in masks.items()}
    n = kept.order.shape[1]
    batch = torch.arange(len(kept.order), device=kept.order.device)[:, None, None]
    seen = masks[batch, 0, kept.order[:, :, None], kept.order[:, None, :]]  # (batch, most kept, most kept)
    itself = torch.eye(n, dtype=torch.bool, device=seen.device)[None]
    hidden = ~kept.real[:, None, :] & ~itself
    if seen.dtype == torch.bool:
        return (seen & ~hidden | itself)[:, None]
    return seen.masked_fill(hidden, torch.finfo(seen.dtype).min).masked_fill(itself, 0.0)[:, None]
