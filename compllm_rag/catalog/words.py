"""Words of a text, for search by words: of any script, also those that write no spaces between them."""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

import regex  # type: ignore[import-untyped, unused-ignore]

_PLAIN = re.compile(r"\w+")  # the standard library is ten times as fast, and knows no combining marks
_WORD = regex.compile(r"[\p{L}\p{N}\p{M}_]+")
# Of these, nobody can tell words without a dictionary; pairs of neighbouring characters find them nearly as well.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_NOT_PLAIN = regex.compile(rf"[{_UNSPACED}\p{{M}}]")
_PART = regex.compile(rf"(?V1)([{_UNSPACED}][{_UNSPACED}\p{{M}}]*)|[[\p{{L}}\p{{N}}\p{{M}}_]--[{_UNSPACED}]]+")
_CHARACTER = regex.compile(r"\X")


def words(text: str) -> list[str]:
    """The words of a text in order, as they are compared: compatibility forms and case made alike.

    A run of a script without spaces gives each of its characters and each pair of neighbours.
    """
    if text.isascii():
        return _PLAIN.findall(text.lower())
    folded = unicodedata.normalize("NFKC", text).casefold()
    if _NOT_PLAIN.search(folded) is None:
        return _PLAIN.findall(folded)
    return [part for word in _WORD.findall(folded) for part in _parts(word)]


def _parts(word: str) -> list[str]:
    found: list[str] = []
    for match in _PART.finditer(word):
        if match[1] is None:
            found.append(match[0])
        else:
            characters = _CHARACTER.findall(match[0])
            found += [*characters, *map("".join, pairwise(characters))]
    return found
