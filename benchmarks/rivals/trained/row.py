"""What every row of `bench alike` is: something that turns passages into what the LLM reads, and can be trained.

A row reads training examples (`read`), so that one loop trains them all, and lays out passages of a question
(`spans`), so that one evaluation asks them all. What they start from is the same: LLM, reader, data, ranks of LoRA.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.rivals.trained.asking import row_asker
from benchmarks.rivals.trained.encoder import TokenEncoder
from compllm_rag.compression.information import information_for
from compllm_rag.compression.rates import FixedRate, concepts_at
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Segmented
from compllm_rag.models.adapters import inject_lora
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import ConceptSpan, QAPrompt, Span, TextSpan
from compllm_rag.training.examples import Body, Example, pack, pack_deep, targets_of
from compllm_rag.training.importance import answer_odds
from compllm_rag.training.job_options import DEEP_DATA, LINEARS, ObjectiveConfig
from compllm_rag.training.material import Material
from compllm_rag.training.objective import Loss, distillation_loss, hidden_states, last_hidden_state

# Most tokens of a chunk, and of a segment as CompLLM cuts them (its section 3).
UNIT, SEGMENT = 240, 20
_ANSWER_WEIGHT = 2.0  # as of `train deep`
Objective = Literal["answers", "hidden", "both ways"]
# Cross-entropy of the gold answers and KL to the LLM that reads text; or CompLLM's own distance of hidden states.
_ANSWERS = ObjectiveConfig(hidden=0.0, kl=1.0, ce=1.0, prompt=0.0)
_HIDDEN = ObjectiveConfig(hidden=1.0, kl=0.0, ce=0.0, prompt=0.0)


@dataclass(frozen=True)
class Setup:
    """What all rows share.

    Attributes:
        llm: The target LLM, reader merged, frozen.
        data_dir: Holds `train/*.jsonl(.gz)` with questions.
        entry_layer: L of the rows whose concepts enter above the input embeddings.
        rank: Of every LoRA; its alpha is twice that.
        embedder: Name of the retrieval embedder.
    """

    llm: TargetLLM
    data_dir: Path
    entry_layer: int
    rank: int
    embedder: str

    @functools.cached_property
    def segmenter(self) -> Segmenter:
        """Cuts texts into segments."""
        return Segmenter(self.llm.tokenizer, SEGMENT)

    @functools.cached_property
    def units(self) -> Material:
        """Training examples whose passages are cut into chunks."""
        return self._material(UNIT)

    @functools.cached_property
    def segments(self) -> Material:
        """The same examples with passages cut into segments."""
        return self._material(None)

    def _material(self, unit_length: int | None) -> Material:
        questions, _ = Material.files_of(self.data_dir)
        return Material(questions, [], self.segmenter, DEEP_DATA.material, unit_length=unit_length)

    @functools.cached_property
    def encoder(self) -> TokenEncoder:
        """The retrieval embedder, token by token."""
        return TokenEncoder(self.embedder, self.llm.tokenizer)

    @functools.cached_property
    def opening(self) -> tuple[int, ...]:
        """What stands in front of the first passage of every prompt."""
        return QAPrompt(self.llm.tokenizer).opening.ids

    @functools.cached_property
    def information(self) -> torch.Tensor:
        """How much each token is worth keeping, (vocab_size,), as in `train deep`."""
        table = information_for(self.llm.tokenizer)
        return table + _ANSWER_WEIGHT * answer_odds(self.units, table.numel())

    def lora(self, tree: Any) -> Any:
        """Put live LoRA layers into a module tree of a row's own; returns it."""
        inject_lora(tree, rank=self.rank, alpha=2 * self.rank, modules=LINEARS)
        return tree


@dataclass(frozen=True)
class Cost:
    """What one token of a passage costs at query time, a token of text being 1, and in the store.

    Attributes:
        positions: Prompt positions.
        prefill: Layers that its positions pass.
        kv: Keys and values that an answer attends to.
        stored: Numbers kept in a store.
    """

    positions: float
    prefill: float
    kv: float
    stored: float


