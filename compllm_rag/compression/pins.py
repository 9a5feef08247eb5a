"""Pins: words whose tokens deep concepts keep before all others, since half a number or a name is none.

Three kinds, by plain rules over a unit's words, a word being the tokens from one that begins one (`word_begins`) to the
next. They look at letters and digits alone and know no language but for the names of months and days, which are
English. A script without capitals has no names by these rules.

* digits: words with a digit in them;
* dates: names of months and of days of the week, with a capital, and words with a digit up to two words away;
* names: words with a capital that stand within a sentence or in front of another such word, and words with a capital
  behind their first letter (acronyms, identifiers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compllm_rag.compression.selection import word_begins
from compllm_rag.config import Pin

_MONTHS = "january february march april may june july august september october november december"
_DAYS = "monday tuesday wednesday thursday friday saturday sunday"
_SHORT = "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri sat sun"
_DATES = frozenset(f"{_MONTHS} {_DAYS} {_SHORT}".split())
_NEAR = 2  # words between a month and what belongs to the same date
_ENDS = frozenset(".!?:;\n")
_SILENT = "\"'`()[]{}<>“”‘’«»*-–—_#,.;:!?"  # around a word, or between the end of a sentence and its next word
# At most this share of what is kept goes by pins: a table of numbers must not lose all of its words.
MOST_PINNED = 0.5


class Pins:
    """Finds the tokens to pin.

    Args:
        tokenizer: Of the target LLM.
        rows: Of its embedding.
        kinds: Which words.
    """

    def __init__(self, tokenizer: Any, rows: int, kinds: Sequence[Pin]) -> None:
        self._tokenizer, self._kinds = tokenizer, frozenset(kinds)
        self._begins = word_begins(tokenizer, rows)  # (rows,)

    def of(self, unit: Sequence[int]) -> torch.Tensor:
        """Which tokens of a unit are to be kept first, boolean (n_tokens,)."""
        words = self._words(unit)
        texts = [self._text(unit[slice(*word)]) for word in words]
        chosen = {at for kind in self._kinds for at in _FOUND[kind](texts)}
        pinned = torch.zeros(len(unit), dtype=torch.bool)
        for at in chosen:
            pinned[slice(*words[at])] = True
        return pinned

    def _words(self, unit: Sequence[int]) -> list[tuple[int, int]]:
        """First token and the one after the last of each word."""
        starts = [i for i, token in enumerate(unit) if i == 0 or bool(self._begins[token])]
        return list(zip(starts, [*starts[1:], len(unit)], strict=True))

    def _text(self, tokens: Sequence[int]) -> str:
        """What a word says, blanks and all; a letter may be several tokens of bytes."""
        pieces = [piece for piece in self._tokenizer.convert_ids_to_tokens(list(tokens)) if piece]
        return str(self._tokenizer.convert_tokens_to_string(pieces))


def _digits(texts: Sequence[str]) -> set[int]:
    return {at for at, text in enumerate(texts) if any(c.isdigit() for c in text)}


def _dates(texts: Sequence[str]) -> set[int]:
    bare = [_bare(text) for text in texts]
    named = {at for at, word in enumerate(bare) if word[:1].isupper() and word.lower() in _DATES}
    spoken = [at for at, word in enumerate(bare) if any(c.isalnum() for c in word)]
    place = {at: i for i, at in enumerate(spoken)}
    near = {at for at in _digits(texts) if any(abs(place[at] - place[name]) <= _NEAR for name in named)}
    return named | near


def _names(texts: Sequence[str]) -> set[int]:
    bare = [_bare(text) for text in texts]
    capital = [word[:1].isupper() for word in bare]
    found, first = set(), True
    for at, (text, word) in enumerate(zip(texts, bare, strict=True)):
        inside = any(c.isupper() for c in word[1:])
        followed = at + 1 < len(texts) and capital[at + 1]
        if inside or (capital[at] and (not first or followed)):
            found.add(at)
        if any(c in _ENDS for c in text):
            first = True
        elif word:
            first = False
    return found


def _bare(text: str) -> str:
    """A word without the blanks and marks around it."""
    return text.strip().strip(_SILENT)


_FOUND = {"digits": _digits, "dates": _dates, "names": _names}


def raised(scores: torch.Tensor, pinned: torch.Tensor, n_concepts: int) -> torch.Tensor:
    """Scores with the best pinned tokens above all others, `MOST_PINNED` of what is kept at most.

    Args:
        scores: (n_tokens,).
        pinned: Boolean (n_tokens,).
        n_concepts: K.

    Returns:
        (n_tokens,); the order among those raised, and among the others, is that of `scores`.
    """
    most = int(MOST_PINNED * n_concepts)
    order = torch.argsort(scores.masked_fill(~pinned, -torch.inf), descending=True, stable=True)
    first = order[: min(most, int(pinned.sum()))]
    made = scores.clone()
    made[first] += scores.max() - scores.min() + 1
    return made
