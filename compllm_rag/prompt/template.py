"""From passages and messages to spans: the tokenizer's chat template with markers around every passage."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from compllm_rag.errors import ConfigurationError
from compllm_rag.models.plaintext import encode_plain
from compllm_rag.prompt.plan import (
    QUESTION,
    SYSTEM,
    Message,
    Part,
    PromptPlan,
    Slot,
    Span,
    TextSpan,
    qa_messages,
)
from compllm_rag.unicode_text import whole


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
