"""Sentences as runs of tokens, and which of them share a segment; the same in every version of the segmenter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np
import xxhash

from compllm_rag.compression.segments import PARAGRAPH, SENTENCE, Segment

# A "sentence" longer than this many segments is a table, a list or code: its lines are its sentences.
ENDLESS = 8

_LINE = re.compile(r"\n\s*")


def character_ends(offsets: list[tuple[int, int]]) -> np.ndarray:
    """How many characters have been read after each token, (n_tokens,); `offsets` are its first and last of each."""
    return np.maximum.accumulate(np.asarray([end for _, end in offsets], dtype=np.int64))


def sentences_of(text: str, ends: np.ndarray, breaks: Iterable[tuple[int, int]], size: int) -> list[Segment]:
    """Sentences as token ranges; the last one ends the text, as a paragraph does.

    Args:
        text: The text.
        ends: See `character_ends`; at least one token.
        breaks: First character and level of each sentence but the first.
        size: S, the most tokens of a segment.
    """
    n_tokens = len(ends)
    sentences: list[Segment] = []
    start = 0
    for after, level in breaks:
        # The first token that reaches past the next sentence's first character opens it (" The" carries its blank).
        at = int(np.searchsorted(ends, after, side="right"))
        if start < at < n_tokens:
            sentences.append(Segment(start, at, level))
            start = at
    sentences.append(Segment(start, n_tokens, PARAGRAPH))
    return [part for sentence in sentences for part in _by_lines(text, ends, sentence, size)]


def _by_lines(text: str, ends: np.ndarray, sentence: Segment, size: int) -> list[Segment]:
    if sentence.end - sentence.start <= ENDLESS * size:
        return [sentence]
    first = int(ends[sentence.start - 1]) if sentence.start else 0
    out: list[Segment] = []
    start = sentence.start
    for match in _LINE.finditer(text, first, int(ends[sentence.end - 1])):
        at = int(np.searchsorted(ends, match.end(), side="right"))
        if start < at < sentence.end:
            out.append(Segment(start, at, SENTENCE))
            start = at
    out.append(Segment(start, sentence.end, sentence.level))
    return out


def join_short(
    text: str, ends: np.ndarray, sentences: list[Segment], size: int, split: Callable[[Segment], list[Segment]]
) -> list[Segment]:
    """Segments of sentences: two short neighbours may share one, and `split` cuts those that stand alone."""
    gives = [_gives(text, ends, sentence, size) for sentence in sentences]
    out: list[Segment] = []
    i = 0
    while i < len(sentences):
        sentence = sentences[i]
        if not gives[i] and i + 1 < len(sentences) and gives[i + 1] and _fit(sentence, sentences[i + 1], size):
            out.append(Segment(sentence.start, sentences[i + 1].end, sentences[i + 1].level))
            i += 2
            continue
        out.extend(split(sentence))
        i += 1
    return out


def _fit(left: Segment, right: Segment, size: int) -> bool:
    """Whether two neighbouring sentences may share a segment: of one paragraph, and at most S tokens together."""
    return left.level != PARAGRAPH and right.end - left.start <= size


def _gives(text: str, ends: np.ndarray, sentence: Segment, size: int) -> bool:
    """Whether a sentence is a giver, which joins the taker in front of it; decided by the sentence alone.

    Filling segments greedily from the left would let one edit shift every later segment of the paragraph. Here no
    sentence is wanted from both sides, and no decision reaches further than a pair. White space does not count:
    a sentence has another blank in front of it, or behind it, once it is no longer the first or last of its text.
    """
    if sentence.end - sentence.start > size // 2:
        return False
    content = text[int(ends[sentence.start - 1]) if sentence.start else 0 : int(ends[sentence.end - 1])].strip()
    return bool(xxhash.xxh3_64_intdigest(content.encode("utf-8", "surrogatepass")) & 1)
