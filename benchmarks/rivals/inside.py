"""Rivals that need nothing but the target LLM: text, truncation, pruning, means of embeddings, and concepts (ours)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.rivals.base import Baseline, Body, Outcome, Task, ask_made, ask_with, mean_positions
from compllm_rag.compression.compressor import Compressor
from compllm_rag.config import CompressorConfig
from compllm_rag.evaluation.bodies import Setting


@dataclass
class Evaluated(Baseline):
    """A mode of the evaluation: text, concepts, pruned (to the compressor's anchors) or none."""

    mode: str = "text"

    def settings(self) -> dict[str, Any]:
        """The mode."""
        return {"mode": self.mode}

    def ask(self, task: Task, rate: float) -> Outcome:
        """See `Baseline.ask`."""
        records = ask_with(task, Setting.of(self.mode, rate))
        return Outcome(records, mean_positions(records))


@dataclass
class Made(Baseline):
    """Passages of which something else is made.

    Attributes:
        maker: Of a task and a rate makes what makes the body of a passage.
        given: See `settings`.
    """

    maker: Callable[[Task, float], Callable[[str], Body]] = field(kw_only=True)
    given: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """As given."""
        return self.given

    def ask(self, task: Task, rate: float) -> Outcome:
        """See `Baseline.ask`."""
        return ask_made(task, self.maker(task, rate))


def _truncation(task: Task, rate: float) -> Callable[[str], Body]:
    """The first tokens of a passage."""

    def make(text: str) -> tuple[int, ...]:
        ids = [token for segment in task.segmented(text) for token in segment]
        return tuple(ids[: task.budget(text, rate)])

    return make


def _pruning(task: Task, rate: float) -> Callable[[str], Body]:
    """The tokens of each segment that are rarest in ordinary text: unigram information, no training at all."""
    plain = _untrained(task, "anchor")

    def make(text: str) -> tuple[int, ...]:
        pairs = zip(task.segmented(text), task.counts(text, rate), strict=True)
        return tuple(segment[i] for segment, k in pairs for i in plain.anchors(segment, k))

    return make


def _mean(task: Task, rate: float) -> Callable[[str], Body]:
    """Means of the embeddings (n, hidden_size) of neighbouring tokens, as many per segment as it has concepts."""
    pooling = _untrained(task, "mean")
    return lambda text: torch.cat(pooling.compress(task.segmented(text), task.counts(text, rate)))


def _untrained(task: Task, queries: Any) -> Compressor:
    """A compressor without training gives what it starts from: the anchors' embeddings, or means."""
    config = CompressorConfig(segment_length=task.compressor.config.segment_length, layers=1, queries=queries)
    # Only anchors are chosen by a table, and they want the plain one: that of a trained compressor knows of answers.
    table = None if queries == "anchor" else task.compressor.information
    return Compressor(task.compressor.llm, config, information=table)


def inside() -> list[Baseline]:
    """All of them; text and no passages first, since the others are compared with them."""
    return [
        Evaluated("none", "no passages", False, "none"),
        Evaluated("text", "text", False, "text"),
        Evaluated("concepts", "concepts (ours)", mode="concepts"),
        Made("truncation", "truncation", maker=_truncation),
        Made("pruning", "pruning by information", maker=_pruning, given={"information": "unigrams"}),
        Evaluated("anchors", "pruning to our anchors", mode="pruned"),
        Made("mean", "mean of embeddings", maker=_mean),
    ]
