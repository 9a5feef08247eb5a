"""Prompt plans: what stands where in a prompt, and its layout as one sequence of embeddings.

A plan is an ordered list of text spans and concept spans. Text mode and concept mode use the identical plan but for
the passages' bodies, so that a comparison compares nothing else. Only the chat template's own text may become special
tokens; whatever a user, a document or a template author wrote is encoded as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from compllm_rag.errors import ConfigurationError, InvalidConceptsError
from compllm_rag.models.plaintext import encode_plain

if TYPE_CHECKING:
    from compllm_rag.models.llm import TargetLLM


@dataclass(frozen=True)
class TextSpan:
    """Token ids; `passage` is the index of the passage they belong to, None for the template."""

    ids: tuple[int, ...]
    passage: int | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ConceptSpan:
    """Concepts (n_concepts, hidden_size) of one passage."""

    concepts: torch.Tensor
    passage: int

    def __len__(self) -> int:
        return int(self.concepts.shape[0])


Span = TextSpan | ConceptSpan


class Slot:
    """The place in a message where the passages go."""


SLOT = Slot()

# The prompt that the embedded models are trained with (docs/design.md section 6).
SYSTEM = "Answer the question using only the passages. Reply with a short answer."


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; its content is plain text around at most one slot."""

    role: str
    content: tuple[str | Slot, ...]


@dataclass(frozen=True)
class PromptPlan:
    """The ordered spans of one prompt."""

    spans: tuple[Span, ...]

    @property
    def positions(self) -> int:
        """Prompt positions the LLM will prefill."""
        return sum(map(len, self.spans))