class Row:
    """One way to compress passages.

    Args:
        setup: What all rows share.
        rate: Source tokens per position.

    Attributes:
        objective: What it learns by: `answers`, as ours does; `hidden`, CompLLM's; `both ways`, KV-Distill's.
        cut: What its passages are cut into.
        lr: Peak learning rate of all it learns, where what the schedule says for LoRA and heads makes no sense for it.
        module: Holds what is learned.
        halves: The LLM in two halves, where concepts enter above the input embeddings.
    """

    objective: Objective = "answers"
    cut: Literal["units", "segments"] = "units"
    lr: float | None = None

    def __init__(self, setup: Setup, rate: float) -> None:
        self.setup, self.llm, self.rate = setup, setup.llm, rate
        self.halves: Halves | None = None
        self.module: nn.Module = nn.Module()
        self._policy = FixedRate(rate, UNIT if self.cut == "units" else SEGMENT)

    @property
    def material(self) -> Material:
        """Training examples, cut as this row reads them."""
        return self.setup.units if self.cut == "units" else self.setup.segments

    def learned(self) -> dict[str, nn.Parameter]:
        """Its parameters by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def counts(self, body: Body) -> list[int]:
        """Positions of each unit or segment of a passage."""
        return self._policy.n_concepts(body.segments)

    def concepts(self, examples: Sequence[Example]) -> list[list[Any]]:
        """What stands for every passage of every example, with gradient.

        Returns:
            A tensor (n_concepts, hidden_size) each, a span of deep concepts, or one of text.
        """
        raise NotImplementedError

    def read(self, examples: Sequence[Example], *, every_layer: bool = False) -> list[torch.Tensor]:
        """The frozen LLM over examples with passages compressed.

        Returns:
            Hidden states (n_predictions, hidden_size) after the final norm, or behind every layer that read concepts.
        """
        concepts, upper = self.concepts(examples), None
        if self.halves is None:
            packed = pack(examples, self.llm, concepts)
        else:
            packed, upper = pack_deep(examples, self.halves, concepts), self.halves.upper
        if every_layer:
            return hidden_states(self.llm, packed, upper)
        return [last_hidden_state(self.llm, packed, upper)]

    def loss(self, examples: Sequence[Example]) -> Loss:
        """The loss of a few examples."""
        llm, every = self.llm, self.objective == "hidden"
        targets = targets_of(examples, prompt_weight=0.0, kind_weights={}, device=llm.device)
        with torch.no_grad():
            text = pack(examples, llm)
            teacher = hidden_states(llm, text) if every else [last_hidden_state(llm, text)]
        student = self.read(examples, every_layer=every)
        return distillation_loss(llm, teacher[-len(student) :], student, targets, _HIDDEN if every else _ANSWERS)

    @torch.no_grad()
    def spans(self, text: str, passage: int) -> list[Span]:
        """What stands for a passage in the prompt of a question."""
        body = self.material.body(text)
        [[made]] = self.concepts([Example((TextSpan(self.setup.opening), body), ())])
        if isinstance(made, torch.Tensor):
            return [ConceptSpan(made, passage)]
        return [ConceptSpan(made.concepts, passage, made.places, made.n_tokens)]

    def size(self, text: str) -> int:
        """Prompt positions of a passage."""
        return sum(self.counts(self.material.body(text)))

    def asker(self, compressor: ConceptCompressor, segmented: Segmented, generation: GenerationConfig) -> Asker:
        """Asks questions with passages as this row reads them; see `row_asker`."""
        return row_asker(self, compressor, segmented, generation)

    def cost(self, achieved_rate: float) -> Cost:
        """What a passage token costs, given source tokens per position."""
        depth, entry = self.llm.depth, self.halves.layer if self.halves else 0
        share = (depth - entry) / (depth * achieved_rate)
        return Cost(1 / achieved_rate, share, share, (self.llm.hidden_size + (entry > 0)) / achieved_rate)


class Projector(nn.Module):
    """Two linear layers with a GELU between them, and an output as large as what the LLM reads.

    Args:
        width: Of the input.
        hidden_size: Of the output.
        scale: Root mean square of the output, to begin with; it is learned.
    """

    def __init__(self, width: int, hidden_size: int, scale: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Of states (..., width), what the LLM reads in place of embeddings, (..., hidden_size)."""
        made: torch.Tensor = self.layers(states)
        return self.scale * F.rms_norm(made, (made.shape[-1],))


def pooling(n: int, k: int) -> torch.Tensor:
    """Weights (k, n) of means over k even runs of n states; where k is more than n, states are repeated."""
    if k > n:
        return F.one_hot(torch.arange(k) * n // k, n).float()
    run = F.one_hot(torch.arange(n) * k // n, k).float().T  # (k, n)
    return run / run.sum(1, keepdim=True)


def middles(n: int, k: int) -> list[int]:
    """The middle place of each of k even runs of n tokens, k at most n; increasing."""
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]


def joined(body: Body, counts: Sequence[int], states: Sequence[torch.Tensor], number: int) -> ConceptSpan:
    """Concepts of a passage's units, each at the middle of the tokens it stands for, as one span.

    Args:
        body: The passage.
        counts: K of each of its units.
        states: (K, hidden_size) of each.
        number: Of the passage.
    """
    places, begin = list[int](), 0
    for unit, k in zip(body.segments, counts, strict=True):
        places += [begin + place for place in middles(len(unit), k)]
        begin += len(unit)
    return ConceptSpan(torch.cat(list(states)), number, torch.tensor(places), len(body))


def most(rate: float, unit_length: int = UNIT) -> int:
    """Most concepts that a unit can have."""
    return concepts_at(rate, unit_length)
