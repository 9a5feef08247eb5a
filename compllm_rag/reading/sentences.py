"""Sentences of a passage as runs of its tokens, and how well they answer to the words of a question (BM25)."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from compllm_rag.catalog.words import words
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.compression.segments import INNER
from compllm_rag.unicode_text import whole

_REMEMBERED = 4096
# Saturation of repeated words and the share of length normalisation, as Lucene has them.
_K1, _B = 1.2, 0.75


@dataclass(frozen=True)
class Sentence:
    """A sentence of a passage, a run of whole segments.

    Attributes:
        start: Its first token within the passage.
        end: The token behind its last.
        text: As it stands there.
    """

    start: int
    end: int
    text: str

    def __len__(self) -> int:
        return self.end - self.start


def sentence_cutter(segmenter: Segmenter) -> Callable[[str], tuple[Sentence, ...]]:
    """Cuts passages into sentences, by the segments that their concepts are made of; remembers the last few thousand.

    Short sentences that share a segment are one here: what CompLLM compressed together is read together.
    """

    @functools.lru_cache(maxsize=_REMEMBERED)
    def cut(text: str) -> tuple[Sentence, ...]:
        tokenized = segmenter.tokenize(whole(text))
        found: list[Sentence] = []
        start = 0
        for number, segment in enumerate(tokenized.segments, 1):
            if segment.level == INNER and number < len(tokenized.segments):
                continue
            first, last = tokenized.offsets[start][0], tokenized.offsets[segment.end - 1][1]
            found.append(Sentence(start, segment.end, tokenized.text[first:last]))
            start = segment.end
        return tuple(found)

    return cut


@dataclass(frozen=True)
class WordMatch:
    """How well a text answers to a question's words.

    Attributes:
        score: BM25; 0 where it has none of them.
        words: Those it has that are in less than half of the texts, the rarest first.
    """

    score: float
    words: tuple[str, ...] = ()


def word_matches(question: str, texts: Sequence[str]) -> list[WordMatch]:
    """BM25 (Robertson and Zaragoza 2009) of a question over a few texts, which are the whole collection.

    A collection of some tens of sentences is made anew for each question; an index over it would never be used again.

    Args:
        question: What is asked.
        texts: Sentences or passages.
    """
    asked = list(dict.fromkeys(words(question)))
    counts = [Counter(words(text)) for text in texts]
    lengths = [sum(count.values()) for count in counts]
    mean = sum(lengths) / max(1, len(lengths)) or 1.0
    having = {word: sum(word in count for count in counts) for word in asked}
    weight = {word: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for word, n in having.items()}
    out = []
    for count, length in zip(counts, lengths, strict=True):
        there = sorted((word for word in asked if word in count), key=lambda word: -weight[word])
        dampened = _K1 * (1 - _B + _B * length / mean)
        score = sum(weight[w] * count[w] * (_K1 + 1) / (count[w] + dampened) for w in there)
        out.append(WordMatch(score, tuple(word for word in there if 2 * having[word] < len(texts))))
    return out


def word_shares(question: str, sentences: Sequence[str]) -> tuple[float, ...]:
    """BM25 of sentences beside a question, as shares of the best one's; all 0 where none has a word of it."""
    scores = [match.score for match in word_matches(question, sentences)]
    most = max(scores, default=0.0) or 1.0
    return tuple(score / most for score in scores)


def sentence_bounds(places: torch.Tensor, sentences: Sequence[Sentence]) -> tuple[tuple[int, int], ...]:
    """Where the states of each sentence lie among those of its passage.

    Args:
        places: The token of the passage that each state stands for, (n_concepts,), increasing.
        sentences: Of the passage.

    Returns:
        Of each sentence the first state that belongs to it, and the one behind its last.
    """
    first = torch.searchsorted(places, torch.tensor([one.start for one in sentences], dtype=places.dtype))
    last = torch.searchsorted(places, torch.tensor([one.end for one in sentences], dtype=places.dtype))
    return tuple(zip(first.tolist(), last.tolist(), strict=True))
