"""What a text is cut into, and the words its cutting is told in."""

from __future__ import annotations

from dataclasses import dataclass

# How a segment ends.
PARAGRAPH, SENTENCE, INNER = 0, 1, 2


@dataclass(frozen=True)
class Segment:
    """One unit of compression: tokens `start` to `end` of its text.

    Attributes:
        start: Index of the first token.
        end: Index after the last token.
        level: How the segment ends: 0 paragraph end, 1 sentence end, 2 within a sentence. Where a text goes on for
            very long without a mark, some cuts act as sentence ends.
    """

    start: int
    end: int
    level: int
