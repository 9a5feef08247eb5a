"""Questions with the passages that retrieval finds for them, from sets with one passage and with several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.common import progress
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.evaluation.questions import Question, SourcePassage, read_questions
from compllm_rag.evaluation.runner import in_seeded_order
from compllm_rag.training.gold_sentences import chunked


@dataclass(frozen=True)
class CandidateSet:
    """One evaluation set.

    Attributes:
        file: Below `eval` in the folder of data.
        title: In tables.
        pooled: Passages are looked for among those of all questions, as each has but one; else among its own.
    """

    file: str
    title: str
    pooled: bool


SETS = {
    "squad": CandidateSet("squad_dev.jsonl.gz", "SQuAD v1.1 dev", True),
    "hotpotqa": CandidateSet("hotpotqa_dev.jsonl.gz", "HotpotQA dev", False),
    "musique": CandidateSet("musique_dev.jsonl.gz", "MuSiQue dev", False),
    "narrativeqa": CandidateSet("narrativeqa_valid.jsonl.gz", "NarrativeQA validation, summaries", True),
}


def asked(path: Path, *, limit: int, pool: int, pooled: bool, segmenter: Segmenter) -> tuple[
    list[Question], list[list[SourcePassage]]
]:  # fmt: skip
    """Questions, and for each the passages that it is looked for among.

    Args:
        path: Of the data file.
        limit: Questions, the first of the seeded order.
        pool: Passages at least, where they are those of all questions: further ones of the file are added.
        pooled: See `CandidateSet`.
        segmenter: Cuts passages into chunks.
    """
    ordered = in_seeded_order(read_questions(path).questions)
    chosen = [chunked(question, segmenter) for question in ordered[:limit]]
    if not pooled:
        return chosen, [list(dict.fromkeys(question.passages)) for question in chosen]
    among = dict.fromkeys(passage for question in chosen for passage in question.passages)
    for question in ordered[limit:]:
        if len(among) >= pool:
            break
        among |= dict.fromkeys(chunked(question, segmenter).passages)
    return chosen, [list(among)] * len(chosen)


def found(
    chosen: Sequence[Question], among: Sequence[Sequence[SourcePassage]], embedder: Any, top_k: int
) -> list[list[int]]:
    """For each question the best passages, by places in what it is looked for among, best first."""
    texts = list(dict.fromkeys(_shown(passage) for each in among for passage in each))
    progress(f"embedding {len(texts)} passages and {len(chosen)} questions")
    vectors = dict(zip(texts, _embedded(embedder.get_text_embedding_batch(texts)), strict=True))
    out = []
    for question, each in zip(chosen, among, strict=True):
        matrix = np.stack([vectors[_shown(passage)] for passage in each])  # (n_passages, dim)
        [query] = _embedded([embedder.get_query_embedding(question.question)])
        out.append([int(i) for i in np.argsort(-(matrix @ query), kind="stable")[:top_k]])
    return out


def _shown(passage: SourcePassage) -> str:
    return f"{passage.title}\n{passage.text}" if passage.title else passage.text


def _embedded(vectors: Sequence[Sequence[float]]) -> list[npt.NDArray[np.float64]]:
    made = np.asarray(vectors, dtype=np.float64)  # (n, dim)
    return list(made / np.linalg.norm(made, axis=1, keepdims=True).clip(1e-12))


def with_passages(
    chosen: Sequence[Question], among: Sequence[Sequence[SourcePassage]], places: Sequence[Sequence[int]]
) -> list[Question]:
    """The questions over the passages that were found."""
    rows = zip(chosen, among, places, strict=True)
    return [replace(question, passages=tuple(each[i] for i in best)) for question, each, best in rows]


def recall(questions: Sequence[Question]) -> float:
    """Percent of questions of which a found passage has a gold answer's words in a row."""
    hits = [
        any(answer.lower() in passage.text.lower() for answer in question.answers for passage in question.passages)
        for question in questions
    ]
    return 100.0 * sum(hits) / len(hits)
