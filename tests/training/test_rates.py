"""Losses are measured on held-out rows alone, fitted in closed form, and lie beside the compressor."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import toy
from compllm_rag.cli.main import app
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import load_compressor, untrained_deep
from compllm_rag.compression.rate_policies.losses import RATES, LossPredictor
from compllm_rag.compression.rates import FixedRate
from compllm_rag.errors import ConfigurationError
from compllm_rag.models.llm import TargetLLM
from compllm_rag.training.deep_task import drawn_at, read_concepts
from compllm_rag.training.examples import Example, pack, targets_of
from compllm_rag.training.material import Material, MaterialConfig
from compllm_rag.training.objective import last_hidden_state, nll_by_kind
from compllm_rag.training.rates import _ridge, fit_losses, mean_gain, measured_gain, measured_losses
from trained import information

MIX = MaterialConfig(max_context=300, qa=1.0, copy_share=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "train").mkdir()
    words = [word.strip(".,") for word in toy.TEXT.split() if word.strip(".,").isalpha()]
    with (folder / "train" / "a.jsonl").open("w") as file:
        for i in range(600):
            rng = random.Random(i)
            text = [rng.choice(words) if i % 2 else str(rng.randrange(1000)) for _ in range(20)]
            row = {"id": str(i), "question": f"Page {i}?", "answers": [text[5]], "context": " ".join(text)}
            file.write(json.dumps(row) + "\n")
    return folder


def compressor(llm: TargetLLM | None = None, **settings: Any) -> DeepCompressor:
    llm = llm or toy.llm(layers=2)
    return untrained_deep(llm, 1, information=information(llm), unit_length=60, **settings)


def material(world: Path, made: DeepCompressor) -> Material:
    return Material(Material.files_of(world)[0], [], made.segmenter, MIX, unit_length=made.config.unit_length)


@pytest.mark.parametrize("selector", ["information+surprisal", "information"])
def test_losses_are_those_of_reading_at_each_rate(world: Path, selector: str) -> None:
    made = compressor(selector=selector)
    held = material(world, made)
    example = held.questions(held.held_out[0], random.Random(0), 0, extras=False)
    found = measured_losses(made, example, [1.0, 2.0, 4.0])
    targets = targets_of([example], prompt_weight=0.0, kind_weights={}, device=made.llm.device)
    for rate, loss in zip([1.0, 2.0, 4.0], found, strict=True):
        states = read_concepts(made, [drawn_at(example, FixedRate(rate, 60))])
        total, n = nll_by_kind(made.llm, states.detach(), targets)["qa"]
        text, _ = nll_by_kind(made.llm, last_hidden_state(made.llm, pack([example], made.llm)).detach(), targets)["qa"]
        assert loss == pytest.approx((total - text) / n, abs=1e-4)


def test_the_gain_is_that_of_text_over_the_same_prompt_without_passages(world: Path) -> None:
    made = compressor()
    held = material(world, made)
    example = held.questions(held.held_out[0], random.Random(0), 0, extras=False)
    bare = Example(tuple(held.prompt.prefix([])), example.branches)
    read = []
    for each in (bare, example):
        targets = targets_of([each], prompt_weight=0.0, kind_weights={}, device=made.llm.device)
        total, n = nll_by_kind(made.llm, last_hidden_state(made.llm, pack([each], made.llm)).detach(), targets)["qa"]
        read.append(total / n)
    assert measured_gain(made, example) == pytest.approx(read[0] - read[1], abs=1e-5) != 0


def test_a_gain_alone_is_that_of_a_fit_of_the_same_groups(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compressor()
    held = material(world, made)
    monkeypatch.setattr("compllm_rag.training.rates.measured_losses", lambda c, e, rates: np.zeros(len(rates)))
    fitted = fit_losses(made, held, n_groups=6, seed=3)
    assert fitted.gain is not None and fitted.gain != 0
    assert mean_gain(made, held, n_groups=6, seed=3) == fitted.gain != mean_gain(made, held, n_groups=6, seed=4)
    monkeypatch.setattr("compllm_rag.training.rates.measured_gain", lambda c, e: 50.0)
    assert mean_gain(made, held, n_groups=2) == 3.0, "bounded as losses are"


def test_only_held_out_rows_are_read_and_the_fit_is_a_plain_ridge(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compressor()
    held = material(world, made)
    read = []

    def measured(_: Any, example: Any, rates: Any) -> Any:
        read.append(example)
        digits = sum(map(str.isdigit, made.llm.tokenizer.decode(list(example.bodies[0].ids)))) > 10
        return np.array([(rate - 1) * (0.5 if digits else 0.1) for rate in rates])

    monkeypatch.setattr("compllm_rag.training.rates.measured_losses", measured)
    found = fit_losses(made, held)
    texts = {held.body(group.passages[0].text).ids for group in held.held_out}
    assert {example.bodies[0].ids for example in read} == texts and len(read) == len(held.held_out) >= 10
    assert found.units >= len(read) and found.compressor == made.fingerprint
    assert found.offsets[0] == 0 and min(found.explained[1:]) > 0.5
    from compllm_rag.compression.rate_policies.measures import TextMeasures

    measures = TextMeasures(lambda: made)
    numbers, words = (
        found.predict(
            measures.features(list(next(e for e in read if has == _digits(made, e)).bodies[0].ids))[None], [4]
        )
        for has in (True, False)
    )
    assert numbers[0, 0] > 2 * words[0, 0]
    x, y = np.random.default_rng(0).normal(size=(500, 3)), np.ones((500, 1))
    y = x @ np.array([[1.0], [-2.0], [0.0]])
    assert np.abs(_ridge(x, y, 30.0)[:, 0] - [1, -2, 0]).max() < 0.15


def _digits(made: DeepCompressor, example: Any) -> bool:
    return sum(map(str.isdigit, made.llm.tokenizer.decode(list(example.bodies[0].ids)))) > 10


def test_the_command_writes_them_beside_the_compressor(world: Path, tmp_path: Path, toy_folder: Path) -> None:
    llm = TargetLLM.from_pretrained(str(toy_folder))
    saved = compressor(llm, selector="information").save_pretrained(tmp_path / "c")
    before = load_compressor(saved, llm)
    assert before.losses is None
    words = ["train", "rates", "--data-dir", str(world), "--from", str(saved), "--out", str(saved), "--groups", "12"]
    result = CliRunner().invoke(app, [*words, "--llm", str(toy_folder), "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["rates"] == list(RATES) and record["units"] >= 12 and isinstance(record["told_apart"], bool)
    after = load_compressor(saved, llm)
    assert isinstance(after.losses, LossPredictor) and after.fingerprint == before.fingerprint
    assert after.losses.gain == record["gain"] is not None
    after.losses.model_copy(update={"gain": None}).save(saved)
    assert load_compressor(saved, llm).losses.gain is None  # type: ignore[union-attr]
    again = CliRunner().invoke(app, [*words, "--llm", str(toy_folder), "--gain-only"])
    assert again.exit_code == 0 and f"text gains {record['gain']:.3f} nats per token" in again.stdout, again.output
    assert load_compressor(saved, llm).losses == after.losses
    again = load_compressor(after.save_pretrained(tmp_path / "copy"), llm)
    assert again.losses == after.losses
    after.losses = None
    after.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "rates.json").exists()


def test_nothing_held_out_is_said(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compressor()
    held = material(world, made)
    held.held_out = []
    for find in (fit_losses, mean_gain):
        with pytest.raises(ConfigurationError, match="0 groups of questions held out"):
            find(made, held)


def test_a_gain_alone_wants_losses_of_this_compressor(world: Path, tmp_path: Path, toy_folder: Path) -> None:
    saved = compressor(TargetLLM.from_pretrained(str(toy_folder)), selector="information").save_pretrained(tmp_path)
    words = ["train", "rates", "--data-dir", str(world), "--from", str(saved), "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(app, [*words, "--llm", str(toy_folder), "--gain-only"])
    assert done.exit_code == 2 and "no losses to complete" in done.stderr and not (tmp_path / "o").exists()


def test_what_foretells_nothing_is_not_trusted(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, chance = compressor(), np.random.default_rng(0)
    monkeypatch.setattr(
        "compllm_rag.training.rates.measured_losses", lambda c, e, rates: chance.normal(size=len(rates)) + 0.2
    )
    found = fit_losses(made, material(world, made))
    assert not np.any(found.weights), "the mean stands for all"
    one, other = (found.predict(np.full((1, len(found.mean)), value), [2.0]) for value in (-3.0, 5.0))
    assert one == other and all(-0.5 < value <= 0 for value in found.explained)
    few = fit_losses(made, material(world, made), n_groups=4)
    assert few.explained == () and not np.any(few.weights)
