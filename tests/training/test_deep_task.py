"""Training deep concepts: what generation reads is what is trained, and nothing but LoRA moves."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import toy
from compllm_rag.cli.main import app
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import load_compressor, untrained_deep
from compllm_rag.compression.rates import FixedRate
from compllm_rag.errors import ConfigurationError, FingerprintMismatchError
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.library import unpacked
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import ConceptSpan, PromptPlan, QAPrompt, TextSpan
from compllm_rag.training.deep_start import going_on_from
from compllm_rag.training.deep_task import (
    DeepTask,
    Drawn,
    concepts_of,
    drawn_at,
    pruned_of,
    read_concepts,
)
from compllm_rag.training.examples import Body, Branch, Example
from compllm_rag.training.job_options import LINEARS, CompressorOptions, DataOptions, DeepOptions
from compllm_rag.training.jobs import train_compressor
from compllm_rag.training.loop import train
from compllm_rag.training.material import Material, MaterialConfig
from compllm_rag.training.objective import log_probabilities
from compllm_rag.training.run_config import RunConfig
from trained import information
from training_samples import fresh as input_compressor
from training_samples import write_world

ARCHITECTURES = (*toy.ARCHITECTURES, "qwen2", "gemma2")
NO_LORA: dict[str, Any] = {"rank": 0, "alpha": 0, "modules": ()}
RUN = RunConfig(steps=6, batch=2, lr=5e-3, warmup=1, decay=1.0, validate_every=6, save_minutes=9, micro_tokens=400)
MIX = MaterialConfig(max_context=300, max_passages=4, distractors=0.5, qa=1.0, copy_share=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("data"), rows=40)


def fresh(llm: TargetLLM, layer: int = 1, **settings: Any) -> DeepCompressor:
    """An untrained compressor that can be trained; units are short, so that passages have several."""
    settings = {
        "lora_rank": 4, "lora_alpha": 8, "lora_modules": LINEARS,
        "read_rank": 4, "read_alpha": 8, "read_modules": LINEARS, "unit_length": 40,
        "prompt_rank": 2, "prompt_alpha": 4, "prompt_modules": LINEARS, "marked": True, **settings,
    }  # fmt: skip
    torch.manual_seed(0)
    return untrained_deep(llm, layer, information=information(llm), **settings)


def randomised(compressor: DeepCompressor) -> DeepCompressor:
    """With LoRA as after some training."""
    generator = torch.Generator().manual_seed(1)
    for tree in compressor.trees.values():
        for name, parameter in tree.named_parameters():
            if ".lora_B." in name:
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    if compressor.marker is not None:
        compressor.marker.data = 0.2 * torch.randn(compressor.marker.shape, generator=generator)
    return compressor


def task(world: Path, compressor: DeepCompressor | None = None, **options: Any) -> DeepTask:
    made = compressor or fresh(toy.llm())
    unit = made.config.unit_length
    return DeepTask(
        made, Material(*Material.files_of(world), made.segmenter, MIX, unit_length=unit), validation=2, **options
    )


def example(compressor: DeepCompressor) -> Example:
    """Two passages, the first of two units; two questions of several answer tokens."""
    opening = TextSpan(compressor.config.opening)
    one, two = Body((tuple(range(60, 82)), tuple(range(90, 107)))), Body((tuple(range(120, 151)),))
    branches = (Branch((30, 31, 32), (40, 41, 42)), Branch((35, 36), (50, 51)))
    return Example((opening, TextSpan((9, 10)), one, TextSpan((8, 6)), two, TextSpan((7,))), branches)


def as_generated(compressor: DeepCompressor, item: Drawn) -> torch.Tensor:
    """Log-probabilities behind each token of each branch but its last, as generation gives them: one plan a branch."""
    spans: list[Any] = []
    for part in item.example.prefix:
        if isinstance(part, TextSpan):
            spans.append(part)
            continue
        ks = item.ks[sum(isinstance(span, ConceptSpan) for span in spans)]
        rows = torch.cat(compressor.compress(part.segments, ks))
        spans.append(
            ConceptSpan(*unpacked(rows, part.segments, ks)[:1], 0, unpacked(rows, part.segments, ks)[1], len(part))
        )
    generator = LocalGenerator(compressor.llm, halves=compressor.halves)
    out = []
    for branch in item.example.branches:
        forward = generator.lay_out([PromptPlan((*spans, TextSpan(branch.prompt[:1])))])
        logits = [forward.prefill()]
        logits += [forward.extend(torch.tensor([[token]]))[:, -1] for token in (*branch.prompt, *branch.target)[1:-1]]
        out += logits
    return torch.cat(out).log_softmax(-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rate", [1.0, 2.5])
def test_what_is_trained_is_what_generation_reads(architecture: str, rate: float) -> None:
    # Gaps, several units and passages, branches, all LoRAs, marks; a window of 16 is shorter than a passage.
    made = randomised(fresh(toy.llm(architecture, layers=4), layer=2))
    other = Example(example(made).prefix[:3], example(made).branches[:1])  # a shorter row: padding in both halves
    items = [drawn_at(e, FixedRate(rate, 40)) for e in (example(made), other)]
    with torch.no_grad():
        mine = log_probabilities(made.llm, read_concepts(made, items))
    torch.testing.assert_close(mine, torch.cat([as_generated(made, item) for item in items]), atol=1e-4, rtol=1e-4)


def test_a_chunk_right_behind_the_opening_is_read_as_generation_reads_it() -> None:
    made = fresh(toy.llm())
    prefix = (TextSpan(made.config.opening), Body((tuple(range(60, 90)),)))
    item = drawn_at(Example(prefix, (Branch((30,), (40,)),)), FixedRate(1.0, 40))
    with torch.no_grad():
        mine = log_probabilities(made.llm, read_concepts(made, [item]))
        # Whole, the LLM would let the question see the chunk below the entry layer, too: another distribution.
        whole = made.llm.model(input_ids=torch.tensor([[*prefix[0].ids, *prefix[1].ids, 30]])).logits[0, -1:]
    torch.testing.assert_close(mine, as_generated(made, item), atol=1e-4, rtol=1e-4)
    assert (mine - whole.log_softmax(-1)).abs().max() > 0.01


def test_pruned_examples_keep_the_tokens_that_concepts_stand_for() -> None:
    made = fresh(toy.llm(), selector="information")
    item = drawn_at(example(made), FixedRate(2.0, 40))
    [cut], [spans] = pruned_of(made, [item]), concepts_of(made, [item])
    for body, pruned, span in zip(item.example.bodies, cut.example.bodies, spans, strict=True):
        assert pruned.ids == tuple(body.ids[place] for place in span.places.tolist())
    assert [len(body) for body in cut.example.bodies] == [11 + 9, 16]
    assert cut.example.branches == item.example.branches


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_the_loras_and_a_step_changes_nothing_else(world: Path, tmp_path: Path, frozen: bool) -> None:
    llm = toy.llm()
    base = {name: p.clone() for name, p in llm.model.named_parameters()}
    none = {f"{name}_{key}": value for name in ("read", "prompt") for key, value in NO_LORA.items()}
    made = fresh(llm, **(none if frozen else {}))
    mine = task(world, made, rates=(2.0,))
    item = mine.draw(random.Random(1))
    mine.loss(mine.module, [item]).total.backward()
    reached = {name for name, p in mine.module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    # A has no gradient as long as B is zero.
    assert reached == {name for name, _ in mine.module.named_parameters() if ".lora_B." in name or name == "marker"}
    assert {name.partition(".")[0] for name in reached} == {"decoder", "marker"} | (
        set() if frozen else {"upper", "lower"}
    )
    before = {name: tensor.clone() for name, tensor in made.state().items()}
    train(mine, RUN.model_copy(update={"steps": 2}), tmp_path)
    changed = {name for name, tensor in made.state().items() if not torch.equal(tensor, before[name])}
    assert changed == set(before) - {"information"}
    assert all(torch.equal(p, base[name]) for name, p in llm.model.named_parameters()), "the LLM is frozen"


def test_training_learns_a_tiny_set_and_beats_its_start(world: Path, tmp_path: Path) -> None:
    mine = task(world, rates=(1.0, 2.0))
    few = [mine.draw(random.Random(i)) for i in range(2)]
    mine.draw = lambda rng: few[rng.randrange(2)]
    mine.validation = [item.example for item in few]
    train(mine, RUN.model_copy(update={"steps": 40, "validate_every": 40, "lr": 1e-2}), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    losses = [r["loss"] for r in records if "loss" in r]
    first, last = [r["validation"] for r in records if "validation" in r]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    for rate in ("1", "2"):
        assert first[f"nll_concepts@{rate}"] == pytest.approx(first[f"nll_untrained@{rate}"], abs=1e-4)
        assert last[f"nll_concepts@{rate}"] < first[f"nll_concepts@{rate}"] - 0.3
        assert last[f"nll_untrained@{rate}"] == first[f"nll_untrained@{rate}"]
    assert first["nll_pruned@1"] == pytest.approx(first["nll_text"], abs=1e-4)
    assert last["score"] == pytest.approx(-(last["nll_concepts@1"] + last["nll_concepts@2"]) / 2)


def test_the_best_weights_are_kept_and_load_again(world: Path, tmp_path: Path) -> None:
    llm = toy.llm()
    mine = task(world, fresh(llm))
    scores = iter([1.0, 3.0, 2.0])
    kept: list[str] = []

    def validate(progress: Any) -> dict[str, float]:
        kept.append(mine.compressor.refresh_fingerprint())
        return {"score": next(scores)}

    mine.validate = validate
    train(mine, RUN.model_copy(update={"steps": 4, "validate_every": 2}), tmp_path)
    assert DeepCompressor.from_pretrained(tmp_path / "best", toy.llm()).fingerprint == kept[1] != kept[2]


def test_an_interrupted_run_resumes_to_the_same_weights(world: Path, tmp_path: Path) -> None:
    def slot(message: str, share: float | None) -> None:
        if message.startswith("step 2 of"):
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(task(world), RUN, tmp_path / "whole")["finished"]
    assert train(task(world), RUN, tmp_path / "slots", slot)["step"] == 2
    assert train(task(world), RUN, tmp_path / "slots")["finished"]
    whole, slots = (load_file(tmp_path / name / "last/weights.safetensors") for name in ("whole", "slots"))
    assert whole.keys() == slots.keys() and all(torch.equal(whole[name], slots[name]) for name in whole)


@pytest.mark.parametrize("rate", [1.0, 2.0])
def test_kept_tokens_are_marked_where_others_are_dropped(rate: float) -> None:
    made = randomised(fresh(toy.llm(), marked=True))
    unit = tuple(range(60, 90))
    places = made.kept_places([unit], [FixedRate(rate, 40).n_concepts([unit])[0]])
    marked = torch.cat(made.compress([unit], [len(places[0])]))
    made.marker.data.zero_()
    plain = torch.cat(made.compress([unit], [len(places[0])]))
    assert torch.equal(marked[:, -1], plain[:, -1]), "which tokens are kept is chosen by unmarked states"
    assert torch.equal(marked, plain) == (rate == 1.0)


def test_a_prompt_lora_and_marks_are_added_without_an_effect(toy_folder: Path, finished: Path) -> None:
    llm, folder = TargetLLM.from_pretrained(toy_folder), finished / "best"
    before = DeepCompressor.from_pretrained(folder, llm)
    more = going_on_from(folder, llm, DeepOptions(lora_rank=2, prompt_rank=3, marked=True))
    assert (more.config.prompt_rank, more.config.prompt_alpha, more.config.marked) == (3, 6, True)
    assert before.config.prompt_rank == 0 and more.fingerprint != before.fingerprint
    items = [drawn_at(example(before), FixedRate(rate, 40)) for rate in (1.0, 2.0)]
    with torch.no_grad():
        torch.testing.assert_close(read_concepts(more, items), read_concepts(before, items), atol=1e-5, rtol=1e-5)
    # Left out, what a run goes on from keeps what it has; asked for otherwise, it is refused.
    more.save_pretrained(folder.parent / "more")
    kept = going_on_from(folder.parent / "more", llm, DeepOptions(lora_rank=2))
    assert (kept.config.prompt_rank, kept.config.marked, kept.fingerprint) == (3, True, more.fingerprint)
    for options in (DeepOptions(lora_rank=2, prompt_rank=4), DeepOptions(lora_rank=2, marked=False)):
        with pytest.raises(ConfigurationError, match="of another kind"):
            going_on_from(folder.parent / "more", llm, options)
    alone = going_on_from(folder.parent / "more", llm, DeepOptions(lora_rank=2, frozen_upper=True))
    assert not alone.config.prompt_rank and alone.config.marked


def test_the_command_trains_a_prompt_lora_and_marks(world: Path, toy_folder: Path, tmp_path: Path) -> None:
    command(world, toy_folder, tmp_path / "out", "--prompt-rank", 2, "--marked", "--rates", 2)
    made = load_compressor(tmp_path / "out/final", TargetLLM.from_pretrained(toy_folder))
    assert isinstance(made, DeepCompressor) and made.config.prompt_rank == 2
    assert made.marker is not None and made.marker.abs().max() > 0
    assert any(t.abs().max() > 0 for name, t in made.state().items() if name.startswith("prompt.") and "lora_B" in name)
    error = command(world, toy_folder, tmp_path / "no", "--prompt-rank", 2, "--frozen-upper", code=2).stderr
    assert "leave --frozen-upper or --prompt-rank out" in error


def test_examples_draw_one_rate_each_and_have_up_to_so_many_passages(world: Path) -> None:
    mine = task(world, rates=(1.0, 3.0))
    drawn = [mine.draw(random.Random(i)) for i in range(60)]
    counts = {len(item.example.bodies) for item in drawn}
    assert min(counts) == 1 and 2 <= max(counts) <= 4, "gold alone, or distractors with it"
    for item in drawn:
        units = [unit for body in item.example.bodies for unit in body.segments]
        ks = [k for body in item.ks for k in body]
        assert max(map(len, units)) <= 40 and ks in ([len(u) for u in units], [-(-len(u) // 3) for u in units])
    assert any(len(body.segments) > 1 for item in drawn for body in item.example.bodies)
    assert len({tuple(k == len(u) for u, k in zip(i.example.bodies[0].segments, i.ks[0])) for i in drawn}) > 1


def test_what_cannot_be_trained_is_refused(world: Path) -> None:
    with pytest.raises(ConfigurationError, match="nothing to train"):
        task(world, fresh(toy.llm(), lora_rank=0, lora_alpha=0, lora_modules=()))
    with pytest.raises(ConfigurationError, match="compression rate makes no sense"):
        task(world, rates=(0.5,))


def command(world: Path, llm: Path, out: Path, *more: object, code: int = 0) -> Any:
    """`train deep` in a few steps."""
    words = ["train", "deep", "--data-dir", world, "--llm", llm, "--reader", "none", "--out", out, "--rank", 2]
    words += ["--steps", 2, "--batch", 2, "--validate-every", 1, "--validation", 2, "--max-context", 200, *more]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


@pytest.fixture(scope="module")
def finished(world: Path, toy_folder: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("deep")
    assert json.loads(command(world, toy_folder, out, "--json").stdout)["finished"]
    return out


def test_the_command_leaves_a_compressor_that_loads_and_answers(toy_folder: Path, finished: Path) -> None:
    made = load_compressor(finished / "best", TargetLLM.from_pretrained(toy_folder))
    assert isinstance(made, DeepCompressor)
    config = made.config
    assert (config.entry_layer, config.lora_rank, config.lora_alpha, config.read_rank) == (1, 2, 4, 2)
    [unit], k = made.spec.units("The lighthouse stands 42 metres tall."), 5
    states, places = unpacked(made.compress([unit], [k])[0], [unit], [k])
    plan = QAPrompt(made.llm.tokenizer).plan("How tall?", [("", [ConceptSpan(states, 0, places, len(unit))])])
    [answer] = LocalGenerator(made.llm, halves=made.halves).generate([plan])
    assert answer.token_ids
    card = (finished / "best/README.md").read_text()
    for fact in (
        "story.jsonl.gz",
        "2 steps of 2 examples",
        "concepts@1",
        "pruned@2",
        "untrained@2",
        "of deep concepts for",
    ):
        assert fact in card
    assert (finished / "curves.png").exists()


def test_going_on_from_a_compressor(world: Path, toy_folder: Path, finished: Path, tmp_path: Path) -> None:
    command(world, toy_folder, tmp_path / "out", "--from", finished / "best")
    looks = [r["validation"] for r in map(json.loads, (finished / "log.jsonl").open()) if "validation" in r]
    first = json.loads((tmp_path / "out/log.jsonl").read_text().splitlines()[0])["validation"]
    best = max(looks, key=lambda look: look["score"])
    assert first["nll_concepts@2"] == pytest.approx(best["nll_concepts@2"], abs=1e-3)
    assert first["nll_untrained@2"] == pytest.approx(best["nll_untrained@2"], abs=1e-3)


def test_units_of_another_length_are_trained_on(world: Path, toy_folder: Path, finished: Path, tmp_path: Path) -> None:
    command(world, toy_folder, tmp_path / "new", "--unit-length", 90)
    llm = TargetLLM.from_pretrained(toy_folder)
    for folder, options, length in (
        (tmp_path / "new/final", (), 90),
        (finished / "best", ("--unit-length", 120), 120),
        (tmp_path / "new/final", ("--unit-length", 40, "--frozen-upper"), 40),
    ):
        out = tmp_path / str(length)
        command(world, toy_folder, out, "--from", folder, *options)
        made = load_compressor(out / "final", llm)
        assert made.config.unit_length == length, "what is left out is as it was"
        assert made.config.read_rank == (0 if "--frozen-upper" in options else 2)
    error = command(world, toy_folder, tmp_path / "no", "--unit-length", 5000, code=2).stderr
    assert "unit-length" in error


def test_another_reader_wants_something_to_go_on_from(world: Path, toy_folder: Path, tmp_path: Path) -> None:
    error = command(world, toy_folder, tmp_path / "out", "--other-reader", code=2).stderr
    assert "nothing to go on from with another reader" in error and "--from" in error
    with pytest.raises(ConfigurationError, match="--init"):
        train_compressor(tmp_path / "out", DataOptions(data_dir=world), CompressorOptions(other_reader=True))
    assert not (tmp_path / "out").exists()


def test_going_on_with_another_reader(world: Path, toy_folder: Path, finished: Path, tmp_path: Path) -> None:
    llm = TargetLLM.from_pretrained(toy_folder)
    llm.digests = llm.digests | {"reader/adapter_model.safetensors": "another"}
    with pytest.raises(FingerprintMismatchError, match="--other-reader"):
        going_on_from(finished / "best", llm, DeepOptions(lora_rank=2))
    moved = going_on_from(finished / "best", llm, DeepOptions(lora_rank=2, other_reader=True))
    kept = DeepCompressor.from_pretrained(finished / "best", TargetLLM.from_pretrained(toy_folder))
    assert all(torch.equal(tensor, kept.state()[name]) for name, tensor in moved.state().items())
    assert moved.fingerprint != kept.fingerprint, "concepts for another reader are others"
    moved.save_pretrained(tmp_path)
    assert DeepCompressor.from_pretrained(tmp_path, llm).fingerprint == moved.fingerprint
    llm.source = "another-llm"
    with pytest.raises(FingerprintMismatchError, match="another LLM"):
        going_on_from(finished / "best", llm, DeepOptions(lora_rank=2, other_reader=True))


def test_a_frozen_upper_half_goes_on_from_the_writing_lora_alone(
    world: Path, toy_folder: Path, finished: Path, tmp_path: Path
) -> None:
    folder, llm = finished / "best", TargetLLM.from_pretrained(toy_folder)
    whole = DeepCompressor.from_pretrained(folder, llm)
    alone = going_on_from(folder, llm, DeepOptions(lora_rank=2, frozen_upper=True))
    assert whole.config.read_rank and not alone.config.read_rank
    kept = {name: tensor for name, tensor in whole.state().items() if not name.startswith("read.")}
    assert sorted(alone.state()) == sorted(kept) != sorted(whole.state())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in alone.state().items())
    command(world, toy_folder, tmp_path / "out", "--from", folder, "--frozen-upper")
    assert not DeepCompressor.from_pretrained(tmp_path / "out" / "best", llm).config.read_rank


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--entry-layer", 2], "entry_layer 1 in"),
        (["--lora-modules", "q_proj"], "lora_modules ("),
        (["--rank", 4], "lora_rank 2 in"),
    ],
)
def test_a_compressor_of_another_kind_is_not_gone_on_from(
    world: Path, toy_folder: Path, finished: Path, tmp_path: Path, more: list[object], message: str
) -> None:
    error = command(world, toy_folder, tmp_path, "--from", finished / "best", *more, code=2).stderr
    assert "is of another kind" in error and message in error
    assert not (tmp_path / "log.jsonl").exists()


def test_one_of_the_input_embeddings_and_other_settings_in_a_folder_are_refused(
    world: Path, toy_folder: Path, finished: Path, tmp_path: Path
) -> None:
    input_compressor(TargetLLM.from_pretrained(toy_folder)).save_pretrained(tmp_path / "input")
    error = command(world, toy_folder, tmp_path / "out", "--from", tmp_path / "input", code=2).stderr
    assert "no compressor of deep concepts" in error
    assert "kl: 0.5" in command(world, toy_folder, finished, "--kl", 0.5, code=2).stderr
    error = command(world, toy_folder, tmp_path / "out", "--questions", "squad_dev.jsonl", code=2).stderr
    assert "training on evaluation data is refused" in error


def test_bfloat16_of_the_frozen_llm_leaves_lora_in_float32(world: Path, toy_folder: Path, tmp_path: Path) -> None:
    command(world, toy_folder, tmp_path, "--dtype", "bfloat16", "--frozen-upper")
    made = load_compressor(tmp_path / "best", TargetLLM.from_pretrained(toy_folder, dtype="bfloat16"))
    assert (made.config.read_rank, made.llm.dtype) == (0, torch.bfloat16)
    assert {p.dtype for name, p in made.decoder.named_parameters() if ".lora_" in name} == {torch.float32}
