"""A learned selector keeps what answers are made of, and says so by a plain computation."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import toy
from compllm_rag.cli.main import app
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import load_compressor, untrained_deep
from compllm_rag.compression.rates import FixedRate
from compllm_rag.compression.selection import learned_scores, selector_features
from compllm_rag.errors import ConfigurationError
from compllm_rag.models.adapters import inject_lora
from compllm_rag.models.llm import TargetLLM, decoder_of
from compllm_rag.prompt import ConceptSpan
from compllm_rag.training.deep_task import concepts_of, drawn_at
from compllm_rag.training.examples import pack_deep, targets_of
from compllm_rag.training.material import Material, MaterialConfig
from compllm_rag.training.objective import answer_loss, last_hidden_state
from compllm_rag.training.reader_task import save_reader
from compllm_rag.training.selector import _Sums, answer_tokens, fit_selector, gate_sizes, with_selector
from trained import information

ARCHITECTURES = (*toy.ARCHITECTURES, "qwen2", "gemma2")
MIX = MaterialConfig(max_context=300, qa=1.0, copy_share=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """What is asked for is always a word in capital letters."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train").mkdir()
    words = [word.strip(".,") for word in toy.TEXT.split() if word.strip(".,").isalpha()]
    with (folder / "train" / "a.jsonl").open("w") as file:
        for i in range(40):
            rng = random.Random(i)
            text = [rng.choice(words).lower() for _ in range(40)]
            asked = rng.sample(range(40), 3)
            for at in asked:
                text[at] = text[at].upper()
            for at in asked:
                row = {"id": f"{i}-{at}", "question": f"Page {i}?", "answers": [text[at]], "context": " ".join(text)}
                file.write(json.dumps(row) + "\n")
    return folder


def compressor(name: str = "llama", layers: int = 2, **settings: Any) -> DeepCompressor:
    llm = toy.llm(name, layers=layers)
    return untrained_deep(llm, 1, information=information(llm), unit_length=40, **settings)


def material(world: Path, made: DeepCompressor) -> Material:
    return Material(Material.files_of(world)[0], [], made.segmenter, MIX, unit_length=made.config.unit_length)


def test_answers_are_found_as_whole_words_whatever_the_tokens_and_letters() -> None:
    tokenizer = toy.tokenizer()
    unit = tokenizer.encode("The Maria sails at 9.15 from Mariashaven, says maria.")
    marks = answer_tokens(tokenizer, unit, ["MARIA", "9.15", "x", ""])
    assert "".join(tokenizer.decode([t]) for t, m in zip(unit, marks.tolist(), strict=True) if m) == " Maria9.15 maria"
    assert not answer_tokens(tokenizer, unit, ["aria", " "]).any()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gates_are_the_loss_s_derivatives_by_a_bias_on_keys(name: str, world: Path) -> None:
    made = compressor(name, layers=7)  # through sliding windows, too, the answer sees the passage
    example = material(world, made).questions(material(world, made).groups[0], random.Random(0), 0, extras=False)
    sizes = gate_sizes(made, example)
    spans = concepts_of(made, [drawn_at(example, FixedRate(1.0, 40))])
    packed = pack_deep([example], made.halves, spans)
    targets = targets_of([example], prompt_weight=0.0, kind_weights={}, device=made.llm.device)
    slots, at = [], 0
    for part in example.spans(spans[0]):
        slots += range(at, at + len(part)) if isinstance(part, ConceptSpan) else []
        at += len(part)

    def loss(slot: int, step: float) -> float:
        def moved(mask: torch.Tensor) -> torch.Tensor:
            open_ = mask if mask.dtype == torch.bool else mask == 0
            out = torch.zeros(mask.shape).masked_fill(~open_, torch.finfo(torch.float32).min)
            out[..., slot] += step
            return out

        masks = packed.attention_mask
        masks = {k: moved(m) for k, m in masks.items()} if isinstance(masks, dict) else moved(masks)
        read = last_hidden_state(made.llm, replace(packed, attention_mask=masks), made.halves.upper)
        return float(answer_loss(made.llm, read, targets))

    with torch.no_grad():
        slopes = torch.tensor([(loss(slot, 0.5) - loss(slot, -0.5)) for slot in slots]).abs()
    assert len(sizes) == sum(len(body) for body in example.bodies) == len(slots)
    expected = (slopes / slopes.mean()).clamp_max(30.0).sqrt()
    assert torch.corrcoef(torch.stack([sizes, expected]))[0, 1] > 0.98
    assert (sizes - expected).abs().mean() < 0.1  # differences of a float32 loss are that coarse


def test_the_regression_is_that_of_a_plain_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 6, generator=generator) * torch.tensor([1.0, 2, 3, 4, 5, 6]) + 3
    y = (x @ torch.tensor([0.5, 0, -1.0, 0, 0, 0.2]) + 1 > 0).float()
    sums = _Sums(6)
    for part in zip(x.split(700), y.split(700), strict=True):
        sums.add(*part)
    spread = x.std(0, correction=0) + 1e-3
    z = ((x - x.mean(0)) / spread).double()
    plain = torch.linalg.solve(z.T @ z + 1000 * torch.eye(6), z.T @ (y - y.mean()).double()) / spread
    assert torch.allclose(sums.regression(), plain.double(), atol=1e-5)
    assert float((x.double() @ sums.in_units(plain.double())).std()) == pytest.approx(1.0, abs=1e-3)


