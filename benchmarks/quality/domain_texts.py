"""Kinds of text that benchmarks.domains compares, and the passages it takes from them.

Nothing is scored that the shipped adapters trained on: evaluation files are refused by the trainer, and of files that
were in the training mix only the texts are taken that the trainer holds out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.evaluation.questions import Question, read_questions, read_rows
from compllm_rag.training.material import Material

_CHARS = 6  # a token has about 4; the rest is room for what is cut off at both ends
_SHORT = 200  # characters; the trainer takes no shorter text, and nor is one taken here
_EVALUATION = "an evaluation file, which the trainer refuses"
_ONE_IN_40 = (
    "the texts that the trainer holds out (one in 40); the first part of the shipped reader was trained by an earlier "
    "script, of which it is not known what it held out"
)


@dataclass(frozen=True)
class Domain:
    """A kind of text.

    Attributes:
        file: Below the data folder.
        title: For people.
        training: What of this kind was in the training mix of the shipped adapters, None if nothing.
        held_out: Why none of the texts taken was trained on.
        asked: Whether the file's questions are asked as well.
    """

    file: str
    title: str
    training: str | None
    held_out: str
    asked: bool = False


DOMAINS = {
    "squad": Domain(
        "eval/squad_dev.jsonl.gz",
        "encyclopedia (SQuAD dev)",
        "questions of SQuAD train, and copying and continuing of Wikipedia",
        _EVALUATION,
        asked=True,
    ),
    "stories": Domain(
        "eval/fairytaleqa_val.jsonl.gz",
        "stories (FairytaleQA validation)",
        "questions of FairytaleQA train, and copying and continuing of novels",
        _EVALUATION,
        asked=True,
    ),
    "biomedical": Domain(
        "text/pubmed_abstracts.jsonl.gz",
        "biomedical abstracts (PubMed)",
        "copying and continuing of abstracts of this file",
        _ONE_IN_40,
    ),
    "code": Domain(
        "text/python_docs.jsonl.gz",
        "code documentation (Python)",
        "copying and continuing of pages of this file",
        _ONE_IN_40,
    ),
    "web": Domain("eval/quail_dev.jsonl.gz", "news, blogs, fiction (QuAIL dev)", None, _EVALUATION),
}


@dataclass(frozen=True)
class Piece:
    """A passage and the token ids behind it; `id` is that of the text it is from."""

    id: str
    passage: str
    rest: tuple[int, ...]


def texts_of(path: Path, compressor: ConceptCompressor) -> list[tuple[str, str]]:
    """Names and texts of a file's rows; of plain texts, which are trained on, those that the trainer holds out."""
    rows = [(str(row.get("id", number)), row) for number, row in read_rows(path)]
    if any("context" in row for _, row in rows):
        return [(name, str(row.get("context") or "")) for name, row in rows]
    trained_on = set(Material([], [path], compressor.spec.segmenter).texts)
    texts = [(name, str(row.get("text") or "")) for name, row in rows]
    return [(name, text) for name, text in texts if len(text) > _SHORT and text not in trained_on]


def pieces(compressor: ConceptCompressor, path: Path, n: int, context: int, length: int, seed: int = 0) -> list[Piece]:
    """Passages and what follows them: one of each text, then where texts are few and long a second one, and so on.

    Args:
        compressor: Its segmenter cuts the texts; a passage is whole segments.
        path: Rows with a `text` or a `context`.
        n: Passages wanted; fewer where the file does not have them.
        context: Most source tokens of a passage; those with less than half of it are left out.
        length: Tokens of the continuation.
        seed: Of the order of texts and of places in them.
    """
    rng = random.Random(seed)
    found = texts_of(path, compressor)
    rng.shuffle(found)
    windows = [(name, _windows(text, _CHARS * (context + length), rng)) for name, text in found]
    made: list[Piece] = []
    while windows and len(made) < n:
        left = []
        for name, places in windows:
            window = next(places, None)
            if window is None or len(made) == n:
                continue
            left.append((name, places))
            piece = _piece(compressor, name, window, context, length)
            if piece:
                made.append(piece)
        windows = left
    return made


def _windows(text: str, span: int, rng: random.Random) -> Iterator[str]:
    """Runs of `span` characters that do not overlap, in any order; each begins with a line if it has one."""
    begins = list(range(0, max(1, len(text) - span // 2), span))
    rng.shuffle(begins)
    for begin in begins:
        start = text.find("\n", begin, begin + span // 4) + 1 if begin else 0
        yield text[start or begin : begin + span]


def _piece(compressor: ConceptCompressor, name: str, text: str, context: int, length: int) -> Piece | None:
    segments = compressor.spec.segmenter.split(text.strip()) if text.strip() else []
    kept, used = 0, 0
    while kept < len(segments) and used + len(segments[kept]) <= context:
        used += len(segments[kept])
        kept += 1
    # A short text gives a shorter passage, as long as the continuation is whole.
    while kept and sum(map(len, segments[kept:])) < length:
        kept -= 1
        used -= len(segments[kept])
    rest = tuple(token for segment in segments[kept:] for token in segment)[:length]
    passage = compressor.llm.tokenizer.decode([token for segment in segments[:kept] for token in segment])
    return Piece(name, passage, rest) if kept and used >= context // 2 else None


def questions_of(path: Path, n: int, compressor: ConceptCompressor, most: int, seed: int = 0) -> list[Question]:
    """One question of each of n passages of at most `most` source tokens, in seeded order."""
    rng = random.Random(seed)
    groups: dict[str, list[Question]] = {}
    for question in read_questions(path).questions:
        groups.setdefault(question.passages[0].text, []).append(question)
    order = list(groups.items())
    rng.shuffle(order)
    made: list[Question] = []
    for text, group in order:
        if len(made) == n:
            break
        if len(compressor.spec.segmenter.tokenize(text).ids) <= most:
            made.append(rng.choice(group))
    return made
