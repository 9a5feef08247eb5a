"""Messages of a conversation: what a prompt can hold of them, and how many fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock

from compllm_rag.errors import ConfigurationError
from compllm_rag.prompt import Message

# What chat templates know; the others of LlamaIndex are other words for the same.
_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}
# Of files of several megabytes nobody means to chat about all, and a terminal sends half surrogates.
_UNREADABLE = ("\x00",)


def checked_question(message: object) -> str:
    """What a user said, if it can be read.

    Raises:
        ConfigurationError: It is no text, is empty, or holds what is no character.
    """
    if (
        not isinstance(message, str)
        or not message.strip()
        or any("\ud800" <= c <= "\udfff" or c in _UNREADABLE for c in message)
    ):
        raise ConfigurationError(
            "question cannot be read", got=ascii(message)[:80], expected="words as text", next_step="type it again"
        )
    return message


def text_of(message: ChatMessage) -> str:
    """A message's text.

    Raises:
        ConfigurationError: It holds something else as well, such as an image.
    """
    other = [type(block).__name__ for block in message.blocks if not isinstance(block, TextBlock)]
    if other:
        raise ConfigurationError(
            "a conversation is text",
            got=f"a message with {', '.join(other)}",
            expected="text alone",
            next_step="leave it out of the chat history",
        )
    return message.content or ""


def as_messages(history: Sequence[ChatMessage]) -> tuple[list[str], list[list[Message]]]:
    """A conversation as texts of its system messages, and turns: what a user said with what followed.

    System messages come from memories that sum up what was said; they go into the prompt's one system turn, since
    many chat templates know no other.

    Raises:
        ConfigurationError: A message is no text, or has a role that chat templates do not know.
    """
    system: list[str] = []
    turns: list[list[Message]] = []
    for message in history:
        role, text = _ROLES.get(message.role), text_of(message)
        if role is None:
            raise ConfigurationError(
                "a conversation has no such role",
                got=message.role.value,
                expected=", ".join(sorted({*_ROLES.values()})),
                next_step="leave messages of tools out of the chat history",
            )
        if role == "system":
            system.append(text)
        elif role == "user" or not turns:
            turns.append([Message(role, (text,))])
        else:
            turns[-1].append(Message(role, (text,)))
    return [text for text in system if text], turns


def n_turns(history: Sequence[ChatMessage]) -> int:
    """How many turns a conversation has."""
    return len(as_messages(history)[1])


def most_that_fit(n: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `n` that fits, where all smaller ones fit as well; 0 needs not."""
    low = 0
    while low < n:
        middle = (low + n + 1) // 2
        low, n = (middle, n) if fits(middle) else (low, middle - 1)
    return low
