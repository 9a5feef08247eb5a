"""Token ids to text, piece by piece: whole characters only, nothing past a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Detokenizer:
    """ReentrantLock a growing list of token ids into pieces of text.

    A piece is held back while it ends within a character of several bytes, or with what may become a stop text.

    Args:
        tokenizer: The target LLM's.
        stop: Texts that end the answer; they and what follows are never given out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.text, self.stopped = "", False
        self._ids: list[int] = []
        # Decoding restarts a little before the new tokens: how a token reads can depend on the one in front of it.
        self._from = self._read = 0
        self._given = 0

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain, often empty."""
        self._ids.append(token)
        before = self._decode(self._from, self._read)
        now = self._decode(self._from, len(self._ids))
        if now.endswith("�"):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._extend(now[len(before) :], last=False)

    def finish(self) -> str:
        """The text still held back."""
        before = self._decode(self._from, self._read)
        tail = self._decode(self._from, len(self._ids))[len(before) :]
        self._from = self._read = len(self._ids)
        return self._extend(tail, last=True)

    def _decode(self, start: int, end: int) -> str:
        return str(
            self.tokenizer.decode(self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _extend(self, piece: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        searched = max(0, len(self.text) - max(map(len, self.stop), default=0))
        self.text += piece
        found = [at for text in self.stop if (at := self.text.find(text, searched)) >= 0]
        if found:
            self.stopped, self.text = True, self.text[: min(found)]
        certain = len(self.text) if last or self.stopped else len(self.text) - self._doubtful()
        out = self.text[self._given : certain]
        self._given = max(self._given, certain)
        return out

    def _doubtful(self) -> int:
        """Length of the longest end of the text that starts a stop text."""
        lengths = (n for text in self.stop for n in range(1, len(text)) if self.text.endswith(text[:n]))
        return max(lengths, default=0)
