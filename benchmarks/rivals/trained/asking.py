"""A row's passages in the prompt of a question, through the evaluation's own code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Segmented, Setting
from compllm_rag.prompt import Span

if TYPE_CHECKING:
    from benchmarks.rivals.trained.row import Row


class RowBodies:
    """What a row puts in the place of passages; see `PassageBodies`. All of it is kept."""

    def __init__(self, row: Row) -> None:
        self._row = row
        self._made: dict[tuple[str, int], list[Span]] = {}

    def size(self, text: str) -> int:
        """Prompt positions of a passage."""
        return self._row.size(text)

    def prepare(self, texts: Iterable[str]) -> None:
        """Passages are made one by one, when their spans are asked for."""

    def spans(self, text: str, passage: int) -> list[Span]:
        """The spans that stand for a passage."""
        if (text, passage) not in self._made:
            self._made[text, passage] = self._row.spans(text, passage)
        return self._made[text, passage]


def row_asker(row: Row, compressor: ConceptCompressor, segmented: Segmented, generation: GenerationConfig) -> Asker:
    """Asks questions with passages as a row reads them.

    Args:
        row: Trained or not.
        compressor: Any of the same LLM; what it would make is not asked for.
        segmented: Counts tokens of passages.
        generation: Limits of an answer.
    """
    halves = row.halves.merged() if row.halves else None
    return Asker(compressor, Setting("text"), segmented, generation, RowBodies(row), halves=halves)
