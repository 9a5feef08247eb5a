"""Version 1 of how a text is cut, for storages and compressors that were made by it; never to be changed.

It knows the marks of Latin, Greek, Cyrillic and of Chinese and Japanese, takes every full stop for an end, and splits
long sentences evenly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import pairwise

from compllm_rag.compression.segments import INNER, PARAGRAPH, SENTENCE, Segment
from compllm_rag.compression.sentences import character_ends, join_short, sentences_of

# A sentence ends at closing punctuation followed by white space (CJK punctuation needs none), a paragraph at a blank
# line. The match ends where the next sentence starts.
_BREAK = re.compile(r"\n[^\S\n]*\n\s*|[.!?…][\"'”’)\]]*\s+|[。！？]+[」』”’）]*\s*")


def cut_v1(text: str, offsets: list[tuple[int, int]], size: int) -> list[Segment]:
    """Cut a tokenised text.

    Args:
        text: The text.
        offsets: First character of each token, and the character after its last; at least one.
        size: S, the most tokens of a segment.

    Returns:
        Segments that join to the tokens, none longer than S.
    """
    ends = character_ends(offsets)
    sentences = sentences_of(text, ends, _breaks(text), size)
    return join_short(text, ends, sentences, size, lambda sentence: _split_evenly(sentence, size))


def _breaks(text: str) -> Iterator[tuple[int, int]]:
    for match in _BREAK.finditer(text):
        if match.end() >= len(text):
            return
        gap = match.group()
        yield match.end(), PARAGRAPH if "\n" in gap.rstrip(" \t") and gap.count("\n") > 1 else SENTENCE


def _split_evenly(sentence: Segment, size: int) -> list[Segment]:
    """Split a long sentence into equal parts; hard cuts at S would leave tails of 1-4 tokens that cost rate."""
    n = sentence.end - sentence.start
    parts = math.ceil(n / size)
    cuts = [sentence.start + round(n * i / parts) for i in range(parts + 1)]
    return [Segment(a, b, sentence.level if i == parts - 1 else INNER) for i, (a, b) in enumerate(pairwise(cuts))]
