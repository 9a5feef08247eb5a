"""Learning which tokens of a chunk deep concepts keep.

Above rate 1 only some tokens of a chunk become concepts. What a question will ask is not known when a chunk is
compressed, but what questions ask for is: names, numbers, dates, and the words around them. So two ridge regressions on
the LLM's own states in front of the entry layer, in closed form, tell from training questions

* whether a token belongs to a gold answer, and
* how much the loss of the gold answers depends on a concept: the size of its derivative by a bias on the concept's
  keys, the same in all layers that read, which is a gate that is a little open or shut.

The selector is the sum of both and of the tokens' information content, each in units of its standard deviation: one
vector, at the cost of one pass of the lower half without LoRA.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import AUTO
from compllm_rag.compression.rates import FixedRate
from compllm_rag.compression.selection import selector_features
from compllm_rag.errors import ConfigurationError
from compllm_rag.prompt import ConceptSpan
from compllm_rag.training.deep_source import deep_source
from compllm_rag.training.deep_task import concepts_of, drawn_at
from compllm_rag.training.entry_layer import at_entry_layer
from compllm_rag.training.examples import Example, pack_deep, targets_of
from compllm_rag.training.job_options import DEEP_DATA
from compllm_rag.training.material import Material
from compllm_rag.training.objective import answer_loss, last_hidden_state
from compllm_rag.training.run_config import Progress

# In counts of tokens; ten times more or less hardly changed which tokens of other training rows were kept.
_RIDGE = 1000.0
_LARGEST_GATE = 30.0


def train_selector(
    out: Path,
    data_dir: Path,
    init: str,
    llm: str,
    progress: Progress,
    *,
    reader: str = AUTO,
    other_reader: bool = False,
    entry_layer: int | None = None,
    n_groups: int = 1000,
    n_gates: int = 300,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Give a compressor of deep concepts a learned selector.

    Args:
        out: Where `load_compressor` will find it.
        data_dir: Holds `train/*.jsonl(.gz)` with questions.
        init: Folder of the compressor to start from; `auto` takes the shipped one, or an untrained one.
        llm: Its target LLM.
        progress: Called with a message and the share that is done.
        reader: Folder of the reader it was made with, "auto" for the shipped one, "none" for the LLM as it is.
        other_reader: It was made with another reader than that, and is to go on with this one.
        entry_layer: Move the concepts to this layer, see `at_entry_layer`; None leaves them where they are.
        n_groups: See `fit_selector`.
        n_gates: See `fit_selector`.
        seed: See `fit_selector`.
        dtype: Of the LLM.
        device: A torch device.

    Returns:
        What was done, as plain values.

    Raises:
        ConfigurationError: `init` is no compressor of deep concepts, it cannot be moved, or there is nothing to learn.
        DataFileError, EvaluationDataError: See `Material`.
        FingerprintMismatchError, UnknownModelError: See `load_compressor_for`.
    """
    questions, _ = Material.files_of(data_dir)
    compressor = deep_source(
        llm,
        init,
        reader,
        refusal="only deep concepts choose the tokens they keep by a selector",
        other_reader=other_reader,
        dtype=dtype,
        device=device,
        progress=progress,
    )
    if entry_layer is not None:
        compressor = at_entry_layer(compressor, entry_layer)
    unit_length = compressor.config.unit_length
    material = Material(questions, [], compressor.segmenter, DEEP_DATA.material, unit_length=unit_length)
    weights = fit_selector(compressor, material, n_groups=n_groups, n_gates=n_gates, seed=seed, progress=progress)
    made = with_selector(compressor, weights)
    made.save_pretrained(out)
    return {
        "out": str(out),
        "groups": min(n_groups, len(material.groups)),
        "fingerprint": made.fingerprint,
        "skipped": len(material.skipped),
    }


