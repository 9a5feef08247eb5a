"""What a rival is given, what it hands back, and the protocol between it and `rivals`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.rivals.environments import command, default_folder, pins, python_of
from compllm_rag.compression.rates import FixedRate
from compllm_rag.compression.spec import ConceptCompressor
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

    compressor: ConceptCompressor
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
        """K of each segment of a passage, or of each unit of deep concepts."""
        return FixedRate(rate, self.compressor.config.longest_unit).n_concepts(self.segmented(text))

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


@dataclass
class Baseline:
    """One way to have an LLM read passages, within as many positions as concepts take.

    Attributes:
        name: In the JSON and on the command line.
        title: In tables and plots.
        compresses: Whether the rate matters to it.
        ours: Whether it reads concepts of the task's compressor, so that a position costs what a concept costs.
    """

    name: str
    title: str
    compresses: bool = True
    ours: bool = False

    def prefill_cost(self, task: Task, achieved_rate: float | None) -> float | None:
        """What a token of a passage costs at prefill, text = 1; None without passages."""
        if achieved_rate is None:
            return None if self.name == "none" else 1.0
        return task.compressor.spec.prefill_cost(achieved_rate) if self.ours else 1 / achieved_rate

    def settings(self) -> dict[str, Any]:
        """What decides its result besides the task: weights, versions, parameters."""
        return {}

    def ask(self, task: Task, rate: float) -> Outcome:
        """Answer and score the questions.

        Raises:
            LeftOutError: It cannot run here.
        """
        raise NotImplementedError


class Outside(Baseline):
    """A rival whose package runs in an environment of its own, and is asked by `run_PACKAGE`.

    Args:
        name: See `Baseline`.
        title: See `Baseline`.
        package: Name of the package and of its environment.
        environments: Folder of environments; None is the one in the cache directory.
        runner: Command that starts the runner, in place of the environment's; the folder of the model is appended.
    """

    def __init__(
        self, name: str, title: str, package: str, environments: Path | None, runner: tuple[str, ...] = ()
    ) -> None:
        super().__init__(name, title)
        self._package, self._environments, self._runner = package, environments, runner

    def pins(self) -> list[str]:
        """The pinned versions of its environment."""
        return pins(self._package).read_text(encoding="utf-8").split()

    def runner(self) -> tuple[str, ...]:
        """The command that starts its runner.

        Raises:
            LeftOutError: There is no environment.
        """
        if self._runner:
            return self._runner
        python = python_of(self._package, self._environments or default_folder())
        if python is None:
            how = command(self._package, self._environments)
            raise LeftOutError(f"package {self._package} has no environment", next_step=how)
        return (str(python), "-m", f"benchmarks.rivals.run_{self._package}")


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
