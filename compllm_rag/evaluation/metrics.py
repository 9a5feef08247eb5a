"""Answer metrics of SQuAD (Rajpurkar et al. 2016): normalised exact match, token F1 and containment, in percent.

As everywhere in this project the first line of an answer counts, and the best over the gold answers
(docs/design.md section 7).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """100 when the answer's first line is one of the gold answers, else 0."""
    return _best(answer, golds, lambda a, g: float(a == g))


def f1(answer: str, golds: Sequence[str]) -> float:
    """Overlap of the words of the answer's first line with those of the closest gold answer, 0 to 100."""
    return _best(answer, golds, _token_f1)


def subspan_match(answer: str, golds: Sequence[str]) -> float:
    """100 when the answer's first line contains one of the gold answers, both normalised, else 0.

    A gold answer of which normalising leaves nothing must be met exactly: every answer contains the empty text.
    """
    return _best(answer, golds, lambda a, g: float(g in a if g else a == g))


def same_answer(answer: str, other: str) -> bool:
    """Whether the first lines of two answers are the same once normalised."""
    return exact_match(answer, [first_line(other)]) > 0


def first_line(answer: str) -> str:
    """What of an answer counts."""
    return next(iter(answer.strip().splitlines()), "")


def _best(answer: str, golds: Sequence[str], score: Callable[[str, str], float]) -> float:
    line = normalize(first_line(answer))
    return 100 * max((score(line, normalize(gold)) for gold in golds), default=0.0)


def _token_f1(answer: str, gold: str) -> float:
    mine, theirs = answer.split(), gold.split()
    if not mine or not theirs:
        return float(mine == theirs)
    same = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * same / (len(mine) + len(theirs))
