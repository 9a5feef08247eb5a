"""Merged LoRA and laid-out examples: the same losses and gradients as the training that they stand for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import toy
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import load_compressor
from compllm_rag.compression.rates import FixedRate
from compllm_rag.errors import UnsupportedModelError
from compllm_rag.models.adapters import lora_state
from compllm_rag.models.llm import TargetLLM, decoder_of
from compllm_rag.training.deep_task import DeepTask
from compllm_rag.training.laid_out import deep_rows, kept_by_scores, text_rows
from compllm_rag.training.material import Material
from compllm_rag.training.merged import DeepReading, Reading, Tree, Weights
from compllm_rag.training.reader_task import ReaderTask
from pipelines import train_on_gpu
from tests.training.test_deep_task import MIX, fresh, randomised
from training_samples import write_world

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("data"), rows=40)


def material_of(world: Path, made: DeepCompressor) -> Material:
    return Material(*Material.files_of(world), made.segmenter, MIX, unit_length=made.config.unit_length)


def tensors(arrays: dict) -> dict[str, torch.Tensor]:
    return train_on_gpu.on(CPU, arrays)


def assert_same_gradients(tree: Tree, live: torch.nn.Module) -> None:
    """Of merged weights and of PEFT's layers."""
    own = {name.replace(".default", ""): p.grad for name, p in live.named_parameters() if ".lora_" in name}
    assert own and len(own) == 2 * len(tree.a) * (tree.last - tree.first)
    for name, gradient in own.items():
        place = name[name.index("layers.") + len("layers.") :]
        layer, linear, side = int(place.split(".")[0]), ".".join(place.split(".")[1:3]), place.split("lora_")[1][0]
        mine = (tree.a if side == "A" else tree.b)[linear].grad[layer]
        assert (mine - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("rate", [1.0, 2.5])
def test_deep_concepts_have_the_loss_and_gradients_of_their_task(world: Path, rate: float) -> None:
    made = randomised(fresh(toy.llm(layers=4), layer=2))
    material = material_of(world, made)
    task = DeepTask(made, material, rates=(rate,), validation=1)
    items = [task.draw(random.Random(i)) for i in range(5)]
    loss = task.loss(task.module, items)
    loss.total.backward()

    weights = Weights(made.llm, CPU)
    config = made.config
    reading = DeepReading(weights, torch.float32, 2, config.lora_rank, config.prompt_rank, config.marked)
    for name, tree in reading.trees.items():
        tree.load(lora_state(made.trees[name]))
    reading.marker.data.copy_(made.marker.data)
    examples = [item.example for item in items]
    units = sorted({u for e in examples for b in e.bodies for u in b.segments}, key=len)
    scores = {unit: own.numpy() for unit, own in zip(units, made.scores(units), strict=True)}
    kept = [train_on_gpu.kept_of(scores, e, FixedRate(rate, config.unit_length)) for e in examples]
    batch = tensors(deep_rows(examples, kept, config.opening, sum(len(e.branches) for e in examples)))
    theirs, ours = reading.text(reading.teacher, batch, "text_"), reading.concepts(batch)
    kl = ((theirs.exp() * (theirs - ours)).sum(-1) * batch["text_weight"]).sum()
    ce = -(ours.gather(1, batch["text_target"][:, None])[:, 0] * batch["text_weight"]).sum()
    (kl + ce).backward()
    assert loss.parts == pytest.approx({"kl": float(kl), "ce": float(ce), "loss": float(kl + ce)}, rel=1e-4)
    for name, tree in reading.trees.items():
        tree.unmerge_gradients()
        assert_same_gradients(tree, made.trees[name])
    torch.testing.assert_close(reading.marker.grad, made.marker.grad, atol=1e-6, rtol=1e-3)
    assert reading.marker.grad.any() == (rate > 1), "where all are kept, none is marked"
    # A step of its own changes what is merged, and begins without gradients.
    before = reading.concepts(batch).detach()
    reading.trees["read"].b["mlp.down_proj"] += 0.1
    assert torch.equal(reading.concepts(batch), before)
    for tree in reading.trees.values():
        tree.merge()
    assert not torch.allclose(reading.concepts(batch), before)
    assert not any(gradient.any() for gradient in reading.trees["read"]._gradients.values())


def test_a_reader_has_the_loss_and_gradients_of_its_task(world: Path) -> None:
    llm = toy.llm(layers=3)
    weights = Weights(llm, CPU)
    task = ReaderTask(llm, material_of(world, fresh(toy.llm())), rank=2)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in decoder_of(llm.model).named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    items = [task.draw(random.Random(i)) for i in range(4)]
    loss = task.loss(task.module, items)
    loss.total.backward()
    tree = Tree(weights, 0, 3, torch.float32, 2)
    # As an adapter with half the alpha would have them.
    tree.load({k: t * 2 if "lora_B" in k else t for k, t in lora_state(decoder_of(llm.model)).items()}, times=0.5)
    batch = tensors(text_rows(items, sum(len(item.branches) for item in items)))
    said = Reading(weights, torch.float32).text(tree, batch).gather(1, batch["target"][:, None])[:, 0]
    mine = -(said * batch["weight"]).sum()
    mine.backward()
    tree.unmerge_gradients()
    assert float(mine.detach()) == pytest.approx(float(loss.total.detach()), rel=1e-4)
    assert_same_gradients(tree, decoder_of(llm.model))
    again = {name: tensor for name, tensor in tree.state().items() if "lora_A" in name}
    assert all(torch.equal(t, lora_state(decoder_of(llm.model))[name]) for name, t in again.items())


def test_places_are_kept_as_the_compressor_keeps_them(world: Path) -> None:
    made = fresh(toy.llm())
    units = [tuple(range(60, 90)), (7, 7, 7, 7, 9), (5,)]
    scores = {unit: own.numpy() for unit, own in zip(units, made.scores(units), strict=True)}
    for k in (1, 2, 4):
        counts = [min(k, len(unit)) for unit in units]
        mine = [kept_by_scores(scores, unit, count) for unit, count in zip(units, counts, strict=True)]
        assert mine == made.kept_places(units, counts)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "mistral", "qwen2"])
