"""BM25 over a passage's sentences: those that say the question's words, as many as fit into what concepts take.

It reads the question before it chooses, which concepts that were made at ingestion cannot.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.rivals.base import Baseline, LeftOutError, MadeBodies, Outcome, Task, mean_positions
from compllm_rag.catalog.words import words
from compllm_rag.compression.sentence_ends import sentence_ends
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Setting
from compllm_rag.evaluation.questions import Question
from compllm_rag.evaluation.statistics import Record
from compllm_rag.models.plaintext import encode_plain


class Bm25Sentences(Baseline):
    """Sentences of each passage by BM25 against the question, in their own order."""

    def __init__(self) -> None:
        super().__init__("bm25_sentences", "BM25 sentences")

    def ask(self, task: Task, rate: float) -> Outcome:
        """See `Baseline.ask`."""
        try:
            import bm25s
        except ImportError as error:
            raise LeftOutError("bm25s is not installed", next_step="pip install 'compllm-rag[bm25]'") from error
        records: list[Record] = []
        for number, question in enumerate(task.questions, 1):
            made = {p.text: chosen(bm25s, task, question, p.text, rate) for p in question.passages}
            records.append(_asked(task, question, made))
            if number % 50 == 0:
                task.progress(f"{self.name}: {number} of {len(task.questions)} questions")
        return Outcome(records, mean_positions(records))


def chosen(bm25s: Any, task: Task, question: Question, text: str, rate: float) -> tuple[int, ...]:
    """Token ids of a passage's best sentences, in reading order, within the passage's budget.

    Where no sentence says a word of the question, the first ones are taken. A sentence that does not fit is left out
    for shorter ones; if none fits, the best is cut off.
    """
    tokenizer, budget = task.compressor.llm.tokenizer, task.budget(text, rate)
    places = [0, *(after for after, _ in sentence_ends(text)), len(text)]
    sentences = [text[a:b] for a, b in itertools.pairwise(places)]
    ids = [tuple(encode_plain(tokenizer, sentence)["input_ids"]) for sentence in sentences]
    order = best_first(bm25s, sentences, question.question)
    taken: list[int] = []
    left = budget
    for at in order:
        if len(ids[at]) <= left:
            taken.append(at)
            left -= len(ids[at])
    if not taken:
        return ids[order[0]][:budget]
    return tuple(token for at in sorted(taken) for token in ids[at])


def best_first(bm25s: Any, sentences: Sequence[str], question: str) -> list[int]:
    """Indices of sentences, best first; of equals the earlier one."""
    vocabulary: dict[str, int] = {}
    corpus = [[vocabulary.setdefault(word, len(vocabulary)) for word in words(sentence)] for sentence in sentences]
    known = [vocabulary[word] for word in words(question) if word in vocabulary]
    if not known:
        return list(range(len(sentences)))
    index = bm25s.BM25(method="lucene")
    index.index((corpus, dict(vocabulary)), show_progress=False)
    scores = index.get_scores_from_ids(known)  # (sentences,)
    return sorted(range(len(sentences)), key=lambda at: (-float(scores[at]), at))


def _asked(task: Task, question: Question, made: dict[str, tuple[int, ...]]) -> Record:
    asker = Asker(task.compressor, Setting("text"), task.segmented, task.generation, MadeBodies(made))
    [record] = asker.ask([question], batch_size=1, answer=True, progress=lambda _: None)
    return replace(record, concepts=sum(len(made[p.text]) for p in question.passages))
