"""The training loop: seeded, resumable, guarded.

accelerate carries devices, bf16 and data-parallel runs (`torchrun`); what an example is and what its loss is comes from
a `Task`. The learning rate warms up, stays, and decays over the last part of the run, so a run can be prolonged by
resuming it with more steps before the decay has begun.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from compllm_rag.errors import ConfigurationError, DivergedError
from compllm_rag.training.checkpoint import load_checkpoint, restore_moments, save_checkpoint
from compllm_rag.training.drawing import drawn_ahead
from compllm_rag.training.processes import Processes
from compllm_rag.training.run_config import Progress, RunConfig, Task


def train(task: Task, config: RunConfig, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Train, or go on training.

    Args:
        task: What is trained.
        config: How.
        out: Holds `last/` (checkpoint), `best/` (what a user loads), `log.jsonl`, and, when the run has finished,
            `final/`: the weights after its last step, as a user loads them.
        progress: Called with a message and the share that is done.

    Returns:
        The last record of the log: step, loss, best score, and whether the run is finished.

    Raises:
        DivergedError: The loss is not finite; `last/` is the last good checkpoint.
        ConfigurationError: `out` holds a run of something else.
        OSError: A checkpoint cannot be written; the former one is kept.
    """
    return _Run(task, config, out, progress or (lambda message, share: None)).go()


