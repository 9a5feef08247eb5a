"""Text to token-exact segments, and segments to chunks.

A document is tokenised once and cut between tokens: at sentence ends, with short neighbours joined, and long sentences
where their content says (`cuts`; `cuts_v1` for what was made before). A chunk is a run of whole segments. Both rules
look only at the text nearby, so that an edit changes the segments of its sentence and at most one neighbour on each
side, and the chunks around it, while all that comes later keeps its identity and its concepts (docs/design.md section
4). CompLLM (arXiv 2509.19228, section 3) cuts segments of at most S = 20 tokens; how it cuts them it leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from compllm_rag.compression.cuts import cut
from compllm_rag.compression.cuts_v1 import cut_v1
from compllm_rag.compression.segments import INNER, Segment
from compllm_rag.config import SEGMENTER_VERSION, SEGMENTER_VERSIONS
from compllm_rag.errors import ConfigurationError, UnsupportedModelError
from compllm_rag.models.plaintext import encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of the chunk size: how far a boundary looks for a better one, and the longest chunk. MiniLM reads 256 word pieces.
_REACH, _MOST = 0.5, 1.2


@dataclass(frozen=True)
class TokenizedText:
    """A text's token ids, the character offsets of each token, and its segments."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    segments: list[Segment]

    def segment_ids(self, first: int = 0, last: int | None = None) -> list[list[int]]:
        """Token ids of segments `first` to `last` (exclusive)."""
        return [self.ids[s.start : s.end] for s in self.segments[first:last]]


