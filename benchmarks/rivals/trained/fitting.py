"""One loop that trains every row for the same minutes of one CPU thread, and can be interrupted.

Time is that of the process's CPU while it trains, held-out looks left out: a machine that is busy with something else
takes nothing from a row. The learning rate rises over the first twentieth of the minutes and falls to nothing over all
of them, so that a row is done when they are over. All rows see the same examples in the same order, as far as they get.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rivals.trained.row import Row
from compllm_rag.errors import ConfigurationError, DivergedError
from compllm_rag.training.checkpoint import load_checkpoint, restore_moments, save_checkpoint
from compllm_rag.training.examples import Example, pack, positions_of, targets_of, weight_of
from compllm_rag.training.objective import last_hidden_state, nll_by_kind

# Below this many nats between no passages and text there is nothing to recover (docs/design.md section 7).
_LEAST_GAIN = 0.3
_SAVED_EVERY = 120.0  # seconds of training between two checkpoints


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and how carefully; the same for all rows.

    Attributes:
        minutes: Of one CPU thread.
        batch: Examples of a step.
        micro: Positions of one forward.
        lr: Peak learning rate of LoRA.
        other_lr: Of heads, projectors and slots, as a factor.
        looks: At held-out rows, evenly over the minutes, besides the one at the start.
        validation: Groups of held-out questions.
        clip: Largest norm of the gradient.
        seed: Of what is learned at the start, and of examples.
    """

    minutes: float
    batch: int = 4
    micro: int = 1024
    lr: float = 5e-4
    other_lr: float = 2.0
    looks: int = 8
    validation: int = 24
    clip: float = 1.0
    seed: int = 0

    def rate(self, seconds: float) -> float:
        """Learning rate as a share of the peak, after so many seconds of training."""
        share = seconds / (60 * self.minutes)
        return min(1.0, 0.02 + 20 * share) * max(0.02, 1 - share)


class HeldOut:
    """Questions on passages that nobody trains on, read as text, not at all, and by a row.

    Args:
        row: Decides what passages are cut into; the questions are the same for all.
        n: Groups of questions.
    """

    def __init__(self, row: Row, n: int) -> None:
        rng, material = random.Random(0), row.material
        groups = material.held_out or material.groups[:n]
        chosen = rng.sample(groups, min(n, len(groups)))
        self._row, self._examples = row, [material.questions(group, rng, 0, extras=False) for group in chosen]

    @torch.no_grad()
    def text(self) -> dict[str, float]:
        """Nats per token of the gold answers with passages as text, and without."""
        bare = [Example((example.prefix[0],), example.branches) for example in self._examples]
        return {"nll_text": self._nll(self._examples, self._as_text), "nll_none": self._nll(bare, self._as_text)}

    @torch.no_grad()
    def look(self) -> float:
        """Nats per token of the gold answers as the row reads the passages."""
        return self._nll(self._examples, lambda some: self._row.read(some)[-1])

    def _as_text(self, some: Sequence[Example]) -> torch.Tensor:
        return last_hidden_state(self._row.llm, pack(some, self._row.llm))

    def _nll(self, examples: Sequence[Example], read: Callable[[Sequence[Example]], torch.Tensor]) -> float:
        total, tokens, llm = 0.0, 0, self._row.llm
        for begin in range(0, len(examples), 4):
            some = examples[begin : begin + 4]
            targets = targets_of(some, prompt_weight=0.0, kind_weights={}, device=llm.device)
            nll, n = nll_by_kind(llm, read(some), targets)["qa"]
            total, tokens = total + nll, tokens + n
        return total / max(1, tokens)