def fit_selector(
    compressor: DeepCompressor,
    material: Material,
    *,
    n_groups: int = 1000,
    n_gates: int = 300,
    seed: int = 0,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Weights of a learned selector, from training questions.

    Args:
        compressor: As it is; its LoRA counts for the derivatives alone.
        material: Questions with passages, cut into the compressor's units.
        n_groups: How many groups of questions that share their passages to learn from, at most.
        n_gates: From how many of these to learn by derivatives, which take a forward and a backward each; 0 leaves
            derivatives out.
        seed: Of the choice.
        progress: Called with a message and the share that is done.

    Returns:
        (hidden_size + 1,) float32, see `learned_scores`.

    Raises:
        ConfigurationError: No answer stands in any passage, so that there is nothing to learn.
    """
    rng, tokenizer, width = random.Random(seed), compressor.llm.tokenizer, compressor.hidden_size + 1
    groups = rng.sample(material.groups, min(n_groups, len(material.groups)))
    answers, gates = _Sums(width), _Sums(width)
    for done, group in enumerate(groups, 1):
        example = material.questions(group, rng, 0, extras=False)
        units = [unit for body in example.bodies for unit in body.segments]
        features = [
            selector_features(states, compressor.information[torch.tensor(unit, device=states.device)]).cpu()
            for unit, states in zip(units, compressor.plain_states(units), strict=True)
        ]  # (n_tokens, width) each
        golds = [question.answers[0] for question in group.questions]
        for unit, rows in zip(units, features, strict=True):
            answers.add(rows, answer_tokens(tokenizer, unit, golds))
        if done <= n_gates:
            gates.add(torch.cat(features), gate_sizes(compressor, example))
        if progress:
            progress(f"learning from {len(groups)} groups of questions", done / len(groups))
    if not answers.total:
        raise ConfigurationError(
            "no selector can be learned",
            got=f"{len(groups)} groups of questions, none with an answer that stands in its passage",
            expected="questions whose answers are words of their passages",
            next_step="give other questions with --data-dir",
        )
    found = answers.in_units(answers.regression())
    if gates.n:
        found += answers.in_units(gates.regression())
    found[-1] += 1 / float(answers.spread()[-1])
    return found.float()


def gate_sizes(compressor: DeepCompressor, example: Example) -> torch.Tensor:
    """How much the loss of the gold answers depends on each concept of an example at rate 1, passage by passage.

    Returns:
        (n_tokens,) float32, at least 0: the square root of the size of the derivative by the key bias of each concept,
        in shares of their mean and cut at 30 of them, since a few stand far above all others.
    """
    llm = compressor.llm
    item = drawn_at(example, FixedRate(1.0, compressor.config.unit_length))
    with torch.no_grad():
        spans = concepts_of(compressor, [item])
        packed = pack_deep([example], compressor.halves, spans)
    at, slots = 0, list[int]()
    for part in example.spans(spans[0]):
        if isinstance(part, ConceptSpan):
            slots += range(at, at + len(part))
        at += len(part)
    bias = torch.zeros(packed.inputs_embeds.shape[1], device=llm.device, requires_grad=True)  # (seq_len,)
    masks = packed.attention_mask
    gated = {k: _gated(m, bias, llm.dtype) for k, m in masks.items()} if isinstance(masks, dict) else None
    packed = replace(packed, attention_mask=gated or _gated(masks, bias, llm.dtype))
    targets = targets_of([example], prompt_weight=0.0, kind_weights={}, device=llm.device)
    with torch.enable_grad():
        loss = answer_loss(llm, last_hidden_state(llm, packed, compressor.halves.upper), targets)
        [slope] = torch.autograd.grad(loss, bias)
    sizes = slope[torch.tensor(slots, device=slope.device)].abs().float().cpu()  # (n_tokens,)
    return (sizes / sizes.mean().clamp_min(1e-12)).clamp_max(_LARGEST_GATE).sqrt()


def _gated(mask: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask (1, 1, seq_len, seq_len) that is added to the scores, with a bias for each key."""
    if mask.dtype == torch.bool:
        lowest = torch.finfo(dtype).min
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
    return mask + bias.to(dtype)


def with_selector(compressor: DeepCompressor, weights: torch.Tensor) -> DeepCompressor:
    """The same compressor, LoRA included, choosing tokens by a learned selector; its fingerprint is another one."""
    config = compressor.config.model_copy(update={"selector": "learned"})
    made = DeepCompressor(compressor.llm, config, information=compressor.information, selector=weights)
    made.take_lora(compressor)
    return made


class _Sums:
    """Sums over tokens, in float64, from which a regression follows; no state is kept."""

    def __init__(self, width: int) -> None:
        self.n, self.total = 0, 0.0
        self.first = torch.zeros(width, dtype=torch.float64)  # of features
        self.second = torch.zeros(width, width, dtype=torch.float64)  # of their products
        self.shared = torch.zeros(width, dtype=torch.float64)  # of feature times label

    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Add tokens: features (n_tokens, width), labels (n_tokens,)."""
        x, y = features.double(), labels.double()
        self.n += len(x)
        self.total += float(y.sum())
        self.first += x.sum(0)
        self.second += x.T @ x
        self.shared += x.T @ y

    def covariance(self) -> torch.Tensor:
        """Of the features, (width, width)."""
        mean = self.first / self.n  # (width,)
        return self.second / self.n - mean[:, None] * mean[None]

    def spread(self) -> torch.Tensor:
        """Standard deviation of each feature, (width,)."""
        return self.covariance().diagonal().clamp_min(0).sqrt() + 1e-3

    def regression(self) -> torch.Tensor:
        """Ridge on features in units of their spread; weights (width,) of the features as they are."""
        spread = self.spread()
        scaled = self.covariance() / (spread[:, None] * spread[None])
        wanted = (self.shared - self.first * (self.total / self.n)) / self.n / spread  # (width,)
        eye = torch.eye(len(spread), dtype=torch.float64)
        found: torch.Tensor = torch.linalg.solve(scaled + _RIDGE / self.n * eye, wanted)
        return found / spread

    def in_units(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights (width,) such that what they give has standard deviation 1 over these tokens."""
        return weights / (weights @ self.covariance() @ weights).clamp_min(1e-12).sqrt()


def answer_tokens(tokenizer: Any, unit: Sequence[int], answers: Iterable[str]) -> torch.Tensor:
    """Which tokens belong to an answer, wherever it stands as whole words.

    Args:
        tokenizer: A tokenizer of transformers.
        unit: Token ids.
        answers: Small or large letters are the same.

    Returns:
        (n_tokens,) float32, 0 or 1.
    """
    # Where each token ends is told by what is decoded up to it: alone, some tokenizers decode it without its blank.
    ends = [len(tokenizer.decode(list(unit[: i + 1]))) for i in range(len(unit))]
    text = tokenizer.decode(list(unit))
    found, begins = torch.zeros(len(unit)), [0, *ends[:-1]]
    for answer in {answer.strip() for answer in answers if len(answer.strip()) > 1}:
        for match in re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE):
            for i, (begin, end) in enumerate(zip(begins, ends, strict=True)):
                if begin < match.end() and end > match.start():
                    found[i] = 1
    return found
