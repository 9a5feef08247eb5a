"""Words of a chunk: which of the LLM's tokens, and which of an encoder's word pieces, belong to each of them.

LLMLingua-2 (arXiv 2403.12968, section 4) keeps or drops whole words, and a word is as worth keeping as its word pieces
are in the mean. A word is what stands between blanks, with the punctuation that touches it; of scripts that write no
blanks, each character is one. The blank in front of a word goes with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import regex  # type: ignore[import-untyped, unused-ignore]

from compllm_rag.models.plaintext import encode_plain

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[^\s{_UNSPACED}]+")


@dataclass(frozen=True)
class ChunkWords:
    """The words of a chunk.

    Attributes:
        words: As they stand there, in order; never empty.
        of_tokens: Of each of the LLM's tokens: the word it belongs to.
        pieces: Ids of the encoder's word pieces, special ones left out.
        of_pieces: Of each word piece: the word it belongs to.
    """

    words: tuple[str, ...]
    of_tokens: tuple[int, ...]
    pieces: tuple[int, ...]
    of_pieces: tuple[int, ...]


def words_of(unit: Sequence[int], tokenizer: Any, encoder_tokenizer: Any) -> ChunkWords:
    """The words of a chunk of the LLM's tokens.

    Args:
        unit: Token ids.
        tokenizer: The LLM's.
        encoder_tokenizer: Makes the word pieces; a fast one, since character offsets are needed.
    """
    text = tokenizer.decode(list(unit), skip_special_tokens=False)
    spans = [match.span() for match in _WORD.finditer(text)] or [(0, len(text))]
    at = _word_at(text, spans)
    encoded = encode_plain(encoder_tokenizer, text, return_offsets_mapping=True)
    return ChunkWords(
        tuple(text[begin:end] for begin, end in spans),
        tuple(at[begin] for begin in _begins(unit, text, tokenizer)),
        tuple(encoded["input_ids"]),
        tuple(at[begin] for begin, _ in encoded["offset_mapping"]),
    )


def kept_tokens(scores: Sequence[float], of_tokens: Sequence[int], k: int) -> list[int]:
    """The places of exactly `k` tokens: those of the best words, in reading order.

    A word of more tokens than are left is passed over for the next best that fits. Where none fits, the best of those
    that were passed over gives its first tokens.

    Args:
        scores: Of each word.
        of_tokens: Of each token: its word.
        k: At most as many as there are tokens.
    """
    places: dict[int, list[int]] = {}
    for place, word in enumerate(of_tokens):
        places.setdefault(word, []).append(place)
    kept, over = list[int](), list[int]()
    for word in sorted(places, key=lambda word: (-scores[word], word)):
        if len(kept) + len(places[word]) <= k:
            kept += places[word]
        else:
            over += places[word]
    return sorted(kept + over[: k - len(kept)])


def _word_at(text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Of each character, and of the text's end: the word it belongs to; of blanks, the next one, or the last."""
    at = [len(spans) - 1] * (len(text) + 1)
    before = 0
    for number, (_, end) in enumerate(spans):
        at[before:end] = [number] * (end - before)
        before = end
    return at


def _begins(unit: Sequence[int], text: str, tokenizer: Any) -> list[int]:
    """The character that each token begins with."""
    again = encode_plain(tokenizer, text, return_offsets_mapping=True)
    if list(again["input_ids"]) == list(unit):
        return [int(begin) for begin, _ in again["offset_mapping"]]
    # Alone, the chunk is not tokenised as it was within its text: a token begins where what is decoded before it ends.
    return [min(len(text), len(tokenizer.decode(list(unit[:i]), skip_special_tokens=False))) for i in range(len(unit))]
