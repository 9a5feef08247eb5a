"""Questions over a few passages, and the sentences there that say the answer: what relevance is learned from."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from compllm_rag.compression.segmentation import Segmenter, chunk_texts
from compllm_rag.evaluation.questions import Question, SourcePassage
from compllm_rag.reading.sentences import Sentence, sentence_cutter
from compllm_rag.training.material import Group

CHUNK = 200  # target tokens of a chunk, as `ingest` cuts them
_SHORTEST = 3  # characters of an answer: a digit or an initial stands in many a sentence by chance
_NEAR = 0.6  # share of distractors from the same document


@dataclass(frozen=True)
class Sought:
    """One question.

    Attributes:
        id: Of the question.
        question: What is asked.
        group: Number of the group of questions that share passages with it.
        passages: As a retriever would give them, best first.
        sentences: Of each passage.
        gold: (passage, sentence) of each sentence that says the answer, in passages that the question rests on.
    """

    id: str
    question: str
    group: int
    passages: tuple[SourcePassage, ...]
    sentences: tuple[tuple[Sentence, ...], ...]
    gold: frozenset[tuple[int, int]]

    @property
    def n_sentences(self) -> int:
        """Sentences to look among."""
        return sum(map(len, self.sentences))


def chunked(question: Question, segmenter: Segmenter) -> Question:
    """A question whose long passages are cut into chunks."""
    passages = [
        replace(passage, text=text)
        for passage in question.passages
        for text, _, _ in chunk_texts(segmenter.tokenize(passage.text), CHUNK)
    ]
    return replace(question, passages=tuple(passages))


def saying(question: Question) -> list[SourcePassage]:
    """The passages that a question rests on and that say an answer word by word."""
    return [p for p in question.passages if p.supporting and _says(p.text, question.answers)]


def sought_in(question: Question, passages: Sequence[SourcePassage], segmenter: Segmenter, group: int) -> Sought | None:
    """A question over passages; None where no sentence says the answer (it may lie across two).

    Args:
        question: With chunks for passages.
        passages: As a retriever would give them; those of `saying` are among them.
        segmenter: Cuts them into sentences.
        group: See `Sought`.
    """
    cut, own = sentence_cutter(segmenter), saying(question)
    sentences = tuple(cut(passage.text) for passage in passages)
    gold = frozenset(
        (p, s)
        for p, passage in enumerate(passages)
        if passage in own
        for s, sentence in enumerate(sentences[p])
        if _says(sentence.text, question.answers)
    )
    return Sought(question.id, question.question, group, tuple(passages), sentences, gold) if gold else None


def drawn(groups: Sequence[Group], segmenter: Segmenter, *, n_passages: int, most: int, seed: int) -> Iterator[Sought]:
    """Questions to learn from, each over passages that say the answer and others, in random order.

    The others are a question's own that do not say it, then chunks of the same document and of any other.

    Args:
        groups: Questions by the passages they share.
        segmenter: Cuts passages into chunks and these into sentences.
        n_passages: Of each question.
        most: Questions of a group.
        seed: Of the choice.
    """
    rng = random.Random(seed)
    by_title: dict[str, list[Group]] = {}
    for group in groups:
        by_title.setdefault(group.passages[0].title, []).append(group)
    chunks = [chunked(group.questions[0], segmenter).passages for group in groups]
    place = {id(group): number for number, group in enumerate(groups)}
    for number, group in enumerate(groups):
        near = [place[id(other)] for other in by_title[group.passages[0].title] if other is not group]
        for question in rng.sample(group.questions, min(most, len(group.questions))):
            cut = chunked(question, segmenter)
            own = saying(cut)
            if not 0 < len(own) <= n_passages:
                continue
            others = [p for p in cut.passages if p not in own]
            rng.shuffle(others)
            others.sort(key=lambda passage: not passage.supporting)
            others = others[: n_passages - len(own)]
            for _ in range(8 * n_passages):  # few groups may not have enough
                if len(own) + len(others) == n_passages:
                    break
                among = chunks[rng.choice(near) if near and rng.random() < _NEAR else rng.randrange(len(chunks))]
                passage = rng.choice(among) if among else None
                if passage is not None and passage not in others and passage not in cut.passages:
                    others.append(passage)
            passages = [*own, *others]
            rng.shuffle(passages)
            found = sought_in(cut, passages, segmenter, number)
            if found is not None:
                yield found


def _says(text: str, answers: Sequence[str]) -> bool:
    """Whether a text has an answer in it, in whole words."""
    wanted = [answer for answer in answers if len(answer) >= _SHORTEST]
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in wanted)
