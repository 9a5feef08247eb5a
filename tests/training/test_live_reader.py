"""A reader trained along with the compressor: what is exported is what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.config import CompressorConfig
from compllm_rag.models.llm import TargetLLM, decoder_of
from compllm_rag.training.compressor_task import CompressorTask
from compllm_rag.training.live_reader import LiveReader
from compllm_rag.training.loop import train
from compllm_rag.training.reader_task import ReaderTask
from compllm_rag.training.run_config import RunConfig
from trained import information
from training_samples import LORA, material, write_world

RUN = RunConfig(steps=6, batch=3, lr=2e-2, warmup=1, validate_every=6, save_minutes=9)
MODULES = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("data"), rows=40)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def llm_folder(request, tmp_path_factory) -> Path:
    return toy.save(tmp_path_factory.mktemp("llm"), request.param)


@pytest.fixture(scope="module")
def former(llm_folder: Path, world: Path, tmp_path_factory) -> Path:
    llm = TargetLLM.from_pretrained(llm_folder)
    out = tmp_path_factory.mktemp("reader")
    train(ReaderTask(llm, material(llm, world), rank=3, modules=MODULES, validation=2), RUN, out)
    return out / "best"


def task(llm: TargetLLM, world: Path, former: Path | None, **options) -> CompressorTask:
    torch.manual_seed(0)
    live = LiveReader(llm, 2, former, MODULES)
    made = Compressor(llm, CompressorConfig(**LORA), information=information(llm))
    return CompressorTask(made, material(llm, world), validation=2, live=live, text_share=0.3, **options)


@pytest.mark.parametrize("with_former", [False, True])
def test_what_is_exported_is_what_was_trained(
    llm_folder: Path, former: Path, world: Path, tmp_path: Path, with_former: bool
) -> None:
    before = former if with_former else None
    llm = TargetLLM.from_pretrained(llm_folder, reader=before)
    made = task(llm, world, before)
    train(made, RUN, tmp_path / "run")
    made.export(tmp_path / "out")
    segments, ks = [tuple(range(5, 20)), tuple(range(30, 37))], [5, 7]
    ids = torch.tensor([[5, 9, 13, 40, 41]])
    again = TargetLLM.from_pretrained(llm_folder, reader=tmp_path / "out/reader")
    loaded = Compressor.from_pretrained(tmp_path / "out", again)
    with torch.no_grad():
        live, merged = (decoder_of(x.model)(input_ids=ids).last_hidden_state for x in (llm, again))
        bare = decoder_of(TargetLLM.from_pretrained(llm_folder, reader=before).model)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(merged, live, atol=2e-2, rtol=2e-2)
    assert (live - bare).abs().max() > 0.1, "training changed how the target reads"
    for mine, theirs in zip(made.compressor.compress(segments, ks), loaded.compress(segments, ks), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-2, rtol=2e-2)
    assert loaded.llm.identity != llm.identity and made.compressor.llm.digests == llm.digests


def test_the_teacher_is_the_target_as_it_was(llm_folder: Path, world: Path) -> None:
    llm = TargetLLM.from_pretrained(llm_folder)
    ids = torch.tensor([[5, 9, 13, 40, 41]])
    with torch.no_grad():
        before = llm.model(input_ids=ids).logits
        made = task(llm, world, None)
        for parameter in made.live.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        changed = llm.model(input_ids=ids).logits
        with made.live.off():
            torch.testing.assert_close(llm.model(input_ids=ids).logits, before)
            inside = made.compressor.compress([(5, 6, 7, 8)], [2])[0]
        outside = made.compressor.compress([(5, 6, 7, 8)], [2])[0]
    assert not torch.allclose(changed, before)
    torch.testing.assert_close(inside, outside)


def test_gradients_reach_reader_and_compressor_and_nothing_else(llm_folder: Path, world: Path) -> None:
    import random

    llm = TargetLLM.from_pretrained(llm_folder)
    made = task(llm, world, None)
    items = [made.draw(random.Random(i)) for i in range(12)]
    assert 0 < sum(item.ks is None for item in items) < 12
    made.loss(made.module, [item for item in items if item.ks is not None]).total.backward()
    groups = [p for g in made.parameter_groups(RUN) for p in g["params"]]
    assert len({id(p) for p in groups}) == len(groups)
    mine = {id(p) for p in groups}
    everything = {
        id(p): p for tree in (llm.model, made.compressor.decoder, made.compressor.head) for p in tree.parameters()
    }
    assert mine < set(everything)
    assert all((p.grad is not None) == (key in mine) for key, p in everything.items())


def test_it_resumes_to_the_same_weights(llm_folder: Path, world: Path, tmp_path: Path) -> None:
    whole = task(TargetLLM.from_pretrained(llm_folder), world, None)
    train(whole, RUN, tmp_path / "whole")

    def at_three(message: str, share: float | None) -> None:
        import os
        import signal

        if message.startswith("step 3 of"):
            os.kill(os.getpid(), signal.SIGTERM)

    train(task(TargetLLM.from_pretrained(llm_folder), world, None), RUN, tmp_path / "slots", at_three)
    train(task(TargetLLM.from_pretrained(llm_folder), world, None), RUN, tmp_path / "slots")
    last = [
        [r for r in map(json.loads, (tmp_path / name / "log.jsonl").open()) if "validation" in r][-1]["validation"]
        for name in ("whole", "slots")
    ]
    assert last[0] == {name: pytest.approx(value, rel=1e-5) for name, value in last[1].items()}


def test_what_text_loses_is_counted_from_before_the_reader_was_trained(llm_folder: Path, world: Path) -> None:
    made = task(TargetLLM.from_pretrained(llm_folder), world, None)
    begun = made.validate(lambda message, share: None)
    again = task(TargetLLM.from_pretrained(llm_folder), world, None)  # as a run that goes on finds itself
    for run in (made, again):
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in run.live.parameters():
                parameter.normal_(std=0.5)
    one, two = (run.validate(lambda message, share: None) for run in (made, again))
    assert one["score"] == two["score"] and one["nll_text"] != pytest.approx(begun["nll_text"])
    assert again._begun == pytest.approx(begun["nll_text"])