class Fit:
    """Training one row.

    Args:
        row: Its weights are changed in place.
        schedule: How long.
        folder: Keeps weights and optimizer; what is there is gone on with.
        facts: What else the weights depend on, as JSON can hold it.
        progress: Called with a line.

    Raises:
        ConfigurationError: The folder holds a run of other facts.
    """

    def __init__(
        self, row: Row, schedule: Schedule, folder: Path, facts: dict[str, Any], progress: Callable[[str], None]
    ) -> None:
        self.row, self.schedule, self._folder, self._progress = row, schedule, folder, progress
        own = {} if row.lr is None else {"row_lr": row.lr}
        self._facts = json.loads(json.dumps(facts | asdict(schedule) | own))
        self.weights = row.learned()
        lora = [p for name, p in self.weights.items() if "lora_" in name]
        other = [p for name, p in self.weights.items() if "lora_" not in name]
        groups = [{"params": lora, "times": 1.0}, {"params": other, "times": schedule.other_lr}]
        if row.lr is not None:
            groups = [{"params": [*lora, *other], "times": row.lr / schedule.lr}]
        self._groups = [group for group in groups if group["params"]]
        self.step, self.seconds, self.curve = 0, 0.0, list[dict[str, float]]()
        if self.weights:
            self._optimizer = torch.optim.AdamW(self._groups, lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.0)
            self._resume()

    def _resume(self) -> None:
        found = load_checkpoint(self._folder)
        if found is None:
            return
        weights, moments, state = found
        if state["facts"] != self._facts:
            changed = [name for name in self._facts if state["facts"].get(name) != self._facts[name]]
            raise ConfigurationError(
                "weights in this folder were trained with other settings",
                got=", ".join(f"{name} {self._facts[name]!r}" for name in changed),
                expected=", ".join(f"{name} {state['facts'].get(name)!r}" for name in changed),
                next_step=f"name another --out, or remove {self._folder}",
            )
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(weights[name])
        restore_moments(self._optimizer, moments)
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]

    def go(self) -> dict[str, Any]:
        """Train until the minutes are over; called again it goes on.

        Returns:
            Steps, minutes, how many numbers are learned, and the curve: minutes, steps, NLL and recovered on held-out
            rows.

        Raises:
            DivergedError: The loss is not finite.
        """
        held_out = HeldOut(self.row, self.schedule.validation)
        fixed, whole = held_out.text(), 60 * self.schedule.minutes
        looks, saved = self.schedule.looks, self.seconds
        if not self.curve:
            self._look(held_out, fixed)
        while self.weights and self.seconds < whole:
            begun = time.process_time()
            self._one_step()
            self.seconds += time.process_time() - begun
            due = len(self.curve) <= looks * min(1.0, self.seconds / whole)
            if due:
                self._look(held_out, fixed)
            if due or self.seconds - saved > _SAVED_EVERY:
                self._save()
                saved = self.seconds
        n = sum(p.numel() for p in self.weights.values())
        return {"steps": self.step, "minutes": self.seconds / 60, "learned": n, "curve": self.curve, **fixed}

    def _one_step(self) -> None:
        schedule = self.schedule
        examples = self.examples(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = schedule.lr * group["times"] * schedule.rate(self.seconds)
        self._optimizer.zero_grad(set_to_none=True)
        weight = sum(weight_of(example, {}) for example in examples)
        for some in _parts(examples, schedule.micro):
            share = sum(weight_of(example, {}) for example in some) / weight
            torch.autograd.backward(self.row.loss(some).total * share)
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.weights.values()), schedule.clip))
        if not math.isfinite(norm):
            raise DivergedError(
                "loss is not finite",
                got=f"gradient norm {norm} at step {self.step}",
                expected="finite numbers",
                next_step=f"leave this row out; {self._folder} holds its last good weights, if any were written",
            )
        self._optimizer.step()
        self.step += 1

    def examples(self, step: int) -> list[Example]:
        """Those of a step, the same for every row."""
        first, batch = step * self.schedule.batch, self.schedule.batch
        numbers = range(first, first + batch)
        return [self.row.material.draw(random.Random(f"{self.schedule.seed}/{number}")) for number in numbers]

    def _look(self, held_out: HeldOut, fixed: dict[str, float]) -> None:
        nll, gain = held_out.look(), fixed["nll_none"] - fixed["nll_text"]
        point = {"minutes": self.seconds / 60, "steps": self.step, "nll": nll}
        if gain >= _LEAST_GAIN:
            point["recovered"] = 100 * (fixed["nll_none"] - nll) / gain
        self.curve.append(point)
        shown = ", ".join(f"{name} {value:.3g}" for name, value in point.items())
        self._progress(f"{self._folder.name}: {shown}")

    def _save(self) -> None:
        state = {"facts": self._facts, "step": self.step, "seconds": self.seconds, "curve": self.curve}
        save_checkpoint(self._folder, dict(self.weights), self._optimizer, state)


def _parts(examples: Sequence[Example], limit: int) -> list[list[Example]]:
    """Examples sorted by size and cut so that the padded size of each part stays under the limit."""
    out: list[list[Example]] = []
    for example in sorted(examples, key=positions_of):
        if out and positions_of(example) * (len(out[-1]) + 1) <= limit:
            out[-1].append(example)
        else:
            out.append([example])
    return out
