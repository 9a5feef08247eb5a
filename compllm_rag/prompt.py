"""The one place where prompts are composed: spans of passages and messages, plans, and their layout as embeddings.

A plan is an ordered list of text spans and concept spans. Text mode and concept mode use the identical plan but for
the passages' bodies, so that a comparison compares nothing else; answering, evaluation and training use the same
markers, messages and layout. Only the chat template's own text may become special tokens; whatever a user, a document
or a template author wrote is encoded as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn import functional as F

from compllm_rag.errors import ConfigurationError, InvalidConceptsError
from compllm_rag.models.plaintext import encode_plain
from compllm_rag.unicode_text import whole

if TYPE_CHECKING:
    from compllm_rag.config import Narrowing
    from compllm_rag.models.llm import TargetLLM


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


class PromptTemplate:
    """Turns passages and messages into spans by a tokenizer and its chat template.

    Args:
        tokenizer: The target LLM's; one without a chat template gets plain paragraphs.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def passage(
        self, number: int, title: str, body: Sequence[Part], metadata: Mapping[str, object] | None = None
    ) -> list[TextSpan | Part]:
        """Spans of one passage: the marker `[number] title`, the body, and a blank line.

        Args:
            number: Counted from 1.
            title: May be empty.
            body: In reading order; text and concepts may mix.
            metadata: What else the LLM may see of the passage, a line `key: value` each below the title.
        """
        lines = [f"[{number}] {title}".rstrip(), *(f"{key}: {value}" for key, value in (metadata or {}).items())]
        return [self._text("\n".join(lines) + "\n"), *body, self._text("\n\n")]

    def spans(self, messages: Sequence[Message], passages: Sequence[Span]) -> list[Span]:
        """Spans of a conversation with those of all passages in its slot, ending where the answer starts.

        Raises:
            ConfigurationError: There are passages and not exactly one slot, or the chat template refuses the messages.
        """
        before, *behind = self.around(messages)
        if len(behind) > 1 or (passages and not behind):
            raise ConfigurationError(
                "prompt template has no single place for the passages",
                got=f"{len(behind)} slots",
                expected="{context_str} exactly once",
                next_step="add {context_str} to text_qa_template",
            )
        return [span for group in (before, passages, *behind) for span in group if len(span)]

    def around(self, messages: Sequence[Message]) -> list[list[TextSpan]]:
        """Spans of a conversation, cut at its slots: one list more than there are slots.

        Raises:
            ConfigurationError: The chat template refuses the messages.
        """
        pieces = [piece for message in messages for piece in message.content]
        out: list[list[TextSpan]] = [[]]
        for fragment, index in self._render(messages):
            out[-1].append(TextSpan(tuple(self._fixed(fragment))))
            if index is None:
                continue
            piece = pieces[index]
            if isinstance(piece, Slot):
                out.append([])
            else:
                out[-1].append(self._text(piece))
        return out

    def plain(self, text: str) -> list[int]:
        """Token ids of text that must never become special tokens; half characters are read as U+FFFD."""
        return list(encode_plain(self.tokenizer, whole(text))["input_ids"])

    def _text(self, text: str) -> TextSpan:
        return TextSpan(tuple(self.plain(text)))

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

    @cached_property
    def opening(self) -> TextSpan:
        """What stands in front of the first passage, whatever is asked: the system turn and the user's opening."""
        return _joined(self.template.around(qa_messages("", self.system))[0])

    def prefix(self, passages: Sequence[tuple[str, Sequence[Part]]]) -> list[TextSpan | Part]:
        """The prompt up to the request: the system turn, and every passage by its title and body."""
        out: list[TextSpan | Part] = [self.opening]
        for number, (title, body) in enumerate(passages, 1):
            out += self.template.passage(number, title, body)
        return out

    def suffix(self, request: str) -> TextSpan:
        """The prompt behind the passages: the request, such as `Question: ...`, up to where the answer starts."""
        return _joined(self.template.around(qa_messages(request, self.system))[1])

    def plan(self, question: str, passages: Sequence[tuple[str, Sequence[Span]]]) -> PromptPlan:
        """The prompt of one question.

        Args:
            question: What is asked.
            passages: Title and body (text, concepts, or both in turn) of each passage.
        """
        return PromptPlan((*self.prefix(passages), self.suffix(QUESTION + question)))


def _joined(spans: Sequence[TextSpan]) -> TextSpan:
    return TextSpan(tuple(token for span in spans for token in span.ids))


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
