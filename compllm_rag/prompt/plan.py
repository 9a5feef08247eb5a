"""Spans of a prompt, messages, and the plan of what stands in it in which order."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from compllm_rag.config import Narrowing


@dataclass(frozen=True)
class TextSpan:
    """Token ids; `passage` is the index of the passage they belong to, None for the template."""

    ids: tuple[int, ...]
    passage: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def extent(self) -> int:
        """Positions from the first to what follows."""
        return len(self.ids)


@dataclass(frozen=True)
class ConceptSpan:
    """Concepts of one passage, or of a part of it.

    Attributes:
        concepts: (n_concepts, hidden_size).
        passage: Index of the passage.
        places: Of deep concepts: the token that each stands for, (n_concepts,), counted within the span and increasing.
            None for concepts at the input embeddings, which follow one another.
        n_tokens: Of deep concepts: how many tokens of text the span stands for.
        ids: Of deep concepts: the id of the token that each stands for, (n_concepts,); empty where nobody asks for it.
    """

    concepts: torch.Tensor
    passage: int
    places: torch.Tensor | None = None
    n_tokens: int = 0
    ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return int(self.concepts.shape[0])

    @property
    def deep(self) -> bool:
        """Whether they enter above the input embeddings."""
        return self.places is not None

    @property
    def extent(self) -> int:
        """Positions from the first to what follows: deep concepts leave gaps where tokens were not kept."""
        return self.n_tokens if self.deep else len(self)


Span = TextSpan | ConceptSpan
# What a passage's body is made of: spans, or what training has not turned into spans yet.
Part = TypeVar("Part", bound=Sized)


class Slot:
    """The place in a message where the passages go."""


SLOT = Slot()

# The prompt that the embedded models are trained with (docs/design.md section 6).
SYSTEM = "Answer the question using only the passages. Reply with a short answer."
QUESTION = "Question: "


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; its content is plain text around at most one slot."""

    role: str
    content: tuple[str | Slot, ...]


def qa_messages(request: str, system: str = SYSTEM) -> list[Message]:
    """The default prompt: a system turn, then the passages with the user's request behind them."""
    return [Message("system", (system,)), Message("user", (SLOT, request))]


@dataclass(frozen=True)
class PromptPlan:
    """The ordered spans of one prompt.

    Attributes:
        spans: What stands in it.
        narrowing: Of a prompt with deep concepts: from which layer on the LLM reads but a share of them.
    """

    spans: tuple[Span, ...]
    narrowing: Narrowing | None = None

    @property
    def positions(self) -> int:
        """Prompt positions the LLM will prefill."""
        return sum(map(len, self.spans))

    @property
    def extent(self) -> int:
        """The position behind the last; what the LLM's window must hold. More than `positions` where there are gaps."""
        return sum(span.extent for span in self.spans)

    @property
    def deep(self) -> bool:
        """Whether there are deep concepts in it, so that it is read by the LLM's two halves."""
        return any(isinstance(span, ConceptSpan) and span.deep for span in self.spans)

    @property
    def asking(self) -> int:
        """Tokens behind the last passage: the question, and what the template puts around it."""
        n = 0
        for span in reversed(self.spans):
            if span.passage is not None:
                break
            n += len(span)
        return n

    @property
    def passages(self) -> list[tuple[int, int, int]]:
        """(passage, first position, position after the last) of every body; adjacent spans of one passage are one."""
        out: list[tuple[int, int, int]] = []
        at = 0
        for span in self.spans:
            end = at + len(span)
            if out and (out[-1][0], out[-1][2]) == (span.passage, at):
                out[-1] = (out[-1][0], out[-1][1], end)
            elif span.passage is not None:
                out.append((span.passage, at, end))
            at = end
        return out
