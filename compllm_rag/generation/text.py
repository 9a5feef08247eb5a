"""Token ids to text, piece by piece: whole characters only, nothing past a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Turns a growing list of token ids into pieces of text.

    A piece is held back while it ends within a character of several bytes, or with what may become a stop text.

    Args:
        tokenizer: The target LLM's, a fast one.
        stop: Texts that end the answer; they and what follows are never given out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stop = [text for text in stop if text]
        self.text, self.stopped = "", False
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._given = 0

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain, often empty."""
        self._ids.append(token)
        try:
            piece = self._stream.step(self._tokenizer, token) or ""
        except Exception:  # noqa: BLE001 - tokenizers raises no other
            # A run of byte tokens (`<0x61>`) that turns out to be no UTF-8 reads otherwise than the part of it that was
            # given out. That stays; the stream, which would fail for ever, starts anew at this token.
            piece, self._stream = self._rest(), DecodeStream(skip_special_tokens=True)
            self._stream.step(self._tokenizer, token)
        return self._extend(piece, last=False)

    def finish(self) -> str:
        """The text still held back."""
        return self._extend(self._rest(), last=True)

    def _rest(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True)[len(self.text) :])

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