def test_it_keeps_more_of_the_answers_than_information_does(world: Path) -> None:
    made = compressor()
    found = material(world, made)
    learned = with_selector(made, fit_selector(made, found, n_groups=30, n_gates=5))
    kept, of_all = {"learned": 0.0, "information": 0.0}, 0.0
    rivals = {"learned": learned, "information": compressor(selector="information")}
    for group in found.groups:
        example = found.questions(group, random.Random(0), 0, extras=False)
        for unit in (unit for body in example.bodies for unit in body.segments):
            marks = answer_tokens(made.llm.tokenizer, unit, [question.answers[0] for question in group.questions])
            of_all += float(marks.sum())
            for name, rival in rivals.items():
                [places] = rival.kept_places([unit], [max(1, len(unit) // 4)])
                kept[name] += float(marks[places].sum())
    assert of_all > 0
    assert kept["learned"] > kept["information"]


def test_the_same_seed_learns_the_same_and_nothing_else_of_the_compressor_changes(world: Path) -> None:
    made = compressor(lora_rank=2, lora_alpha=4, lora_modules=("q_proj",))
    found = material(world, made)
    weights = fit_selector(made, found, n_groups=6, n_gates=2, seed=3)
    assert torch.equal(weights, fit_selector(made, found, n_groups=6, n_gates=2, seed=3))
    learned = with_selector(made, weights)
    state, before = learned.state(), made.state()
    assert set(state) == {*before, "selector"}
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert learned.fingerprint != made.fingerprint


def test_scores_are_a_plain_sum_and_do_not_depend_on_neighbours() -> None:
    made = compressor()
    weights = torch.randn(made.hidden_size + 1, generator=torch.Generator().manual_seed(0))
    learned = with_selector(made, weights)
    assert learned.selector is not None
    units = [list(range(3, 33)), list(range(40, 75))]
    for unit, [places] in ((unit, learned.kept_places([unit], [9])) for unit in units):
        states = made.llm.model(
            input_ids=torch.tensor([[*made.config.opening, *unit]]), output_hidden_states=True
        ).hidden_states[1][0, len(made.config.opening) :]
        features = selector_features(states, made.information[torch.tensor(unit)])
        plain = (features * learned.selector).sum(1)
        assert places == sorted(plain.argsort(descending=True)[:9].tolist())
    assert learned.kept_places(units, [9, 9]) == [learned.kept_places([unit], [9])[0] for unit in units]
    assert learned_scores(torch.zeros(2, 4), torch.ones(2), torch.ones(5)).tolist() == [1.0, 1.0]


def test_it_is_saved_with_the_compressor(tmp_path: Path, world: Path) -> None:
    made = compressor()
    learned = with_selector(made, fit_selector(made, material(world, made), n_groups=5, n_gates=1))
    loaded = load_compressor(learned.save_pretrained(tmp_path), made.llm)
    assert isinstance(loaded, DeepCompressor)
    assert loaded.fingerprint == learned.fingerprint
    assert loaded.config.selector == "learned"
    assert loaded.kept_places([list(range(3, 33))], [9]) == learned.kept_places([list(range(3, 33))], [9])


@pytest.mark.parametrize(
    ("selector", "weights"), [("learned", None), ("learned", torch.zeros(5)), ("information", torch.zeros(33))]
)
def test_weights_and_name_come_together(selector: str, weights: torch.Tensor | None) -> None:
    made = compressor()
    config = made.config.model_copy(update={"selector": selector})
    with pytest.raises(ConfigurationError, match="selector"):
        DeepCompressor(made.llm, config, information=made.information, selector=weights)


def test_without_answers_in_passages_nothing_can_be_learned(world: Path, tmp_path: Path) -> None:
    made = compressor()
    (tmp_path / "train").mkdir()
    row = '{"id": "%d", "question": "Who?", "context": "The ferry leaves at nine, number %d.", "answers": ["zebra"]}\n'
    (tmp_path / "train" / "a.jsonl").write_text("".join(row % (i, i) for i in range(4)))
    with pytest.raises(ConfigurationError, match="no selector can be learned"):
        fit_selector(made, material(tmp_path, made), n_groups=4, n_gates=0)


def test_the_command_makes_one(toy_folder: Path, world: Path, tmp_path: Path) -> None:
    options = ["--llm", str(toy_folder), "--data-dir", str(world), "--groups", "4", "--json"]
    out = CliRunner().invoke(app, ["train", "selector", "--out", str(tmp_path / "made"), *options])
    assert out.exit_code == 0, out.output
    loaded = load_compressor(tmp_path / "made")
    assert loaded.config.selector == "learned"
    again = CliRunner().invoke(
        app, ["train", "selector", "--out", str(tmp_path / "x"), "--from", str(tmp_path / "none"), *options]
    )
    assert again.exit_code == 2
    assert "no compressor here" in again.output


def test_the_command_goes_on_with_another_reader(toy_folder: Path, world: Path, tmp_path: Path) -> None:
    llm = TargetLLM.from_pretrained(toy_folder)
    before = untrained_deep(llm).save_pretrained(tmp_path / "before")
    inject_lora(decoder_of(llm.model), rank=2, alpha=4, modules=("q_proj",))
    save_reader(llm, tmp_path / "reader", rank=2, modules=("q_proj",))
    words = ["train", "selector", "--llm", toy_folder, "--data-dir", world, "--groups", 4, "--gates", 0, "--json"]
    words += ["--from", before, "--reader", tmp_path / "reader", "--out", tmp_path / "made"]
    refused = CliRunner().invoke(app, [str(word) for word in words])
    assert refused.exit_code == 2 and "--other-reader" in refused.output and not (tmp_path / "made").exists()
    done = CliRunner().invoke(app, [str(word) for word in (*words, "--other-reader")])
    assert done.exit_code == 0, done.output
    made = load_compressor(tmp_path / "made", TargetLLM.from_pretrained(toy_folder, reader=tmp_path / "reader"))
    assert made.config.selector == "learned"
