"""Rivals that need nothing but the target LLM: text, truncation, pruning, means of embeddings, and concepts (ours).

Beside deep concepts stand those at random places, and CompLLM's at the input embeddings by the compressor that ships.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.rivals.base import Baseline, Body, LeftOutError, Outcome, Task, ask_made, ask_with, mean_positions
from benchmarks.rivals.sentences import Bm25Sentences
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.loading import load_compressor, shipped_adapter
from compllm_rag.compression.rates import FixedRate
from compllm_rag.config import CompressorConfig
from compllm_rag.errors import FingerprintMismatchError
from compllm_rag.evaluation.bodies import Setting

_LONGEST_SEGMENT = 512


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
    """A compressor without training gives what it starts from: the anchors' embeddings, or means.

    Anchors are chosen by the plain table of information: that of a trained compressor knows of answers.
    """
    longest = task.compressor.config.longest_unit
    if longest > _LONGEST_SEGMENT:
        raise LeftOutError(
            "units are too long to be segments", got=longest, expected=f"unit_length of at most {_LONGEST_SEGMENT}"
        )
    config = CompressorConfig(segment_length=longest, unit_length=max(240, longest), layers=1, queries=queries)
    return Compressor(task.compressor.llm, config)


@dataclass
class InputConcepts(Baseline):
    """CompLLM's concepts at the input embeddings, of segments, by the compressor that ships for the LLM."""

    def settings(self) -> dict[str, Any]:
        """The codec."""
        return {"codec": "input"}

    def ask(self, task: Task, rate: float) -> Outcome:
        """See `Baseline.ask`."""
        folder = shipped_adapter(task.llm, "compressor")
        if folder is None:
            raise LeftOutError("no compressor of input concepts ships for this LLM", got=task.llm)
        try:
            made = load_compressor(folder, task.compressor.llm)
        except FingerprintMismatchError as error:
            raise LeftOutError("the compressor that ships is for another reader", got=str(error.got)) from error
        policy, begun = FixedRate(rate, made.config.longest_unit), time.perf_counter()
        bodies: dict[str, Body] = {}
        for text in task.texts:
            units = made.spec.units(text)
            bodies[text] = torch.cat(made.compress(units, policy.n_concepts(units)))
        seconds = time.perf_counter() - begun
        records = ask_with(task, Setting("text"), bodies)
        return Outcome(records, mean_positions(records), seconds)


def inside(*, deep: bool = False) -> list[Baseline]:
    """All of them; text and no passages first, since the others are compared with them.

    Args:
        deep: Ours are deep concepts; what can be compared with them alone is among them.
    """
    beside: list[Baseline] = [
        Evaluated("random", "deep concepts at random places", ours=True, mode="random"),
        InputConcepts("input_concepts", "concepts at the input embeddings"),
    ]
    return [
        Evaluated("none", "no passages", False, mode="none"),
        Evaluated("text", "text", False, mode="text"),
        Evaluated("concepts", "concepts (ours)", ours=True, mode="concepts"),
        *(beside if deep else []),
        Made("truncation", "truncation", maker=_truncation),
        Made("pruning", "pruning by information", maker=_pruning, given={"information": "unigrams"}),
        Evaluated("anchors", "pruning to our anchors", mode="pruned"),
        Made("mean", "mean of embeddings", maker=_mean),
        Bm25Sentences(),
    ]
