"""Rivals that need nothing but the target LLM: text, truncation, pruning, means of embeddings, and concepts (ours)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.baselines.base import Baseline, Outcome, Task, ask_made, ask_with, mean_positions
from compllm_rag.compression.compressor import Compressor
from compllm_rag.config import CompressorConfig
from compllm_rag.evaluation.bodies import COMPRESSED, Setting


@dataclass(frozen=True)
class Evaluated:
    """A mode of the evaluation: text, concepts, pruned (to the compressor's anchors) or none."""

    name: str
    title: str
    mode: str

    @property
    def compresses(self) -> bool:
        """Whether the rate matters."""
        return self.mode in COMPRESSED

    def settings(self) -> dict[str, Any]:
        """The mode."""
        return {"mode": self.mode}

    def ask(self, task: Task, rate: float) -> Outcome:
        """See `Baseline.ask`."""
        records = ask_with(task, Setting.of(self.mode, rate))
        return Outcome(records, mean_positions(records))


@dataclass(frozen=True)
class Truncation:
    """The first tokens of a passage."""

    name: str = "truncation"
    title: str = "truncation"
    compresses: bool = True

    def settings(self) -> dict[str, Any]:
        """None."""
        return {}

    def ask(self, task: Task, rate: float) -> Outcome:
        """See `Baseline.ask`."""

        def make(text: str) -> tuple[int, ...]:
            ids = [token for segment in task.segmented(text) for token in segment]
            return tuple(ids[: task.budget(text, rate)])

        return ask_made(task, make)


@dataclass(frozen=True)
class Pruning:
    """The tokens of each segment that are rarest in ordinary text: unigram information, no training at all."""

    name: str = "pruning"
    title: str = "pruning by information"
    compresses: bool = True

    def settings(self) -> dict[str, Any]:
        """Where the information comes from."""
        return {"information": "unigrams"}

    def ask(self, task: Task, rate: float) -> Outcome:
        """See `Baseline.ask`."""
        plain = _untrained(task, "anchor")

        def make(text: str) -> tuple[int, ...]:
            pairs = zip(task.segmented(text), task.counts(text, rate), strict=True)
            return tuple(segment[i] for segment, k in pairs for i in plain.anchors(segment, k))

        return ask_made(task, make)


@dataclass(frozen=True)
class Mean:
    """Means of the embeddings of neighbouring tokens, as many per segment as it has concepts."""

    name: str = "mean"
    title: str = "mean of embeddings"
    compresses: bool = True

    def settings(self) -> dict[str, Any]:
        """None."""
        return {}

    def ask(self, task: Task, rate: float) -> Outcome:
        """See `Baseline.ask`."""
        pooling = _untrained(task, "mean")

        def make(text: str) -> torch.Tensor:
            return torch.cat(pooling.compress(task.segmented(text), task.counts(text, rate)))

        return ask_made(task, make)


def _untrained(task: Task, queries: Any) -> Compressor:
    """A compressor without training gives what it starts from: the anchors' embeddings, or means."""
    config = CompressorConfig(segment_length=task.compressor.config.segment_length, layers=1, queries=queries)
    # Only anchors are chosen by a table, and they want the plain one: that of a trained compressor knows of answers.
    table = None if queries == "anchor" else task.compressor.information
    return Compressor(task.compressor.llm, config, information=table)


def inside() -> list[Baseline]:
    """All of them; text and no passages first, since the others are compared with them."""
    return [
        Evaluated("none", "no passages", "none"),
        Evaluated("text", "text", "text"),
        Evaluated("concepts", "concepts (ours)", "concepts"),
        Truncation(),
        Pruning(),
        Evaluated("anchors", "pruning to our anchors", "pruned"),
        Mean(),
    ]