def test_other_architectures_are_refused(architecture: str) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be trained with merged LoRA"):
        Weights(toy.llm(architecture), CPU)


def test_both_stages_leave_adapters_that_load(
    world: Path, toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # From adapters without an effect; two steps each, a worker lays them out.
    llm = TargetLLM.from_pretrained(toy_folder)
    before = fresh(llm, prompt_rank=0, prompt_alpha=0, prompt_modules=(), marked=False)
    before.save_pretrained(tmp_path / "deep")
    ReaderTask(toy.llm(), material_of(world, before), rank=2).export(tmp_path / "reader")
    words = ["--data-dir", world, "--llm", toy_folder, "--reader", tmp_path / "reader", "--deep", tmp_path / "deep"]
    words += ["--out", tmp_path / "out", "--batch", 2, "--most-steps", 2, "--windows", 3, "--held-out", 2]
    words += ["--workers", 1, "--prompt-rank", 2, "--marked", "--reader-minutes", 9, "--deep-minutes", 9]
    train_on_gpu.main(list(map(str, words)))
    reader = tmp_path / "out/reader"
    made = load_compressor(tmp_path / "out/deep", TargetLLM.from_pretrained(toy_folder, reader=reader))
    assert isinstance(made, DeepCompressor)
    assert (made.config.prompt_rank, made.config.marked, made.config.lora_rank) == (2, True, 4)
    assert all(t.any() for name, t in made.state().items() if "lora_B" in name or name == "marker")
    said = (tmp_path / "out/log.txt").read_text()
    assert "deep, step 2, rate 2" in said and said == capsys.readouterr().out
    train_on_gpu.main(list(map(str, words)))
    assert "reader: done before" in capsys.readouterr().out
    (tmp_path / "out/deep.done").unlink()  # as after an interruption
    train_on_gpu.main(list(map(str, words)))
    again = load_compressor(tmp_path / "out/deep", made.llm)
    assert "deep: goes on from" in capsys.readouterr().out and again.fingerprint != made.fingerprint
