"""The flags of training are the fields of its settings: none is missing, and none has a default of its own."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from compllm_rag.cli.flags import fields_of
from compllm_rag.cli.main import app
from compllm_rag.config import Frozen
from compllm_rag.training.compressor_task import CompressorTask
from compllm_rag.training.deep_task import DeepTask
from compllm_rag.training.job_options import (
    DEEP_DATA,
    READER_DATA,
    CompressorOptions,
    DataOptions,
    DeepOptions,
    ReaderOptions,
)
from compllm_rag.training.reader_task import ReaderTask
from compllm_rag.training.run_config import DEEP_RUN, READER_RUN, RunConfig

SETTINGS: dict[str, tuple[Frozen, ...]] = {
    "reader": (READER_DATA, ReaderOptions(), READER_RUN),
    "compressor": (DataOptions(), CompressorOptions(), RunConfig()),
    "deep": (DEEP_DATA, DeepOptions(), DEEP_RUN),
}
# Without a flag: versions, what is worked out from the LLM and the rank, and what the kind of run does not have.
NAMES = {"reader": {}, "compressor": {"lora_rank": "rank"}, "deep": {"lora_rank": "rank", "init": "from_"}}
UNASKED = {
    "deep": {"head_lr"},
    "reader": {"head_lr"},
    "compressor": {"format_version", "segmenter_version", "scale", "lora_alpha"}
    | {"entry_layer", "unit_length", "opening", "selector", "pins", "read_rank", "read_alpha", "read_modules"}
    | {"marked", "prompt_rank", "prompt_alpha", "prompt_modules"},
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the commands hand to the jobs."""
    calls: list[tuple[Any, ...]] = []
    record = {"interrupted": False, "skipped": 0, "best": None, "step": 0, "finished": True, "out": "out"}

    def job(*args: Any) -> dict[str, Any]:
        calls.append(args)
        return record

    monkeypatch.setattr("compllm_rag.training.jobs.train_reader", job)
    monkeypatch.setattr("compllm_rag.training.jobs.train_compressor", job)
    monkeypatch.setattr("compllm_rag.training.jobs.train_deep", job)
    monkeypatch.setattr("compllm_rag.training.cards.plot_curves", lambda out: None)
    return calls


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["train", *map(str, words)])


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_field_has_its_flag_with_the_same_default_and_some_help(kind: str) -> None:
    command = typer.main.get_command(app).commands["train"].commands[kind]
    flags = {option.name: option for option in command.params}
    asked = {NAMES[kind].get(name, name): (info, value)
             for default in SETTINGS[kind] for name, info, value in fields_of(default, UNASKED[kind])}  # fmt: skip
    assert set(flags) == set(asked) | {"out", "as_json"} | ({"help"} & set(flags))
    for name, (info, value) in asked.items():
        assert f"--{name.rstrip('_').replace('_', '-')}" in flags[name].opts
        assert flags[name].default == (list(value) if isinstance(value, tuple) else value), name
        assert info.description
        assert flags[name].help


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_command_without_flags_trains_with_the_defaults_of_the_settings(kind: str, started: list[Any]) -> None:
    result = run(kind, "--out", "out")
    assert result.exit_code == 0, result.output
    [(out, *settings, _, command)] = started
    assert (out, tuple(settings)) == (Path("out"), SETTINGS[kind])
    assert command.startswith("compllm-rag")


def test_what_is_typed_arrives(started: list[Any]) -> None:
    words = ["--layers", 0, "--reader", "none", "--rank", 4, "--no-anchor-words", "--sink", "--queries", "eos"]
    words += ["--rates", 2, "--rates", "3.5", "--questions", "a.jsonl", "--questions", "b.jsonl", "--max-context", 99]
    words += ["--kl", 0, "--mixed", "0.5", "--minutes", "1.5", "--labels", "own", "--text-share", "0.3"]
    result = run("compressor", "--out", "out", *words)
    assert result.exit_code == 0, result.output
    [(_, data, options, settings, _, _)] = started
    config = options.config
    assert (config.layers, config.lora_rank, config.lora_alpha) == (None, 4, 8)
    assert (config.anchor_words, config.sink, config.queries) == (False, True, "eos")
    assert (options.reader, options.labels, options.text_share) == (None, "own", 0.3)
    assert (options.rates.rates, options.rates.mixed, options.objective.kl) == ((2.0, 3.5), 0.5, 0.0)
    assert (data.questions, data.material.max_context) == ((Path("a.jsonl"), Path("b.jsonl")), 99)
    assert settings == RunConfig(minutes=1.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", 0], "setting minutes makes no sense"),
        (["--labels", "silver"], "setting labels makes no sense"),
        (["--steps", 0], "Invalid value for"),
        (["--qa", 2], "Invalid value for"),
    ],
)
def test_what_is_out_of_bounds_is_refused(words: list[object], message: str, started: list[Any]) -> None:
    result = run("compressor", "--out", "out", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not started


def test_tasks_have_the_defaults_of_the_settings() -> None:
    pairs = ((CompressorTask, CompressorOptions()), (ReaderTask, ReaderOptions()), (DeepTask, DeepOptions()))
    for task, options in pairs:
        shared = {n: p.default for n, p in inspect.signature(task).parameters.items() if hasattr(options, n)}
        kept = {n: default for n, default in shared.items() if default not in (None, inspect.Parameter.empty)}
        assert {"validation"} < set(kept)
        assert kept == {n: getattr(options, n) for n in kept}
