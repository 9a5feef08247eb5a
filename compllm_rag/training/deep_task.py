"""Training deep concepts: the LLM answers from concepts as it does from text.

Two LoRA adapters learn, one below the entry layer that writes concepts and one from it on that reads them; or the one
that writes alone. The teacher is the same LLM with neither, reading the same prompt as text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.rates import FixedRate
from compllm_rag.config import Narrowing
from compllm_rag.errors import ConfigurationError
from compllm_rag.models.narrowing import NarrowedHalves
from compllm_rag.prompt import ConceptSpan
from compllm_rag.training.compressor_task import Drawn
from compllm_rag.training.examples import Body, Example, pack, pack_deep, positions_of, targets_of, weight_of
from compllm_rag.training.job_options import DeepOptions, ObjectiveConfig
from compllm_rag.training.material import Material
from compllm_rag.training.narrowed import narrowed_states, one_question
from compllm_rag.training.objective import Loss, distillation_loss, last_hidden_state, nll_by_kind
from compllm_rag.training.run_config import Progress, RunConfig

# Below this many nats between no passages and text there is nothing to recover (docs/design.md section 7).
_LEAST_GAIN = 0.3
_DEFAULT = DeepOptions()
# The LLM's parts for each way of narrowing.
Parts = Mapping[Narrowing, NarrowedHalves]
# Hidden states (n_predictions, hidden_size) after the final norm, of examples read in one way or another.
_Read = Callable[[Sequence[Drawn]], torch.Tensor]


class _Trained(nn.Module):
    """Both halves with their LoRA; the forward is the whole loss, as data-parallel runs need it."""

    def __init__(self, compressor: DeepCompressor, objective: ObjectiveConfig, parts: Parts) -> None:
        super().__init__()
        self.decoder, self.upper, self.lower = compressor.decoder, compressor.halves.upper, compressor.halves.lower
        self.marker = compressor.marker
        self.__dict__["compressor"], self.__dict__["objective"], self.__dict__["parts"] = compressor, objective, parts

    def forward(self, items: Sequence[Drawn]) -> Loss:
        compressor: DeepCompressor = self.__dict__["compressor"]
        llm, examples = compressor.llm, [item.example for item in items]
        targets = targets_of(examples, prompt_weight=0.0, kind_weights={}, device=llm.device)
        with torch.no_grad():
            teacher = last_hidden_state(llm, pack(examples, llm))[targets.is_answer]
        student = read_concepts(compressor, items, self.__dict__["parts"])[targets.is_answer]
        return distillation_loss(llm, [teacher], [student], targets.answers(), self.__dict__["objective"])


class DeepTask:
    """Trains the LoRA adapters of a compressor of deep concepts against its own target LLM.

    Args:
        compressor: With a LoRA that writes (`lora_rank` above 0) and, unless the upper half stays frozen, one that
            reads; their weights are changed in place.
        material: Examples, cut into the compressor's units.
        rates: Each example draws one, so that one compressor serves them all.
        kl: Weight of the KL divergence from the LLM that reads text; the cross-entropy of the gold answers counts 1.
        validation: Held-out groups of questions to look at.
        validation_rates: At which rates to look.
        narrowings: Ways in which prompts are narrowed (`models.narrowing`); an example that is draws one.
        narrowed: Share of examples that are.

    Raises:
        ConfigurationError: There is no LoRA to train, a rate makes no sense, or the LLM cannot be narrowed like that.
        RateOutOfReachError: Units are too short for a rate.
    """

    name = "deep"

    def __init__(
        self,
        compressor: DeepCompressor,
        material: Material,
        *,
        rates: Sequence[float] = _DEFAULT.rates,
        kl: float = _DEFAULT.kl,
        validation: int = _DEFAULT.validation,
        validation_rates: Sequence[float] = (1.0, 2.0),
        narrowings: Sequence[Narrowing] = (),
        narrowed: float = _DEFAULT.narrowed,
    ) -> None:
        config = compressor.config
        if not config.lora_rank:
            raise ConfigurationError(
                "compressor has nothing to train",
                got="lora_rank 0",
                expected="a LoRA rank of at least 1",
                next_step="set --rank",
            )
        self.compressor, self.material = compressor, material
        self.policies = [FixedRate(rate, config.unit_length) for rate in rates]
        # Trees over the same LoRA; made before it is said what of it learns.
        self.parts = {each: NarrowedHalves(compressor.halves, each) for each in narrowings}
        self.narrowed = narrowed if narrowings else 0.0
        objective = ObjectiveConfig(hidden=0.0, kl=kl, ce=1.0, prompt=0.0)
        self.module: nn.Module = _Trained(compressor, objective, self.parts)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(".lora_" in name or name == "marker")
        # The LLM reading its own states, which training has to beat; it shares all tensors.
        plain = config.model_copy(update={"lora_rank": 0, "read_rank": 0, "prompt_rank": 0, "marked": False})
        tables = {"information": compressor.information, "selector": compressor.selector}
        self._untrained = DeepCompressor(compressor.llm, plain, **tables)
        self.validation_rates = list(validation_rates)
        self.validation = material.looked_at(validation)
        self._fixed: dict[str, float] = {}

    def parameter_groups(self, config: RunConfig) -> list[dict[str, Any]]:
        """Every LoRA, and the marker."""
        return [{"params": [p for p in self.module.parameters() if p.requires_grad], "times": 1.0}]

    def draw(self, rng: random.Random) -> Drawn:
        """One example with its rate; a narrowed one asks one question."""
        example, policy = self.material.draw(rng), rng.choice(self.policies)
        if not self.narrowed or rng.random() >= self.narrowed:
            return drawn_at(example, policy)
        example = one_question(example, rng.randrange(len(example.branches)))
        return replace(drawn_at(example, policy), narrowing=rng.choice(list(self.parts)))

    def size(self, item: Drawn) -> int:
        """Positions the teacher reads."""
        return positions_of(item.example)

    def weight(self, item: Drawn) -> float:
        """Its branches."""
        return weight_of(item.example, {})

    def alike(self, item: Drawn) -> str:
        """Examples that are narrowed alike may share a forward."""
        return str(item.narrowing or "")

    def loss(self, module: nn.Module, items: Sequence[Drawn]) -> Loss:
        """Loss of one forward."""
        loss: Loss = module(items)
        return loss

    @torch.no_grad()
    def validate(self, progress: Progress) -> dict[str, float]:
        """Recovered (docs/design.md section 7) on held-out rows, in percent, at each rate of `validation_rates`.

        `concepts` by these weights, `narrowed` the same narrowed in each way that is trained, `untrained` without
        either LoRA, `pruned` by the same tokens read as text.
        """
        if not self._fixed:
            self._fixed = self._without_training()
        found = dict(self._fixed)
        for rate in self.validation_rates:
            found |= self._look("concepts", rate, lambda items: read_concepts(self.compressor, items))
        names = [f"nll_concepts@{rate:g}" for rate in self.validation_rates]
        for narrowing in self.parts:
            for rate in self.validation_rates:
                found |= self._look(f"narrowed {narrowing}", rate, partial(self._read_narrowed, narrowing))
                names.append(f"nll_narrowed {narrowing}@{rate:g}")
        nlls = [found[name] for name in names]
        return found | {"score": -sum(nlls) / len(nlls)}

    def _without_training(self) -> dict[str, float]:
        """What does not depend on the LoRA: text, no passages, untrained concepts, pruning."""
        bare = [Example((e.prefix[0],), e.branches) for e in self.validation]
        self._fixed = {
            "nll_text": self._nll(self._drawn(1.0), self._read_text),
            "nll_none": self._nll([Drawn(e, None) for e in bare], self._read_text),
        }
        for rate in self.validation_rates:
            self._fixed |= self._look("untrained", rate, lambda items: read_concepts(self._untrained, items))
            self._fixed |= self._look("pruned", rate, lambda items: self._read_text(pruned_of(self.compressor, items)))
        return self._fixed

    def _look(self, name: str, rate: float, read: _Read) -> dict[str, float]:
        nll = self._nll(self._drawn(rate), read)
        gain = self._fixed["nll_none"] - self._fixed["nll_text"]
        found = {f"nll_{name}@{rate:g}": nll}
        recovered = {f"{name}@{rate:g}": 100 * (self._fixed["nll_none"] - nll) / gain} if gain >= _LEAST_GAIN else {}
        return found | recovered

    def _drawn(self, rate: float) -> list[Drawn]:
        policy = FixedRate(rate, self.compressor.config.unit_length)
        return [drawn_at(example, policy) for example in self.validation]

    def _read_text(self, items: Sequence[Drawn]) -> torch.Tensor:
        llm = self.compressor.llm
        return last_hidden_state(llm, pack([item.example for item in items], llm))

    def _read_narrowed(self, narrowing: Narrowing, items: Sequence[Drawn]) -> torch.Tensor:
        """Every branch of every example for itself, in the order in which all of them have predictions."""
        each = [
            replace(item, example=one_question(item.example, number), narrowing=narrowing)
            for item in items
            for number in range(len(item.example.branches))
        ]
        return read_concepts(self.compressor, each, self.parts)

    def _nll(self, items: Sequence[Drawn], read: _Read) -> float:
        """Negative log-likelihood of the gold answers, nats per token."""
        total, tokens, llm = 0.0, 0, self.compressor.llm
        for begin in range(0, len(items), 4):
            some = items[begin : begin + 4]
            targets = targets_of([i.example for i in some], prompt_weight=0.0, kind_weights={}, device=llm.device)
            nll, n = nll_by_kind(llm, read(some), targets)["qa"]
            total, tokens = total + nll, tokens + n
        return total / max(1, tokens)

    def export(self, folder: Path) -> None:
        """Write the compressor as `load_compressor` reads it."""
        self.compressor.save_pretrained(folder)


def drawn_at(example: Example, policy: FixedRate) -> Drawn:
    """An example at one rate."""
    return Drawn(example, [policy.n_concepts(body.segments) for body in example.bodies])


def read_concepts(compressor: DeepCompressor, items: Sequence[Drawn], parts: Parts | None = None) -> torch.Tensor:
    """Hidden states (n_predictions, hidden_size) after the final norm, of the LLM that reads concepts.

    Args:
        compressor: Makes the concepts.
        items: At least one; all of them narrowed alike, or none.
        parts: The LLM's parts for each way of narrowing.
    """
    examples, halves, narrowing = [item.example for item in items], compressor.halves, items[0].narrowing
    concepts = concepts_of(compressor, items)
    if parts and narrowing is not None:
        return narrowed_states(parts[narrowing], examples, concepts)
    return last_hidden_state(compressor.llm, pack_deep(examples, halves, concepts), halves.upper)


def concepts_of(compressor: DeepCompressor, items: Sequence[Drawn]) -> list[list[ConceptSpan]]:
    """Deep concepts of every passage of every example, with gradient."""
    units = [unit for item in items for body in item.example.bodies for unit in body.segments]
    chosen = _kept(compressor, items)
    places = [own for bodies in chosen for kept in bodies for own in kept]
    hidden = iter(compressor.states_with_grad(units, places))  # (most tokens of a unit, hidden_size) each
    out = []
    for item, bodies in zip(items, chosen, strict=True):
        spans = []
        for number, (body, kept) in enumerate(zip(item.example.bodies, bodies, strict=True)):
            # (n_concepts, hidden_size) and (n_concepts,) of one passage
            states = torch.cat([next(hidden)[places] for places in kept])
            spans.append(ConceptSpan(states, number, torch.tensor(_within(body, kept)), len(body)))
        out.append(spans)
    return out


def pruned_of(compressor: DeepCompressor, items: Sequence[Drawn]) -> list[Drawn]:
    """The same examples with nothing but the tokens that concepts stand for: hard pruning at the same K."""
    out = []
    for item, bodies in zip(items, _kept(compressor, items), strict=True):
        cut = iter(
            Body((tuple(body.ids[place] for place in _within(body, kept)),))
            for body, kept in zip(item.example.bodies, bodies, strict=True)
        )
        prefix = tuple(next(cut) if isinstance(part, Body) else part for part in item.example.prefix)
        out.append(Drawn(Example(prefix, item.example.branches), None))
    return out


def _kept(compressor: DeepCompressor, items: Sequence[Drawn]) -> list[list[list[list[int]]]]:
    """The places kept of each unit of each passage of each example."""
    pairs = [
        (unit, k)
        for item in items
        for body, ks in zip(item.example.bodies, item.ks or (), strict=True)
        for unit, k in zip(body.segments, ks, strict=True)
    ]
    kept = iter(compressor.kept_places([unit for unit, _ in pairs], [k for _, k in pairs]))
    return [[[next(kept) for _ in body.segments] for body in item.example.bodies] for item in items]


def _within(body: Body, kept: Sequence[Sequence[int]]) -> list[int]:
    """The places kept of each unit, counted within the whole passage."""
    out: list[int] = []
    begin = 0
    for unit, places in zip(body.segments, kept, strict=True):
        out += [begin + place for place in places]
        begin += len(unit)
    return out
