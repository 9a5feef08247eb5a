"""Training a compressor: the frozen LLM reads text on one side and concepts on the other, and both should agree."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compllm_rag.compression.compressor import Compressor, batches
from compllm_rag.compression.pretrained import save_compressor
from compllm_rag.compression.rates import concepts_at, max_rate
from compllm_rag.config import Narrowing
from compllm_rag.errors import ConfigurationError
from compllm_rag.training.examples import Example, pack, positions_of, targets_of, weight_of
from compllm_rag.training.job_options import CompressorOptions, ObjectiveConfig, RatesConfig
from compllm_rag.training.live_reader import LiveReader
from compllm_rag.training.material import Material
from compllm_rag.training.objective import (
    Loss,
    distillation_loss,
    hidden_states,
    last_hidden_state,
    nll_by_kind,
)
from compllm_rag.training.run_config import Progress, RunConfig
from compllm_rag.training.standardised import plain_head, standardise

# Positions of one compressing forward under gradient.
_SEGMENT_POSITIONS = 4096
# Below this many nats between no passages and text there is nothing to recover (docs/design.md section 7).
_LEAST_GAIN = 0.3
# Examples that are drawn until one counts; a mix of which hardly any does is refused.
_TRIES = 200
_DEFAULT = CompressorOptions()


@dataclass(frozen=True)
class Drawn:
    """An example and the K of each of its segments; `ks` is None where it is read as text.

    `narrowing` is of deep concepts: from which layer on but a share of them is read.
    """

    example: Example
    ks: list[list[int]] | None
    narrowing: Narrowing | None = None


class _Trained(nn.Module):
    """What has parameters, under stable names; the forward is the whole loss, as data-parallel runs need it."""

    def __init__(self, compressor: Compressor, objective: ObjectiveConfig, live: LiveReader | None) -> None:
        super().__init__()
        self.decoder, self.head = compressor.decoder, compressor.head
        self.target = live.decoder if live else None
        self.__dict__["compressor"], self.__dict__["objective"], self.__dict__["live"] = compressor, objective, live

    def forward(self, items: Sequence[Drawn]) -> Loss:
        compressor: Compressor = self.__dict__["compressor"]
        objective: ObjectiveConfig = self.__dict__["objective"]
        llm, examples = compressor.llm, [item.example for item in items]
        targets = targets_of(examples, prompt_weight=objective.prompt, kind_weights=objective.kinds, device=llm.device)
        live: LiveReader | None = self.__dict__["live"]
        text = pack(examples, llm)
        with torch.no_grad(), live.off() if live else nullcontext():
            teacher = hidden_states(llm, text)
        as_text = items[0].ks is None
        student = hidden_states(llm, text if as_text else pack(examples, llm, concepts_of(compressor, items)))
        return distillation_loss(llm, teacher, student, targets, objective)


class CompressorTask:
    """Trains LoRA and head of a compressor against its own target LLM (CompLLM, section 3).

    Args:
        compressor: With LoRA (`lora_rank` above 0); its weights are changed in place.
        material: Examples, cut by the compressor's own segmenter.
        objective: What counts.
        rates: At which rates.
        validation: Held-out groups of questions to look at.
        validation_rates: At which rates to look.
        live: A reader to be trained along.
        text_share: Share of batches that a live reader reads as text, so that it goes on reading text.
    """

    name = "compressor"

    def __init__(
        self,
        compressor: Compressor,
        material: Material,
        objective: ObjectiveConfig | None = None,
        rates: RatesConfig | None = None,
        *,
        validation: int = _DEFAULT.validation,
        validation_rates: Sequence[float] = (2.0, 4.0),
        live: LiveReader | None = None,
        text_share: float = _DEFAULT.text_share,
    ) -> None:
        self.compressor, self.material = compressor, material
        self.live, self.text_share = live, text_share if live else 0.0
        self.rates, self.objective = rates or RatesConfig(), objective or ObjectiveConfig()
        if live:
            live.join(compressor)
        standardise(compressor, *self._some_segments())
        trainable(compressor, live)
        self.module: nn.Module = _Trained(compressor, self.objective, live)
        self.validation_rates = [r for r in validation_rates if r <= max_rate(compressor.config.segment_length)]
        self.validation = material.looked_at(validation)
        self._fixed: dict[str, float] = {}
        self._begun: float | None = None

    def _some_segments(self) -> tuple[list[tuple[int, ...]], list[int]]:
        """A few hundred segments with their K, the same whenever the run is started again."""
        rng = random.Random(0)
        segments: list[tuple[int, ...]] = []
        while len(segments) < 400:
            segments += [segment for body in self.material.draw(rng).bodies for segment in body.segments]
        segments = segments[:400]
        return segments, [concepts_at(2.0, len(segment)) for segment in segments]

    def parameter_groups(self, config: RunConfig) -> list[dict[str, Any]]:
        """LoRA, head, and the live reader if there is one."""
        shared = {id(p) for p in (self.live.parameters() if self.live else ())}
        lora = [p for name, p in self.compressor.decoder.named_parameters() if ".lora_" in name and id(p) not in shared]
        head = list(self.compressor.head.parameters())
        groups = [{"params": lora, "times": 1.0}, {"params": head, "times": config.head_lr}]
        return [*groups, {"params": self.live.parameters(), "times": 1.0}] if self.live else groups

    def draw(self, rng: random.Random) -> Drawn:
        """One example with its rates.

        Raises:
            ConfigurationError: All that the mix has counts nothing.
        """
        example = next((e for e in (self.material.draw(rng) for _ in range(_TRIES)) if self._weight(e) > 0), None)
        if example is None:  # such as a share of questions of 0, and no weight for copying and continuing texts
            raise ConfigurationError(
                "nothing of the training mix counts",
                got=f"--qa {self.material.config.qa:g}, {self.objective.kinds}",
                expected="questions, or a weight above 0 for a kind of text that is drawn",
                next_step="raise --qa, --copy-branches or --continue-branches",
            )
        if rng.random() < self.text_share:
            return Drawn(example, None)
        return Drawn(example, self.rates.draw(example, rng, self.compressor.config.segment_length))

    def size(self, item: Drawn) -> int:
        """Positions the teacher reads."""
        return positions_of(item.example)

    def loss(self, module: nn.Module, items: Sequence[Drawn]) -> Loss:
        """Loss of one forward; examples read as text and as concepts are kept apart."""
        loss: Loss = module(items)
        return loss

    def weight(self, item: Drawn) -> float:
        """Its branches, by what their kinds count."""
        return self._weight(item.example)

    def _weight(self, example: Example) -> float:
        return weight_of(example, self.objective.kinds)

    def alike(self, item: Drawn) -> bool:
        """Examples that may share a forward."""
        return item.ks is None

    @torch.no_grad()
    def validate(self, progress: Progress) -> dict[str, float]:
        """Recovered (docs/design.md section 7) by concepts and by pruning on held-out rows, in percent."""
        if not self._fixed or self.live:
            self._fixed = self.untrained()
        found = dict(self._fixed)
        for rate in self.validation_rates:
            found |= self._look(rate, pruned=False)
        # The likelihood, not recovered: that would reward a reader that reads text worse, and may be undefined.
        if self._begun is None:  # what text gave before the reader was trained, also where a run goes on
            with self.live.off() if self.live else nullcontext():
                self._begun = self._nll(self.validation, None)
        mean = sum(found[f"nll_concepts@{rate:g}"] for rate in self.validation_rates) / len(self.validation_rates)
        found["score"] = -mean - max(0.0, found["nll_text"] - self._begun)
        return found

    @torch.no_grad()
    def untrained(self) -> dict[str, float]:
        """What needs no compressor: text, no passages, and pruning to the anchors."""
        bare = [Example((e.prefix[0],), e.branches) for e in self.validation]
        self._fixed = {"nll_text": self._nll(self.validation, None), "nll_none": self._nll(bare, None)}
        for rate in self.validation_rates:
            self._fixed |= self._look(rate, pruned=True)
        return dict(self._fixed)

    def _look(self, rate: float, *, pruned: bool) -> dict[str, float]:
        name = f"{'pruned' if pruned else 'concepts'}@{rate:g}"
        nll = self._nll(self.validation, rate, pruned=pruned)
        gain = self._fixed["nll_none"] - self._fixed["nll_text"]
        found = {f"nll_{name}": nll}
        return found | {name: 100 * (self._fixed["nll_none"] - nll) / gain} if gain >= _LEAST_GAIN else found

    def _nll(self, examples: Sequence[Example], rate: float | None, *, pruned: bool = False) -> float:
        total, tokens = 0.0, 0
        llm = self.compressor.llm
        for begin in range(0, len(examples), 4):
            some = examples[begin : begin + 4]
            targets = targets_of(some, prompt_weight=0.0, kind_weights={}, device=llm.device)
            concepts = None
            if rate is not None:
                items = [
                    Drawn(e, [[concepts_at(rate, len(s)) for s in body.segments] for body in e.bodies]) for e in some
                ]
                concepts = pruned_of(self.compressor, items) if pruned else concepts_of(self.compressor, items)
            found = nll_by_kind(llm, last_hidden_state(llm, pack(some, llm, concepts)), targets)
            total += found["qa"][0]
            tokens += found["qa"][1]
        return total / max(1, tokens)

    def export(self, folder: Path) -> None:
        """Write the compressor as `Compressor.from_pretrained` reads it, and the reader that was trained along."""
        with plain_head(self.compressor):
            if self.live:
                self.live.export(folder, self.compressor)
            else:
                save_compressor(self.compressor, folder)
        self.compressor.refresh_fingerprint()


def trainable(compressor: Compressor, live: LiveReader | None = None) -> None:
    """Let gradients into LoRA and head, and nowhere else."""
    for tree in (compressor.decoder, *([live.decoder] if live else [])):
        for name, parameter in tree.named_parameters():
            parameter.requires_grad_(".lora_" in name)
    compressor.head.requires_grad_(True)


def concepts_of(compressor: Compressor, items: Sequence[Drawn]) -> list[list[torch.Tensor]]:
    """Concepts (n_concepts, hidden_size) of every passage of every example, with gradient."""
    flat = [
        (segment, k)
        for item in items
        for body, ks in zip(item.example.bodies, item.ks or (), strict=True)
        for segment, k in zip(body.segments, ks, strict=True)
    ]
    window = sorted(((i, s, k) for i, (s, k) in enumerate(flat)), key=lambda item: (len(item[1]), item[2]))
    made: dict[int, torch.Tensor] = {}
    for batch in batches(window, _SEGMENT_POSITIONS, mixed=64):
        rows = compressor.concepts_with_grad([s for _, s, _ in batch], [k for _, _, k in batch])
        made |= {i: row[:k] for (i, _, k), row in zip(batch, rows, strict=True)}
    return _regroup(items, [made[i] for i in range(len(flat))])


def pruned_of(compressor: Compressor, items: Sequence[Drawn]) -> list[list[torch.Tensor]]:
    """The anchors' own embeddings: hard pruning at the same K."""
    flat = []
    for item in items:
        for body, ks in zip(item.example.bodies, item.ks or (), strict=True):
            for segment, k in zip(body.segments, ks, strict=True):
                flat.append(compressor.llm.embed([segment[i] for i in compressor.anchors(segment, k)]).float())
    return _regroup(items, flat)


def _regroup(items: Sequence[Drawn], flat: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    out, at = [], 0
    for item in items:
        bodies = []
        for body in item.example.bodies:
            bodies.append(torch.cat(list(flat[at : at + len(body.segments)])))
            at += len(body.segments)
        out.append(bodies)
    return out
