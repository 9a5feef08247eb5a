"""What goes in and out of a terminal: questions from standard input, and output that every encoding can print."""

from __future__ import annotations

import io
import sys

from compllm_rag.errors import ConfigurationError

STDIN = "-"


def print_anything() -> None:
    """Let standard output and error print any text: what an encoding lacks is written as an escape, never an error.

    An answer that took seconds to make must not be lost because a terminal knows ASCII or Latin-1 only.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def can_print(text: str) -> bool:
    """Whether standard output has all characters of a text."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def question_of(words: str) -> str:
    """The question of a command line: itself, or what standard input holds where it is `-`.

    Raises:
        ConfigurationError: Standard input is not UTF-8, or holds nothing.
    """
    if words != STDIN:
        return words
    data = sys.stdin.buffer.read()
    try:
        question = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            "question on standard input cannot be read",
            got=f"byte {data[error.start]:#04x} at position {error.start}",
            expected="words in UTF-8",
            next_step="convert it, for example with iconv",
        ) from error
    if not question:
        raise ConfigurationError(
            "standard input holds no question", got="nothing", expected="words in UTF-8", next_step="type it again"
        )
    return question
