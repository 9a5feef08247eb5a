"""What a rival is given, what it hands back, and the protocol between it and `benchmarks.rivals`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.rates import FixedRate
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import CompLLMError
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Segmented, Setting
from compllm_rag.evaluation.questions import Question
from compllm_rag.evaluation.statistics import Record
from compllm_rag.prompt import ConceptSpan, Span, TextSpan

Body = tuple[int, ...] | torch.Tensor


class LeftOutError(CompLLMError, RuntimeError):
    """A rival cannot run here; its message says why, its next step how it could."""


@dataclass(frozen=True)
class Task:
    """The same for every rival: target LLM and reader, questions, passages, and how much room a passage may take.

    Attributes:
        compressor: With its target LLM, into which the reader is merged.
        llm: How that LLM is named.
        questions: That fit the window.
        generation: Limits of an answer.
        batch_size: Most questions of one batch.
        progress: Called with a line.
        segmented: Segments of each passage, cut once.
    """

    compressor: Compressor
    llm: str
    questions: Sequence[Question]
    generation: GenerationConfig
    batch_size: int
    progress: Callable[[str], None]
    segmented: Segmented

    @property
    def texts(self) -> list[str]:
        """Every passage once, in the order in which it is met."""
        return list(dict.fromkeys(passage.text for question in self.questions for passage in question.passages))

    def counts(self, text: str, rate: float) -> list[int]:
        """K of each segment of a passage."""
        return FixedRate(rate, self.compressor.config.segment_length).n_concepts(self.segmented(text))

    def budget(self, text: str, rate: float) -> int:
        """Positions that the concepts of a passage take, which is what every rival may take."""
        return sum(self.counts(text, rate))


@dataclass(frozen=True)
class Outcome:
    """What a rival did.

    Attributes:
        records: One per question, in their order.
        prefilled: Prompt positions that the LLM computed, mean over questions.
        prepare_s: Seconds it took to compress the passages; None where that is part of asking.
        notes: Whatever else is worth writing down.
    """

    records: list[Record]
    prefilled: float
    prepare_s: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class Baseline(Protocol):
    """One way to have an LLM read passages, within as many positions as concepts take."""

    @property
    def name(self) -> str:
        """In the JSON and on the command line."""
        ...

    @property
    def title(self) -> str:
        """In tables and plots."""
        ...

    @property
    def compresses(self) -> bool:
        """Whether the rate matters to it."""
        ...

    def settings(self) -> dict[str, Any]:
        """What decides its result besides the task: weights, versions, parameters."""
        ...

    def ask(self, task: Task, rate: float) -> Outcome:
        """Answer and score the questions.

        Raises:
            LeftOutError: It cannot run here.
        """
        ...


class MadeBodies:
    """Passages that were turned into token ids or embeddings beforehand; see `PassageBodies`."""

    def __init__(self, made: Mapping[str, Body]) -> None:
        self._made = made

    def size(self, text: str) -> int:
        """Prompt positions of a passage."""
        return len(self._made[text])

    def prepare(self, texts: Iterable[str]) -> None:
        """All of it was made before."""

    def spans(self, text: str, passage: int) -> list[Span]:
        """The spans that stand for a passage."""
        made = self._made[text]
        return [ConceptSpan(made, passage) if isinstance(made, torch.Tensor) else TextSpan(made, passage)]


def ask_with(task: Task, setting: Setting, made: Mapping[str, Body] | None = None) -> list[Record]:
    """Ask the questions through the evaluation's own code.

    Args:
        task: See `Task`.
        setting: How the evaluation lays out a passage.
        made: What stands for each passage instead.
    """
    asker = Asker(
        task.compressor, setting, task.segmented, task.generation, MadeBodies(made) if made is not None else None
    )
    return asker.ask(task.questions, batch_size=task.batch_size, answer=setting.mode != "none", progress=lambda _: None)


def ask_made(task: Task, make: Callable[[str], Body], notes: dict[str, Any] | None = None) -> Outcome:
    """Make the body of every passage, then ask.

    Args:
        task: See `Task`.
        make: Token ids, or embeddings (n, hidden_size), of a passage's text.
        notes: Go into the outcome; may be filled while bodies are made.
    """
    begun = time.perf_counter()
    made = {text: make(text) for text in task.texts}
    seconds = time.perf_counter() - begun
    records = ask_with(task, Setting("text"), made)
    return Outcome(records, mean_positions(records), seconds, notes if notes is not None else {})


def mean_positions(records: Sequence[Record]) -> float:
    """Prompt positions, mean over questions."""
    return sum(record.positions for record in records) / len(records)