@dataclass(frozen=True)
class PromptInputs:
    """Plans laid out as one left-padded batch.

    Attributes:
        inputs_embeds: (batch, seq_len, hidden_size).
        attention_mask: (batch, seq_len), or None where nothing is padded.
        position_ids: (batch, seq_len), or None where nothing is padded.
        spans: For each prompt, (passage, first position, position after the last) of every passage body.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    spans: list[list[tuple[int, int, int]]]


class PromptTemplate:
    """ReentrantLock messages into spans by a tokenizer's chat template.

    Args:
        tokenizer: The target LLM's; one without a chat template gets plain paragraphs.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def spans(self, messages: Sequence[Message], passages: Sequence[Span]) -> list[Span]:
        """Spans of a conversation with the passages in their slot, ending where the answer starts.

        Raises:
            ConfigurationError: There are passages and not exactly one slot, or the chat template refuses the messages.
        """
        pieces = [piece for message in messages for piece in message.content]
        slots = sum(isinstance(piece, Slot) for piece in pieces)
        if slots > 1 or (passages and slots != 1):
            raise ConfigurationError(
                "prompt template has no single place for the passages",
                got=f"{slots} slots",
                expected="{context_str} exactly once",
                next_step="add {context_str} to text_qa_template",
            )
        out: list[Span] = []
        for fragment, index in self._render(messages):
            if fragment:
                out.append(TextSpan(tuple(self._fixed(fragment))))
            if index is None:
                continue
            piece = pieces[index]
            out.extend(passages) if isinstance(piece, Slot) else out.append(TextSpan(tuple(self.plain(piece))))
        return [span for span in out if len(span)]

    def plain(self, text: str) -> list[int]:
        """Token ids of text that must never become special tokens."""
        return list(encode_plain(self.tokenizer, text)["input_ids"])

    def _fixed(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _render(self, messages: Sequence[Message]) -> list[tuple[str, int | None]]:
        """The template's own text, each piece followed by the number of the content piece behind it.

        The template never sees the contents, only numbered marks from the private-use area, so nothing in a content
        can be taken for template text.
        """
        numbered, count = [], 0
        for message in messages:
            marks = "".join(f"\ue000{count + i}\ue001" for i in range(len(message.content)))
            numbered.append({"role": message.role, "content": marks})
            count += len(message.content)
        parts = re.split("\ue000(\\d+)\ue001", self._apply(numbered))
        numbers: list[int | None] = [*(int(part) for part in parts[1::2]), None]
        if sorted(n for n in numbers if n is not None) != list(range(count)):
            raise ConfigurationError(
                "chat template drops or repeats a message",
                got=f"{len(numbers) - 1} of {count} pieces",
                expected="every message once",
                next_step="use roles this model's chat template knows",
            )
        return list(zip(parts[0::2], numbers, strict=True))

    def _apply(self, messages: list[dict[str, str]]) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            bos = self.tokenizer.bos_token if self.tokenizer("", add_special_tokens=True)["input_ids"] else ""
            return (bos or "") + "".join(f"{m['content']}\n\n" for m in messages) + "Answer:"
        from jinja2.exceptions import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError:
            # Some templates know no system turn (Gemma's early ones): the first user turn takes its text.
            try:
                return str(
                    self.tokenizer.apply_chat_template(
                        _without_system(messages), tokenize=False, add_generation_prompt=True
                    )
                )
            except TemplateError as error:
                raise ConfigurationError(
                    "chat template refuses these messages",
                    got=f"{', '.join(m['role'] for m in messages)} ({error})",
                    expected="turns this model's chat template knows",
                    next_step="change the roles of text_qa_template",
                ) from error


def _without_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    joined = {"role": messages[1]["role"], "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
    return [joined, *messages[2:]]


class QAPrompt:
    """The default prompt of the response synthesizer, from passages and a question.

    Args:
        tokenizer: The target LLM's.
        system: The system turn.
    """

    def __init__(self, tokenizer: Any, system: str = SYSTEM) -> None:
        self.template, self.system = PromptTemplate(tokenizer), system
        self._mark = TextSpan((0,), 0)

    def parts(self, request: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids in front of the passages and behind them, up to where the answer starts.

        Args:
            request: The user's text behind the passages, such as `Question: ...`.
        """
        messages = [Message("system", (self.system,)), Message("user", (SLOT, request))]
        spans = self.template.spans(messages, [self._mark])
        at = next(i for i, span in enumerate(spans) if span is self._mark)
        return _joined(spans[:at]), _joined(spans[at + 1 :])

    def marker(self, number: int, title: str) -> tuple[int, ...]:
        """Token ids of the line in front of a passage: `[i] title`."""
        return tuple(self.template.plain(f"[{number}] {title}".rstrip() + "\n"))

    @property
    def gap(self) -> tuple[int, ...]:
        """Token ids behind a passage."""
        return tuple(self.template.plain("\n\n"))

    def plan(self, question: str, passages: Sequence[tuple[str, Span]]) -> PromptPlan:
        """The prompt of one question.

        Args:
            question: What is asked.
            passages: Title and body (text or concepts) of each passage.
        """
        before, after = self.parts(f"Question: {question}")
        spans: list[Span] = [TextSpan(before)]
        for number, (title, body) in enumerate(passages, 1):
            spans += [TextSpan(self.marker(number, title)), body, TextSpan(self.gap)]
        return PromptPlan((*spans, TextSpan(after)))


def _joined(spans: Sequence[Span]) -> tuple[int, ...]:
    return tuple(token for span in spans if isinstance(span, TextSpan) for token in span.ids)


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
    rows, spans = [], []
    for plan in plans:
        row, where = _sequence(plan, llm)
        rows.append(row)
        spans.append(where)
    longest = max(row.shape[0] for row in rows)
    if all(row.shape[0] == longest for row in rows):
        return PromptInputs(torch.stack(rows) if len(rows) > 1 else rows[0][None], None, None, spans)
    pads = [longest - row.shape[0] for row in rows]
    embeds = torch.stack([F.pad(row, (0, 0, pad, 0)) for row, pad in zip(rows, pads, strict=True)])
    slots = torch.arange(longest, device=embeds.device)
    mask = (slots >= torch.tensor(pads, device=embeds.device)[:, None]).long()
    moved = [[(p, a + pad, b + pad) for p, a, b in row] for row, pad in zip(spans, pads, strict=True)]
    return PromptInputs(embeds, mask, (mask.cumsum(1) - 1).clamp_min(0), moved)


def _sequence(plan: PromptPlan, llm: TargetLLM) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """Embeddings (seq_len, hidden_size) of one plan; all its tokens are embedded in one call."""
    ids = [token for span in plan.spans if isinstance(span, TextSpan) for token in span.ids]
    embedded = llm.embed(ids)
    out = torch.empty(plan.positions, llm.hidden_size, dtype=embedded.dtype, device=embedded.device)
    where: list[tuple[int, int, int]] = []
    at = taken = 0
    for span in plan.spans:
        end = at + len(span)
        if isinstance(span, TextSpan):
            out[at:end] = embedded[taken : taken + len(span)]
            taken += len(span)
        elif span.concepts.shape[1] != llm.hidden_size:
            raise InvalidConceptsError(
                "concepts do not fit the LLM",
                got=f"width {span.concepts.shape[1]}",
                expected=f"width {llm.hidden_size}",
                next_step="use the LLM the storage was made for",
            )
        else:
            out[at:end] = span.concepts
        if span.passage is not None:
            where.append((span.passage, at, end))
        at = end
    return out, where
