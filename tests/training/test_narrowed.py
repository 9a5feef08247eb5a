"""Training on narrowed prompts: what is trained is what generation reads, one question at a time."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import toy
from compllm_rag.compression.rates import FixedRate
from compllm_rag.config import Narrowing
from compllm_rag.errors import ConfigurationError
from compllm_rag.models.narrowing import NarrowedHalves
from compllm_rag.training.deep_task import drawn_at, read_concepts
from compllm_rag.training.examples import Example
from compllm_rag.training.job_options import LINEARS, DataOptions, DeepOptions
from compllm_rag.training.jobs import train_deep
from compllm_rag.training.loop import train
from compllm_rag.training.narrowed import narrowed_states, one_question
from compllm_rag.training.objective import log_probabilities
from tests.training import test_deep_task as deep
from training_samples import write_world

HALF = Narrowing(layer=3, share=0.5)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("data"), rows=40)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gemma2"])
@pytest.mark.parametrize("rate", [1.0, 2.5])
def test_what_is_trained_is_what_generation_reads(
    architecture: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Layer 1 of Gemma's toys sees all; several passages and units, a shorter row beside them.
    made = deep.randomised(deep.fresh(toy.llm(architecture, layers=4), layer=1))
    whole = deep.example(made)
    items = [
        replace(drawn_at(e, FixedRate(rate, 40)), narrowing=HALF)
        for e in (one_question(whole, 0), one_question(whole, 1), Example(whole.prefix[:3], whole.branches[:1]))
    ]
    parts = {HALF: NarrowedHalves(made.halves, HALF)}
    with torch.no_grad():
        mine = log_probabilities(made.llm, read_concepts(made, items, parts))
        unread = log_probabilities(made.llm, read_concepts(made, [replace(item, narrowing=None) for item in items]))
    assert not torch.allclose(mine, unread, atol=1e-3)
    theirs = torch.cat([as_generated(made, item) for item in items])
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def as_generated(made: deep.DeepCompressor, item: deep.Drawn) -> torch.Tensor:
    """Log-probabilities behind each token of the question and the answer, as a narrowed prompt's generation gives them.

    The whole question decides what goes on, so its own tokens are read by the prefill, and those before the last are
    looked at through the logits of the whole prefill.
    """
    from compllm_rag.generation.halves import split_rows
    from compllm_rag.generation.narrowed import NarrowedForward
    from compllm_rag.library import unpacked
    from compllm_rag.prompt import ConceptSpan, PromptPlan, TextSpan

    spans: list = []
    for part in item.example.prefix:
        if isinstance(part, TextSpan):
            spans.append(part)
            continue
        ks = item.ks[sum(isinstance(span, ConceptSpan) for span in spans)]
        rows = torch.cat(made.compress(part.segments, ks))
        held, places = unpacked(rows, part.segments, ks)
        spans.append(ConceptSpan(held, 0, places, len(part)))
    [branch] = item.example.branches
    plan = PromptPlan((*spans, TextSpan(branch.prompt)), HALF)
    narrowed = NarrowedHalves(made.halves, HALF)
    forward = NarrowedForward(narrowed, split_rows([plan]), [plan.asking])
    seen: list[torch.Tensor] = []
    hook = narrowed.top.register_forward_hook(lambda module, args, out: seen.append(out.logits))
    former, narrowed.through_top = narrowed.through_top, lambda *a, keep=0, **k: former(*a, **k)  # all slots' logits
    forward.prefill()
    hook.remove()
    asked = seen[0][0, -len(branch.prompt) :]  # (prompt, vocab_size)
    rest = [forward.extend(torch.tensor([[token]]))[0] for token in branch.target[:-1]]
    return torch.cat([asked, *rest]).log_softmax(-1)


def test_several_questions_are_refused() -> None:
    made = deep.fresh(toy.llm(layers=4), layer=1)
    item = drawn_at(deep.example(made), FixedRate(1.0, 40))
    with pytest.raises(ConfigurationError, match="asks one question"):
        narrowed_states(NarrowedHalves(made.halves, HALF), [item.example], [[]])


def test_a_run_draws_and_looks_at_narrowed_prompts(world: Path, tmp_path: Path) -> None:
    made = deep.fresh(toy.llm(layers=4), layer=1)
    mine = deep.task(world, made, narrowings=[HALF], narrowed=0.5)
    rng = random.Random(2)
    drawn = [mine.draw(rng) for _ in range(40)]
    narrowed = [item for item in drawn if item.narrowing is not None]
    assert 8 < len(narrowed) < 32 and all(len(item.example.branches) == 1 for item in narrowed)
    assert {mine.alike(item) for item in drawn} == {"", "3:0.5"}
    found = mine.validate(None)
    assert found["nll_narrowed 3:0.5@1"] != found["nll_concepts@1"]
    assert mine.module.training or any(p.requires_grad for p in mine.module.parameters())
    mine.loss(mine.module, narrowed[:2]).total.backward()
    reached = {n for n, p in mine.module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    layers = {name.split(".layers.")[1].split(".")[0] for name in reached if name.startswith("upper.")}
    assert layers == {"0", "1", "2"}  # below layer T, and from it on
    train(mine, deep.RUN, tmp_path / "run")
    assert (tmp_path / "run" / "best" / "config.json").exists()


def test_a_way_of_narrowing_is_part_of_the_job(world: Path, tmp_path: Path) -> None:
    llm = toy.save(tmp_path / "llm", layers=4)
    options = DeepOptions(
        llm=str(llm), reader=None, entry_layer=1, lora_rank=2, lora_modules=LINEARS[:2], validation=2,
        rates=(1.0,), narrow=("3:0.5",),
    )  # fmt: skip
    data = DataOptions(data_dir=world, material=deep.MIX)
    train_deep(tmp_path / "run", data, options, deep.RUN)
    job = json.loads((tmp_path / "run" / "job.json").read_text(encoding="utf-8"))
    assert "3:0.5" in json.dumps(job)
    with pytest.raises(ConfigurationError):
        train_deep(tmp_path / "run", data, options.model_copy(update={"narrow": ()}), deep.RUN)
    with pytest.raises(ConfigurationError, match="cannot be narrowed"):
        train_deep(tmp_path / "other", data, options.model_copy(update={"narrow": ("1:0.5",)}), deep.RUN)
    with pytest.raises(ConfigurationError, match="not understood"):
        train_deep(tmp_path / "other", data, options.model_copy(update={"narrow": ("half",)}), deep.RUN)
