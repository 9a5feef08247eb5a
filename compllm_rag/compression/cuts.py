"""Version 2 of how a text is cut: sentence ends of all scripts, and cuts by content where a sentence is long.

Whatever is cut here is cut by what stands nearby. A sentence of at most S tokens is a segment, or shares one with its
neighbour. A longer one is cut in as few parts as can be, where it pauses. In one of more than 4 S tokens (Thai, a
transcript, a long line) the cuts that are the best of all within 0.6 S tokens on both sides are found first, and only
what lies between two of them is cut so: an edit reaches the two such cuts around it, however long the sentence is.
"""

from __future__ import annotations

import codecs
import math
from itertools import pairwise

import numpy as np

from compllm_rag.compression.segments import INNER, SENTENCE, Segment
from compllm_rag.compression.sentence_ends import BLANKS, LINE_ENDS, PAUSES, sentence_ends
from compllm_rag.compression.sentences import ENDLESS, character_ends, join_short, sentences_of

# What a cut is worth, best first: at a line end, behind a pause, between words, between characters, within one.
_AT_LINE, _AT_PAUSE, _AT_BLANK, _AT_CHARACTER, _WITHIN = range(5)

# In segments: what is cut at its local minima first; how far such a cut must be the best one. With more reach segments
# are fuller and an edit costs more of them: of a transcript, 27 and 5 % new at 0.6, 25 and 8 % at 0.75.
_LONG, _REACH = 4, 0.6

# Looked up now: a process that gives up rights later may not be able to load it any more.
_CODEC = codecs.lookup("utf-32-le").name
_HASH_BITS = 48
_ODD = np.asarray([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=np.uint64)  # of splitmix64
_WIDE = 0x2E80  # from here on punctuation carries its own space


def _kinds() -> np.ndarray:
    """What a cut beside each character is worth; the last entry stands for all characters behind it."""
    table = np.full(0x10000, _AT_CHARACTER, dtype=np.uint8)
    for characters, kind in ((PAUSES, _AT_PAUSE), (BLANKS, _AT_BLANK), (LINE_ENDS, _AT_LINE)):
        table[[ord(character) for character in characters]] = kind
    return table


_KINDS = _kinds()


def cut(text: str, ids: list[int], offsets: list[tuple[int, int]], size: int) -> list[Segment]:
    """Cut a tokenised text.

    Args:
        text: The text.
        ids: Its token ids, at least one.
        offsets: First character of each token, and the character after its last.
        size: S, the most tokens of a segment.

    Returns:
        Segments that join to the ids, none longer than S.
    """
    ends = character_ends(offsets)
    ranks = _ranks(text, ids, offsets, ends)
    sentences = sentences_of(text, ends, sentence_ends(text), size)
    return join_short(text, ends, sentences, size, lambda sentence: _split(sentence, ranks, size))


def _split(sentence: Segment, ranks: np.ndarray, size: int) -> list[Segment]:
    """Cut a sentence into segments."""
    n = sentence.end - sentence.start
    if n <= size:
        return [sentence]
    own = ranks[sentence.start : sentence.end].tolist()  # of the cut in front of each token
    # Where a text goes on without marks or lines, the cuts that its content gives are its sentence ends.
    level = SENTENCE if n > ENDLESS * size else INNER
    stretches = [0, *(_local_minima(own, int(_REACH * size)) if n > _LONG * size else []), n]
    cuts: dict[int, int] = dict.fromkeys(stretches[1:-1], level) | {n: sentence.level}
    for first, last in pairwise(stretches):
        cuts.update(dict.fromkeys(_few_parts(own, first, last, size), INNER))
    places = sorted(cuts)
    return [Segment(sentence.start + a, sentence.start + b, cuts[b]) for a, b in pairwise([0, *places])]


def _local_minima(ranks: list[int], reach: int) -> list[int]:
    """Places whose rank no other within `reach` has or undercuts, and that are no nearer than that to either end."""
    reach = max(1, reach)
    inner = ranks[reach : len(ranks) - reach + 1]
    out, i = [], 0
    while i < len(inner):
        left, right = inner[max(0, i - reach) : i], inner[i + 1 : i + 1 + reach]
        if left and min(left) <= inner[i]:
            i += 1
        elif right and (least := min(right)) < inner[i]:
            i += 1 + right.index(least)  # whatever lies between has that one within its reach
        else:
            out.append(reach + i)
            i += 1
    return out


def _few_parts(ranks: list[int], first: int, last: int, size: int) -> list[int]:
    """Cuts of a stretch into the fewest parts, each at the best place that leaves them that few; no tail is tiny."""
    cuts, todo = [], [(first, last)]
    while todo:
        a, b = todo.pop()
        n = b - a
        if n <= size:
            continue
        parts = math.ceil(n / size)
        at = a + _best(ranks[a:b], size, parts)
        if ranks[at] >> _HASH_BITS == _WITHIN:  # no character ends where so few parts must be cut
            at = a + _best(ranks[a:b], size, parts + 1)
        cuts.append(at)
        todo.extend([(a, at), (at, b)])
    return cuts


def _best(ranks: list[int], size: int, parts: int) -> int:
    """The best place for the middle one of the cuts that make so many parts."""
    n, half, margin = len(ranks), parts // 2, max(1, size // 4)
    lowest, highest = max(n - (parts - half) * size, margin), min(half * size, n - margin)
    even = n * half / parts
    return min(range(lowest, highest + 1), key=lambda at: (ranks[at], abs(at - even)))


def _ranks(text: str, ids: list[int], offsets: list[tuple[int, int]], ends: np.ndarray) -> np.ndarray:
    """Order of the cuts in front of each token: what stands there, then a hash of two tokens on both sides."""
    characters = np.frombuffer(text.encode(_CODEC, "surrogatepass"), dtype="<u4")
    starts = np.asarray([start for start, _ in offsets], dtype=np.int64)
    border = np.concatenate([[0], ends[:-1]])  # how many characters the tokens in front of the cut have read
    last, following = characters[np.maximum(border - 1, 0)], characters[np.minimum(border, len(characters) - 1)]
    before, behind = _KINDS[np.minimum(last, len(_KINDS) - 1)], _KINDS[np.minimum(following, len(_KINDS) - 1)]
    # White space may be the last character of the token in front of a cut, or the first of the one behind it.
    blank, line = (before == _AT_BLANK) | (behind == _AT_BLANK), (before == _AT_LINE) | (behind == _AT_LINE)
    pause = (before == _AT_PAUSE) & (blank | (last >= _WIDE))
    kind = np.select([starts < border, line, pause, blank], [_WITHIN, _AT_LINE, _AT_PAUSE, _AT_BLANK], _AT_CHARACTER)
    return (kind.astype(np.uint64) << np.uint64(_HASH_BITS)) | (_around(ids) >> np.uint64(64 - _HASH_BITS))


def _around(ids: list[int]) -> np.ndarray:
    """A hash of the two tokens in front of each token, itself, and the next one."""
    padded = np.zeros(len(ids) + 3, dtype=np.uint64)
    padded[2:-1] = ids
    mixed = np.zeros(len(ids), dtype=np.uint64)
    for shift in range(4):
        mixed = (mixed ^ (padded[shift : shift + len(ids)] + _ODD[0])) * _ODD[1]
        mixed ^= mixed >> np.uint64(29)
    mixed *= _ODD[2]
    return mixed
