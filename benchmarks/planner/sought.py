"""Questions over four passages each, and the sentences there that say the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.planner.candidates import chunked, found
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.questions import Question, SourcePassage
from compllm_rag.evaluation.runner import in_seeded_order
from compllm_rag.reading.sentences import Sentence, sentence_cutter
from compllm_rag.training.material import Group

_SHORTEST = 3  # characters of an answer: a digit or an initial stands in many a sentence by chance


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


def sought(
    groups: Sequence[Group], segmenter: Segmenter, embedder: Any, *, limit: int, n_passages: int
) -> list[Sought]:
    """Questions that can be answered word by word from a sentence, one of each group before a second of any.

    The passages that say the answer are there in any case; the others are the nearest to the question among the
    passages of all groups. All stand in the retriever's order.

    Args:
        groups: Questions by the passages they share.
        segmenter: Cuts passages into chunks and these into sentences.
        embedder: The retriever's.
        limit: Questions at most.
        n_passages: Of each question.

    Raises:
        ConfigurationError: There is no such question.
    """
    cut, chosen = sentence_cutter(segmenter), list[tuple[int, Question]]()
    turns = [in_seeded_order(group.questions) for group in groups]
    for turn in range(max(map(len, turns), default=0)):
        for number in in_seeded_order(range(len(groups))):
            if turn < len(turns[number]) and len(chosen) < limit:
                question = chunked(turns[number][turn], segmenter)
                if 0 < len(_saying(question)) <= n_passages:
                    chosen.append((number, question))
    if not chosen:
        raise ConfigurationError(
            "no question is answered by the words of a passage",
            got=f"{len(groups)} groups of questions",
            expected="questions whose answer stands in a passage they rest on",
            next_step="name other data",
        )
    questions = [question for _, question in chosen]
    pool = list(
        dict.fromkeys(p for group in groups for q in group.questions[:1] for p in chunked(q, segmenter).passages)
    )
    out = []
    # Every passage of the pool, in the retriever's order.
    for (group, question), order in zip(
        chosen, found(questions, [pool] * len(questions), embedder, len(pool)), strict=True
    ):
        saying = _saying(question)
        others = [pool[i] for i in order if pool[i] not in saying][: n_passages - len(saying)]
        passages = tuple(pool[i] for i in order if pool[i] in saying or pool[i] in others)
        sentences = tuple(cut(passage.text) for passage in passages)
        gold = frozenset(
            (p, s)
            for p, passage in enumerate(passages)
            if passage in saying
            for s, sentence in enumerate(sentences[p])
            if _says(sentence.text, question.answers)
        )
        if gold:  # an answer may lie across two sentences
            out.append(Sought(question.id, question.question, group, passages, sentences, gold))
    return out


def _saying(question: Question) -> list[SourcePassage]:
    return [p for p in question.passages if p.supporting and _says(p.text, question.answers)]


def _says(text: str, answers: Sequence[str]) -> bool:
    """Whether a text has an answer in it, in whole words."""
    wanted = [answer for answer in answers if len(answer) >= _SHORTEST]
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in wanted)