class _Run:
    def __init__(self, task: Task, config: RunConfig, out: Path, progress: Progress) -> None:
        from accelerate import Accelerator

        self.task, self.config, self.out, self.progress = task, config, out, progress
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="bf16" if torch.cuda.is_available() else "no"
        )
        groups = task.parameter_groups(config)
        self.parameters = [p for group in groups for p in group["params"]]
        self.processes = Processes(self.accelerator, self.parameters)
        self.optimizer = torch.optim.AdamW(
            [{**group, "lr": config.lr * group["times"]} for group in groups], betas=(0.9, 0.98), weight_decay=0.0
        )
        self.names = {id(p): name for name, p in task.module.named_parameters()}
        self.step, self.best, self.stale, self.seconds = 0, -math.inf, 0, 0.0
        self.stopping = self.interrupted = False
        self._resume()
        self.processes.same_weights()
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.batches = drawn_ahead(task, config, range(self.step, config.steps), rank, world)

    def _resume(self) -> None:
        found = load_checkpoint(self.out / "last")
        if found is None:
            return
        weights, moments, state = found
        own = {self.names[id(p)]: p for p in self.parameters}
        if state["task"] != self.task.name or {k: list(v.shape) for k, v in own.items()} != {
            k: list(v.shape) for k, v in weights.items()
        }:
            raise ConfigurationError(
                "output folder holds another run",
                got=f"{state['task']} with {len(weights)} tensors",
                expected=f"{self.task.name} with {len(own)} tensors",
                next_step="choose another --out, or the settings that run was started with",
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
        restore_moments(self.optimizer, moments)
        self.step, self.stale = state["step"], state["stale"]
        self.best = -math.inf if state["best"] is None else state["best"]
        self.seconds = state["seconds"]

    def go(self) -> dict[str, Any]:
        self.out.mkdir(parents=True, exist_ok=True)
        begun = saved = time.monotonic()
        former = self._catch_signals()
        record: dict[str, Any] = {"step": self.step}
        try:
            if self.step == 0:
                record = self._validate()
            if self._gave_up():
                record["stopped"] = "no better score"
            while not self._over() and not self.stopping and "stopped" not in record:
                tick = time.monotonic()
                record = self._one_step()
                self.seconds += time.monotonic() - tick
                self._log(record)
                if self.step % self.config.validate_every == 0 or self._over():
                    record |= self._validate()
                    if self._gave_up():
                        record["stopped"] = "no better score"
                        break
                if time.monotonic() - saved > 60 * self.config.save_minutes:
                    self._save()
                    saved = time.monotonic()
                over = self.config.minutes is not None and time.monotonic() - begun > 60 * self.config.minutes
                self.stopping = self.processes.any(self.stopping or over)
            self._save()
            finished = self._over() or "stopped" in record
            if finished and self.accelerator.is_main_process:
                self.task.export(self.out / "final")
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        return record | {
            "step": self.step,
            "best": None if math.isinf(self.best) else self.best,
            "finished": finished,
            "interrupted": self.interrupted,
        }

    def _over(self) -> bool:
        """Whether the whole run lies behind us; the processes' clocks differ, and they end at the same step."""
        return self.processes.any(self.config.done(self.step, self.seconds) >= self.config.steps)

    def _gave_up(self) -> bool:
        """Whether too many looks in a row brought nothing better, now or before this run was called again."""
        return bool(self.config.patience and self.processes.any(self.stale >= self.config.patience))

    def _one_step(self) -> dict[str, Any]:
        items = next(self.batches)
        # The same in all processes, whose clocks differ.
        share = self.config.rate(self.step, self.processes.mean(self.seconds))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * group["times"] * share
        self.optimizer.zero_grad(set_to_none=True)
        parts: dict[str, float] = {}
        micro = _micro_batches(items, self.task, self.config.micro_tokens)
        weight = self.processes.mean(sum(map(self.task.weight, items)))
        for some in micro:
            with self.accelerator.autocast():
                loss = self.task.loss(self.task.module, some)
            # As one forward over the examples of all processes would weigh them, however they are cut up.
            share = sum(map(self.task.weight, some)) / weight
            self.accelerator.backward(loss.total * share)
            for name, value in loss.parts.items():
                parts[name] = parts.get(name, 0.0) + value * share
        self.processes.average_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip))
        if not math.isfinite(norm) or not math.isfinite(parts["loss"]):
            raise DivergedError(
                "loss is not finite",
                got=f"loss {parts['loss']}, gradient norm {norm} at step {self.step}",
                expected="finite numbers",
                next_step=f"lower --lr; {self.out / 'last'} holds the last good checkpoint, if one was written",
            )
        self.optimizer.step()
        self.step += 1
        return {
            "step": self.step,
            "minutes": round(self.seconds / 60, 2),
            "lr": self.optimizer.param_groups[0]["lr"],
            "norm": round(norm, 4),
            **{name: round(value, 5) for name, value in parts.items()},
        }

    def _validate(self) -> dict[str, Any]:
        if not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
            return {}
        found = self.task.validate(self.progress)
        score = found["score"]
        if score > self.best:
            self.best, self.stale = score, 0
            self.task.export(self.out / "best")
        else:
            self.stale += 1
        record = {"step": self.step, "minutes": round(self.seconds / 60, 2), "validation": found}
        self._log(record)
        self.accelerator.wait_for_everyone()
        return record

    def _log(self, record: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        facts = record.get("validation") or {k: record[k] for k in ("loss", "kl", "ce") if k in record}
        shown = ", ".join(f"{name} {value:.3g}" for name, value in facts.items())
        self.progress(f"step {self.step} of {self.config.steps}: {shown}", self.step / self.config.steps)

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "task": self.task.name,
            "step": self.step,
            "best": None if math.isinf(self.best) else self.best,
            "stale": self.stale,
            "seconds": self.seconds,
            "config": self.config.model_dump(mode="json"),
        }
        weights = {self.names[id(p)]: p for p in self.parameters}
        save_checkpoint(self.out / "last", weights, self.optimizer, state)

    def _catch_signals(self) -> dict[int, Any]:
        """Let an interruption end the run after the step that is going on; a second one at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = self.interrupted = True
            self.progress("stopping after this step; interrupt again to stop at once", None)

        former: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                former[number] = signal.signal(number, stop)
            except ValueError:  # not the main thread: whoever runs us there has their own way to stop us
                return former
        return former


def _micro_batches(items: Sequence[Any], task: Task, limit: int) -> list[list[Any]]:
    """Items sorted by size and cut so that the padded size of each part stays under the limit."""
    out: list[list[Any]] = []
    for item in sorted(items, key=lambda item: (task.alike(item), task.size(item))):
        same = out and task.alike(item) == task.alike(out[-1][0])
        if same and task.size(item) * (len(out[-1]) + 1) <= limit:
            out[-1].append(item)
        else:
            out.append([item])
    return out