class Segmenter:
    """Cuts text into segments of at most S tokens, by the target LLM's tokenizer.

    Args:
        tokenizer: A fast tokenizer (character offsets are needed).
        segment_length: S, the most tokens of a segment.
        version: Of the rules: 2, or 1 for a compressor whose configuration says so (the case of storages made before
            version 2).

    Raises:
        UnsupportedModelError: The tokenizer is not a fast one.
        ConfigurationError: There is no such version.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, segment_length: int, version: int = SEGMENTER_VERSION
    ) -> None:
        if version not in SEGMENTER_VERSIONS:
            raise ConfigurationError(
                "unknown version of the segmenter",
                got=version,
                expected=" or ".join(map(str, SEGMENTER_VERSIONS)),
                next_step="update compllm-rag",
            )
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedModelError(
                "tokenizer gives no character offsets",
                got=type(tokenizer).__name__,
                expected="a fast tokenizer (tokenizer.json)",
                next_step="convert the tokenizer with transformers, or use another LLM",
            )
        self.tokenizer, self.segment_length, self.version = tokenizer, segment_length, version

    def tokenize(self, text: str) -> TokenizedText:
        """Tokenise a text once and cut it into segments.

        Text that spells a special token (`<|im_end|>`) is read as plain text: a passage must not be able to close
        the turn it stands in.

        Args:
            text: Any text; the empty text has no segments.

        Returns:
            The text with ids, offsets and segments; the segments joined give the ids back exactly.
        """
        if not text:
            return TokenizedText(text, [], [], [])
        encoding = encode_plain(self.tokenizer, text, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), [(int(a), int(b)) for a, b in encoding["offset_mapping"]]
        return TokenizedText(text, ids, offsets, self._cut(text, ids, offsets))

    def split(self, text: str) -> list[list[int]]:
        """Token ids of each segment of a text."""
        return self.tokenize(text).segment_ids()

    def _cut(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> list[Segment]:
        if self.version == 1:
            return cut_v1(text, offsets, self.segment_length)
        return cut(text, ids, offsets, self.segment_length)


def units_of(tokenized: TokenizedText, unit_length: int) -> list[list[int]]:
    """Token ids of a text in runs of whole segments, each of at most `unit_length` tokens where segments allow it.

    A chunk of the default size is one run. Longer texts are cut where chunks would be cut, so that an edit changes
    few runs.
    """
    return [
        tokenized.ids[tokenized.segments[first].start : tokenized.segments[last - 1].end]
        for first, last in chunk_bounds(tokenized, int(unit_length / _MOST))
    ]


def unit_length_for(chunk_size: int) -> int:
    """Least `unit_length` with which `units_of` leaves a chunk of `chunk_texts` in one piece."""
    length = math.ceil(_MOST * chunk_size)
    while int(length / _MOST) < chunk_size:  # 1.2 has no exact binary fraction
        length += 1
    return length


def chunk_texts(tokenized: TokenizedText, chunk_size: int) -> Iterator[tuple[str, int, int]]:
    """Text, first character and character after the last of each chunk; chunks of white space alone are kept."""
    cuts = [0]
    for _, last in chunk_bounds(tokenized, chunk_size)[:-1]:
        # The end of the last token, not the start of the next: some tokenizers leave blanks out of the offsets.
        cuts.append(max(cuts[-1], tokenized.offsets[tokenized.segments[last - 1].end - 1][1]))
    cuts.append(len(tokenized.text))
    for start, end in pairwise(cuts):
        if end > start:
            yield tokenized.text[start:end], start, end


def chunk_bounds(tokenized: TokenizedText, chunk_size: int) -> list[tuple[int, int]]:
    """Group segments into chunks with content-defined boundaries.

    A boundary is a segment end that is the best within half a `chunk_size` on both sides: paragraph ends before
    sentence ends before others, and among equals the smallest hash of the segments that meet there. What remains
    longer than 1.2 `chunk_size` is cut again at its best end. Nothing outside that window matters, so an edit moves
    the boundaries around it and no others (the local-minimum method of content-defined chunking).

    Args:
        tokenized: A text with its segments.
        chunk_size: Tokens of a chunk, about.

    Returns:
        For each chunk the index of its first segment and the index after its last one.
    """
    segments = tokenized.segments
    if not segments:
        return []
    ends = [s.end for s in segments]
    if ends[-1] <= _MOST * chunk_size:
        return [(0, len(segments))]
    ranks = [_rank(tokenized, i) for i in range(len(segments))]
    reach = max(1, int(_REACH * chunk_size))
    cuts = [-1, *_local_minima(ends, ranks, reach), len(segments) - 1]
    bounds: list[tuple[int, int]] = []
    for a, b in pairwise(cuts):
        if b > a:
            bounds.extend(_cut_long(ends, ranks, a + 1, b + 1, chunk_size))
    return bounds


def _rank(tokenized: TokenizedText, i: int) -> tuple[int, int]:
    """Order of the boundary after segment i: level, then a hash of the tokens on both sides."""
    segments, ids = tokenized.segments, tokenized.ids
    around = ids[segments[i].start : segments[min(i + 1, len(segments) - 1)].end]
    return segments[i].level, xxhash.xxh3_64_intdigest(np.asarray(around, dtype="<u4").tobytes())


def _local_minima(ends: Sequence[int], ranks: Sequence[tuple[int, int]], reach: int) -> list[int]:
    out = []
    for i in range(len(ends) - 1):
        # The two ends of the text are boundaries that no other one near them can beat.
        if ranks[i][0] == INNER or ends[i] < reach or ends[-1] - ends[i] < reach:
            continue
        best, j = True, i - 1
        while best and j >= 0 and ends[i] - ends[j] <= reach:
            best, j = ranks[i] < ranks[j], j - 1
        j = i + 1
        while best and j < len(ends) - 1 and ends[j] - ends[i] <= reach:
            best, j = ranks[i] <= ranks[j], j + 1
        if best:
            out.append(i)
    return out


def _cut_long(
    ends: Sequence[int], ranks: Sequence[tuple[int, int]], first: int, last: int, chunk_size: int
) -> list[tuple[int, int]]:
    """Cut segments first..last (exclusive) until every run fits; iterative, as a text may be one endless sentence."""
    done: list[tuple[int, int]] = []
    todo = [(first, last)]
    while todo:
        a, b = todo.pop()
        start = ends[a - 1] if a else 0
        total = ends[b - 1] - start
        if total <= _MOST * chunk_size or b - a < 2:
            done.append((a, b))
            continue
        margin = min(_REACH * chunk_size, total / 3)
        inner = [i for i in range(a, b - 1) if ends[i] - start >= margin and ends[b - 1] - ends[i] >= margin]
        # Among equals (the same sentence over and over) the one nearest the middle, so that few rounds are enough.
        cut = min(inner or range(a, b - 1), key=lambda i: (ranks[i], abs(2 * ends[i] - start - ends[b - 1])))
        todo.extend([(cut + 1, b), (a, cut + 1)])
    return done
