"""Where sentences end, in the scripts that Unicode knows a mark for; version 2 of the segmenter.

Marks are the characters of Unicode's property Sentence_Terminal (PropList.txt of Unicode 17), and the ellipsis. The
table is written out because it is part of a segmenter's identity: a library that follows Unicode would cut the same
text in another way after an update.

A full stop behind an abbreviation, an initial or the number of a list ends nothing. Neither nltk's punkt nor pysbd is
used for that: of 400,000 characters of novels punkt takes 0.11 s and pysbd 1.1 s of CPU, where all of the cutting here
takes 0.03 s and the tokenizer 0.23 s; both know abbreviations of one language at a time; and punkt parts "No. | 5",
"e.g. | in room" and "Fig. | 3", pysbd "ca. | 5 Euro" and "cf. | Fig. 3" (docs/design.md section 4). A full stop that
is wrongly taken for an abbreviation's costs little: the sentence is longer, and long sentences are cut anyway.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

from compllm_rag.compression.segments import PARAGRAPH, SENTENCE

# Code points of Sentence_Terminal, first and last of each range.
_RANGES = """
0021 002E 003F 0589 061D-061F 06D4 0700-0702 07F9 0837 0839 083D-083E 0964-0965 104A-104B 1362 1367-1368 166E
1735-1736 17D4-17D5 1803 1809 1944-1945 1AA8-1AAB 1B4E-1B4F 1B5A-1B5B 1B5E-1B5F 1B7D-1B7F 1C3B-1C3C 1C7E-1C7F 2024
203C-203D 2047-2049 2CF9-2CFB 2E2E 2E3C 2E53-2E54 2E60-2E61 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F
A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE12 FE15-FE16 FE52 FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59
10F86-10F89 11047-11048 110BE-110C1 11141-11143 111C5-111C6 111CD 111DE-111DF 11238-11239 1123B-1123C 112A9
113D4-113D5 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E 11944 11946 11A42-11A43 11A9B-11A9C
11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 16B37-16B38 16B44 16D6E-16D6F 16E98 1BC9F 1DA88
"""


def _characters(ranges: str) -> Iterator[str]:
    for first, _, last in (part.partition("-") for part in ranges.split()):
        yield from map(chr, range(int(first, 16), int(last or first, 16) + 1))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SENTENCE_TERMINAL = frozenset(_characters(_RANGES))

# Marks that stand within names, numbers and abbreviations too, and end a sentence only in front of white space: those
# of ASCII, the ellipsis, and full stops that look alike (Urdu's stands in abbreviations as ours does).
_WEAK = ".!?…\u2024\ufe52\u06d4"
_STRONG = "".join(sorted(SENTENCE_TERMINAL - set(_WEAK)))
_CLOSERS = "”’»›)\\]}」』】〉》）］｝"

# A paragraph ends at a blank line. The match ends where the next sentence starts; a closing quotation mark of ASCII
# opens the next sentence unless white space follows it.
_BREAK = re.compile(
    rf"\n[^\S\n]*\n\s*|\u2029\s*|[{re.escape(_WEAK)}][\"'{_CLOSERS}]*\s+|[{_STRONG}]+[{_CLOSERS}]*(?:[\"']+(?=\s))?\s*"
)
_DOT = "."
_WORD = re.compile(r"[^\W_][\w.]*\Z")
_LONGEST = 15  # characters in front of a full stop that an abbreviation is looked for in
_NEXT = re.compile(r"\w+")

# Always in front of a name, or never at an end.
_TITLES = _words(
    "mr mrs ms mx dr drs prof rev fr st ste messrs mme mmes mlle mgr gen col capt cmdr lt sgt maj adm gov supt mt ft "
    "e.g i.e viz cf vs hr frl dipl sig sra srta dra dña ud uds "
    "ul ул им проф акад гр г др см"
)
# In front of a number.
_NUMBERED = _words(
    "no nos nr nrs num fig figs abb tab eq eqs ch chap vol vols sec sect art arts p pp ed para app ex op cap lib "
    "pt bd jan feb mar apr jun jul aug sep sept oct nov dec núm pág págs tel ext rm стр рис табл"
)
# Within a sentence, or at its end.
_COMMON = _words(
    "etc al inc ltd co corp bros dept univ assn jr sr esq approx ca est min max incl excl resp trans ed eds "
    "bzw usw ggf evtl vgl inkl zzgl str geb gest ave blvd rd sq env hon sen rep pres"
)
_MONTHS = _words("Januar Februar März April Mai Juni Juli August September Oktober November Dezember")
# What follows an abbreviation in a new sentence more often than in the same.
_STARTERS = _words(
    "The This That These Those There Here He She It We You They I His Her Its Our Their My Your A An In On At But And "
    "Then When While If After Before As For From By With Although Though However Since So Not No Yes Some Many Most "
    "All What Why How Who Where Er Sie Es Der Die Das Ein Eine Il Elle Le La Les Un Une El Los Las Он Она Это"
)


def sentence_ends(text: str) -> Iterator[tuple[int, int]]:
    """Where sentences end within a text.

    Args:
        text: Any text.

    Yields:
        The index of the next sentence's first character, and the level of the end (0 paragraph, 1 sentence); the end
        of the text is not among them.
    """
    for match in _BREAK.finditer(text):
        first, after = match.span()
        if after >= len(text):
            return
        gap = match.group()
        if gap.count("\n") > 1 or "\u2029" in gap:
            yield after, PARAGRAPH
        elif not _goes_on(text, first, after, gap):
            yield after, SENTENCE


def _goes_on(text: str, at: int, after: int, gap: str) -> bool:
    """Whether the mark at a place ends no sentence."""
    mark = gap[0]
    if mark == "．" or (mark != _DOT and after == at + 1):
        # A full-width point between digits; other marks need no look at what is around them.
        return mark == "．" and after == at + 1 and text[at - 1 : at].isdigit() and text[after].isdigit()
    if mark != _DOT or not gap[1].isspace():
        return False
    found = _WORD.search(text, max(0, at - _LONGEST), at)
    return found is not None and _abbreviates(found.group(), text, found.start(), after)


def _abbreviates(word: str, text: str, first: int, after: int) -> bool:
    """Whether a full stop belongs to the word in front of it; looks no further than at the word behind it."""
    found = _NEXT.match(text, after)
    next_word = found.group() if found else ""
    if word.isdigit():
        # "1. Unpack the lamp": the number of a list.
        _, line_end, indent = text[max(0, first - _LONGEST) : first].rpartition("\n")
        if len(word) <= 3 and not indent.strip() and (line_end or first < _LONGEST):
            return True
        # "3. Mai", "19. století": an ordinal.
        return len(word) <= 2 and (text[after].islower() or next_word in _MONTHS)
    folded, following = word.lower(), text[after]
    if folded in _TITLES or (len(word) == 1 and word.isupper()):
        return True
    if following.isdigit() and (folded in _NUMBERED or len(word) == 1):
        return True
    dotted = "." in word and all(len(part) <= 3 and part.isalpha() for part in word.split("."))
    return (dotted or folded in _COMMON) and next_word not in _STARTERS


# What a line of a table or a list ends with, and what a pause within a sentence does; for cuts where no mark is.
LINE_ENDS = frozenset("\n\r\v\f\x85\u2028\u2029")
BLANKS = frozenset(
    # U+200B parts words in Khmer, Thai and Burmese, U+0F0B syllables in Tibetan, U+1361 words in Amharic.
    chain(" \t\x1c\x1d\x1e\x1f\xa0\u1680\u202f\u205f\u3000\u200b\u0f0b\u1361", map(chr, range(0x2000, 0x200B)))
)
PAUSES = frozenset(",;:—–)]|،؛、，；：፣፤፥፦།༎·")
