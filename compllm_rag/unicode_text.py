"""Text that can be written down: what is no Unicode is replaced, by one rule for documents, metadata and questions.

Extractors of PDF files, and programs that cut texts between the two halves of a character, leave half surrogates
behind. No file, tokenizer or database takes them. Two halves that follow one another become the
character they are halves of; a half alone becomes U+FFFD, the replacement character. NUL and all others stay.
"""

from __future__ import annotations

REPLACEMENT = "\ufffd"


def is_whole(text: str) -> bool:
    """Whether a text holds no half surrogate."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole(text: str) -> str:
    """The text with half surrogates joined or replaced; the same object where there are none."""
    if is_whole(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
