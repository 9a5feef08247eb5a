"""Runs that are interrupted, diverge, or meet a full disk."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import processes
import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.errors import ConfigurationError, DivergedError, UnsupportedFormatError
from compllm_rag.training.compressor_task import CompressorTask, RatesConfig
from compllm_rag.training.drawing import drawn_ahead
from compllm_rag.training.job_options import ObjectiveConfig
from compllm_rag.training.loop import train
from compllm_rag.training.objective import Loss
from compllm_rag.training.run_config import RunConfig
from training_samples import fresh, material, write_world

ROOT = Path(__file__).parents[2]
RUN = RunConfig(steps=12, batch=2, lr=3e-3, warmup=3, validate_every=6, seed=3, save_minutes=0, micro_tokens=300)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("data"), rows=40)


def task(world: Path, **options) -> CompressorTask:
    llm = toy.llm()
    torch.manual_seed(0)
    return CompressorTask(fresh(llm), material(llm, world), validation=2, **options)


def curve(out: Path) -> list[dict]:
    """The last record of every step, without what depends on the clock."""
    steps = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            steps[record["step"]] = {k: v for k, v in record.items() if k not in ("minutes", "validation")}
    return [steps[k] for k in sorted(steps)]


def test_an_interrupted_run_resumes_to_the_same_curve(world: Path, tmp_path: Path) -> None:
    whole = train(task(world), RUN, tmp_path / "whole")
    for steps in (5, 8):
        # What a time slot does: it ends between two steps, and another process goes on.
        slot = train(task(world), RUN, tmp_path / "slots", at(steps))
        assert not slot["finished"] and slot["step"] == steps
        assert not (tmp_path / "slots" / "final").exists()
    last = train(task(world), RUN, tmp_path / "slots")
    assert whole["finished"] and last["finished"] and last["step"] == 12
    assert curve(tmp_path / "slots") == curve(tmp_path / "whole")
    assert len(curve(tmp_path / "whole")) == 12
    llm = toy.llm()
    for folder in ("best", "final"):
        mine = [Compressor.from_pretrained(tmp_path / run / folder, llm).fingerprint for run in ("whole", "slots")]
        assert mine[0] == mine[1]


def test_the_weights_after_the_last_step_can_be_loaded_beside_the_best(world: Path, tmp_path: Path) -> None:
    made = task(world)
    real, scores = made.validate, iter((3.0, 2.0, 1.0, 0.0))
    made.validate = lambda progress: real(progress) | {"score": next(scores)}  # the untrained ones stay best
    train(made, RUN.model_copy(update={"steps": 4, "validate_every": 4, "lr": 1e-2}), tmp_path)
    made.export(tmp_path / "now")
    folders = ("best", "final", "now")
    best, final, now = (Compressor.from_pretrained(tmp_path / name, toy.llm()).fingerprint for name in folders)
    assert best != final == now


def test_training_lowers_the_loss_from_that_of_pruning(world: Path, tmp_path: Path) -> None:
    made = task(world, rates=RatesConfig(rates=(2.0,), mixed=0.0))
    train(made, RUN.model_copy(update={"steps": 40, "validate_every": 40, "lr": 1e-2}), tmp_path)
    first, *_, last = [r["validation"] for r in map(json.loads, (tmp_path / "log.jsonl").open()) if "validation" in r]
    assert first["nll_concepts@2"] == pytest.approx(first["nll_pruned@2"], abs=1e-3), (
        "training starts from hard pruning"
    )
    losses = [r["loss"] for r in curve(tmp_path)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert last["nll_pruned@2"] == first["nll_pruned@2"]


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(world: Path, tmp_path: Path) -> None:
    made = task(world)
    real = made.loss

    def loss(module, items):
        found = real(module, items)
        return Loss(found.total * math.nan, {**found.parts, "loss": math.nan}) if broken else found

    made.loss = loss
    broken = False
    train(made, RUN, tmp_path, at(4))
    before = _files(tmp_path / "last")
    broken = True
    with pytest.raises(DivergedError, match="not finite"):
        train(made, RUN, tmp_path)
    assert _files(tmp_path / "last") == before
    broken = False
    assert train(task(world), RUN, tmp_path)["finished"]


def test_a_full_disk_keeps_the_previous_checkpoint(world: Path, tmp_path: Path) -> None:
    train(task(world), RUN, tmp_path, at(3))
    before = _files(tmp_path / "last")
    largest = max(len(data) for data in before.values())
    # A process of its own, not a fork: OpenMP's threads do not survive one, and the child would wait for them for ever.
    script = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest // 2}, {largest // 2}))\n"
        "try:\n"
        "    train(task(Path(sys.argv[1])), RUN, Path(sys.argv[2]))\n"
        "except OSError:\n"
        "    sys.exit(7)\n"
    )
    done = subprocess.run(child(script, world, tmp_path), capture_output=True, text=True, timeout=240)
    assert done.returncode == 7, done.stderr
    assert _files(tmp_path / "last") == before
    assert not (tmp_path / "last.new").exists()
    assert train(task(world), RUN, tmp_path)["finished"]


@pytest.mark.faults
def test_an_interrupt_ends_after_the_step_and_a_kill_loses_little(world: Path, tmp_path: Path) -> None:
    script = (
        "run = RUN.model_copy(update={'steps': 100000, 'validate_every': 100000})\n"
        "print(train(task(Path(sys.argv[1])), run, Path(sys.argv[2]))['interrupted'])\n"
    )
    for number, expected in ((signal.SIGINT, "True"), (signal.SIGKILL, "")):
        command = processes.hearing_interrupts(child(script, world, tmp_path / "out"))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        seen = _last_step(tmp_path / "out")
        try:
            _wait(lambda seen=seen: _last_step(tmp_path / "out") >= seen + 3)
            process.send_signal(number)
            out, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        assert out.strip() == expected
    state = json.loads((tmp_path / "out/last/state.json").read_text())
    logged = _last_step(tmp_path / "out")
    assert logged - 2 <= state["step"] <= logged
    done = train(task(world), RUN.model_copy(update={"steps": logged + 2}), tmp_path / "out")
    assert done["finished"] and done["step"] == logged + 2


def test_a_signal_to_all_of_its_processes_ends_a_run_with_workers_as_one_without(world: Path, tmp_path: Path) -> None:
    script = (
        "run = RUN.model_copy(update={'steps': 100000, 'validate_every': 100000, 'workers': 2})\n"
        "print(train(task(Path(sys.argv[1])), run, Path(sys.argv[2]))['interrupted'])\n"
    )
    command = child(script, world, tmp_path / "out")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _wait(lambda: _last_step(tmp_path / "out") >= 3)
        os.killpg(process.pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert out.strip() == "True" and process.returncode == 0
    state = json.loads((tmp_path / "out/last/state.json").read_text())
    assert state["step"] == _last_step(tmp_path / "out")


def test_killed_between_the_two_renames_the_former_checkpoint_counts(world: Path, tmp_path: Path) -> None:
    train(task(world), RUN, tmp_path, at(3))
    (tmp_path / "last").rename(tmp_path / "last.old")
    assert train(task(world), RUN, tmp_path, at(4))["step"] == 4


def test_another_run_and_a_damaged_checkpoint_are_refused(world: Path, tmp_path: Path) -> None:
    train(task(world), RUN, tmp_path, at(2))
    llm = toy.llm()
    other = CompressorTask(fresh(llm, lora_rank=2, lora_alpha=4), material(llm, world), validation=2)
    with pytest.raises(ConfigurationError, match="another run"):
        train(other, RUN, tmp_path)
    (tmp_path / "last/weights.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UnsupportedFormatError, match="checkpoint cannot be read"):
        train(task(world), RUN, tmp_path)


def test_it_stops_early_when_nothing_gets_better(world: Path, tmp_path: Path) -> None:
    made = task(world)
    made.validate = lambda progress: {"score": 1.0}
    run = RUN.model_copy(update={"steps": 100, "validate_every": 2, "patience": 2})
    done = train(made, run, tmp_path)
    assert done["finished"] and done["step"] == 4
    again = task(world)
    again.validate = made.validate
    found = train(again, run, tmp_path)
    assert found["finished"] and found["step"] == 4, "called again, it makes no step"


def test_a_best_score_of_zero_is_kept_over_an_interruption(world: Path, tmp_path: Path) -> None:
    made = task(world)
    made.validate = lambda progress: {"score": 0.0}
    train(made, RUN, tmp_path, at(2))
    best = (tmp_path / "best/compressor.safetensors").read_bytes()
    again = task(world)
    again.validate = made.validate
    train(again, RUN, tmp_path)
    assert (tmp_path / "best/compressor.safetensors").read_bytes() == best, "an equal score is no better one"


def test_texts_that_count_nothing_are_not_drawn(world: Path, tmp_path: Path) -> None:
    llm = toy.llm()
    nothing = ObjectiveConfig(copy_branches=0.0, continue_branches=0.0)
    made = CompressorTask(fresh(llm), material(llm, world, qa=0.3), nothing, validation=2)
    assert all(made.weight(made.draw(random.Random(seed))) > 0 for seed in range(30))
    alone = CompressorTask(fresh(llm), material(llm, world, qa=0.0), nothing, validation=2)
    with pytest.raises(ConfigurationError, match="nothing of the training mix counts"):
        train(alone, RUN, tmp_path)


def test_learning_rate_warms_up_stays_and_decays() -> None:
    run = RunConfig(steps=100, warmup=10, decay=0.2)
    rates = [run.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:81] == [1.0] * 72
    assert rates[80:] == sorted(rates[80:], reverse=True) and 0 < rates[-1] < 0.1


def test_the_learning_rate_can_follow_the_clock() -> None:
    run = RunConfig(steps=10_000, warmup=2, decay=1.0, total_minutes=2)
    assert [run.rate(500, seconds) for seconds in (0, 60, 90)] == pytest.approx([0.95, 0.5, 0.25])
    assert run.rate(9_000, 6) == pytest.approx(0.1), "steps end it, too"
    assert run.done(500, 119) < 10_000 <= run.done(500, 120)
    assert run.model_copy(update={"total_minutes": None}).done(500, 1e6) == 500


def test_a_run_by_the_clock_ends_as_a_finished_one(world: Path, tmp_path: Path) -> None:
    made = task(world)
    looks = []
    made.validate = lambda progress: looks.append(1) or {"score": float(len(looks))}
    run = RUN.model_copy(update={"steps": 10_000, "validate_every": 10_000, "total_minutes": 1e-4})
    done = train(made, run, tmp_path)
    assert done["finished"] and 1 <= done["step"] < 10_000 and len(looks) == 2
    assert (tmp_path / "final" / "config.json").exists()
    assert train(task(world), run, tmp_path)["step"] == done["step"], "there is nothing left to do"


def test_examples_drawn_by_workers_are_the_same(world: Path, tmp_path: Path) -> None:
    for name, workers in (("alone", 0), ("workers", 2)):
        assert train(task(world), RUN.model_copy(update={"workers": workers}), tmp_path / name)["finished"]
    assert curve(tmp_path / "alone") == curve(tmp_path / "workers")
    some = list(drawn_ahead(task(world), RUN.model_copy(update={"workers": 2}), range(5, 9)))
    assert some == list(drawn_ahead(task(world), RUN, range(5, 9)))
    halves = [list(drawn_ahead(task(world), RUN.model_copy(update={"batch": 1}), range(5, 9), i, 2)) for i in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == some, "two processes share the steps of one"


def test_workers_are_refused_where_no_process_can_be_forked(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(ConfigurationError, match="--workers"):
        drawn_ahead(task(world), RUN.model_copy(update={"workers": 1}), range(3))


def child(script: str, *arguments: object) -> list[str]:
    """The command of a process that runs a script with the names of this module."""
    head = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(ROOT)!r}]; from tests.training.test_loop import *\n"
    )
    return [sys.executable, "-c", head + script, *map(str, arguments)]


def at(steps: int):
    """A slot that is over after so many steps: the process gets the signal a scheduler sends."""

    def progress(message: str, share: float | None) -> None:
        if message.startswith(f"step {steps} of"):
            os.kill(os.getpid(), signal.SIGTERM)

    return progress


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _last_step(out: Path) -> int:
    try:
        lines = (out / "log.jsonl").read_text().splitlines()
    except OSError:
        return 0
    steps = []
    for line in lines:
        try:
            steps.append(json.loads(line)["step"])
        except ValueError:
            continue
    return max(steps, default=0)


def _wait(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
