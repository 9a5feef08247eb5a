"""From plans to what an LLM takes: one left-padded batch of input embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from compllm_rag.errors import InvalidConceptsError
from compllm_rag.prompt.plan import PromptPlan, Span, TextSpan

if TYPE_CHECKING:
    from compllm_rag.models.llm import TargetLLM


@dataclass(frozen=True)
class PromptInputs:
    """Plans laid out as one left-padded batch.

    Attributes:
        inputs_embeds: (batch, seq_len, hidden_size).
        attention_mask: (batch, seq_len), or None where nothing is padded.
        position_ids: (batch, seq_len), or None where nothing is padded.
        spans: For each prompt, (passage, first position, position after the last) of every passage body;
            see `PromptPlan.passages`.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    spans: list[list[tuple[int, int, int]]]


def lay_out(plans: Sequence[PromptPlan], llm: TargetLLM) -> PromptInputs:
    """Lay out plans as one left-padded batch of input embeddings.

    Args:
        plans: At least one plan.
        llm: Whose embedding module turns token ids into (post-scale) embeddings.

    Returns:
        Embeddings, mask, positions and the span of every passage.

    Raises:
        InvalidConceptsError: Concepts of another width.
    """
    rows = [embed_spans(plan.spans, llm.embedding, llm.device) for plan in plans]  # (seq_len, hidden_size) each
    spans = [plan.passages for plan in plans]
    longest = max(row.shape[0] for row in rows)
    if all(row.shape[0] == longest for row in rows):
        # (batch, longest, hidden_size); one row is not copied.
        return PromptInputs(torch.stack(rows) if len(rows) > 1 else rows[0][None], None, None, spans)
    pads = [longest - row.shape[0] for row in rows]
    # (batch, longest, hidden_size): each row gets its zeros in front.
    embeds = torch.stack([F.pad(row, (0, 0, pad, 0)) for row, pad in zip(rows, pads, strict=True)])
    slots = torch.arange(longest, device=embeds.device)  # (longest,)
    mask = (slots >= torch.tensor(pads, device=embeds.device)[:, None]).long()  # (batch, longest)
    moved = [[(p, a + pad, b + pad) for p, a, b in row] for row, pad in zip(spans, pads, strict=True)]
    positions = (mask.cumsum(1) - 1).clamp_min(0)  # (batch, longest)
    return PromptInputs(embeds, mask, positions, moved)


def embed_spans(
    spans: Sequence[Span], embed: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> torch.Tensor:
    """What the LLM reads in place of spans; gradients flow into concepts, not into embeddings of tokens.

    Args:
        spans: At least one, in reading order.
        embed: An input-embedding module: token ids (1, n) to embeddings (1, n, hidden_size).
        device: Where that module lies.

    Returns:
        Tensor (seq_len, hidden_size) in the module's dtype.

    Raises:
        InvalidConceptsError: Concepts of another width.
    """
    texts = [span.ids for span in spans if isinstance(span, TextSpan)]
    ids = torch.tensor([token for text in texts for token in text], dtype=torch.long, device=device)  # (n_tokens,)
    with torch.no_grad():
        embedded = embed(ids[None])[0]  # (n_tokens, hidden_size): all tokens in one call
    tokens = iter(torch.split(embedded, [len(text) for text in texts]))  # (len(span), hidden_size) for each text span
    rows: list[torch.Tensor] = []
    for span in spans:
        if isinstance(span, TextSpan):
            rows.append(next(tokens))
        elif span.deep:
            raise InvalidConceptsError(
                "deep concepts do not stand among input embeddings",
                got=f"{len(span)} deep concepts",
                expected="concepts of entry layer 0",
                next_step="read the plan by a generator with the compressor's halves",
            )
        elif span.concepts.shape[1] != embedded.shape[1]:
            raise InvalidConceptsError(
                "concepts do not fit the LLM",
                got=f"width {span.concepts.shape[1]}",
                expected=f"width {embedded.shape[1]}",
                next_step="use the LLM the storage was made for",
            )
        else:
            rows.append(span.concepts.to(embedded))  # (n_concepts, hidden_size)
    return torch.cat(rows)
