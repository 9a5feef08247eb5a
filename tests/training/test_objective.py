"""Each part of the objective, against values worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from compllm_rag.training.examples import pack, targets_of
from compllm_rag.training.objective import (
    ObjectiveConfig,
    answer_loss,
    distillation_loss,
    hidden_states,
    last_hidden_state,
    nll_by_kind,
)
from training_samples import example


@pytest.fixture(scope="module")
def batch(llm):
    examples = [example(0), example(2)]
    targets = targets_of(examples, prompt_weight=0.2, kind_weights={}, device=llm.device)
    generator = torch.Generator().manual_seed(1)
    concepts = [[torch.randn(2, llm.hidden_size, generator=generator) for _ in e.bodies] for e in examples]
    with torch.no_grad():
        teacher = hidden_states(llm, pack(examples, llm))
        student = hidden_states(llm, pack(examples, llm, concepts))
    return examples, targets, teacher, student


def test_same_states_cost_nothing_but_the_answer_itself(llm, batch) -> None:
    _, targets, teacher, _ = batch
    parts = distillation_loss(llm, teacher, teacher, targets, ObjectiveConfig()).parts
    assert parts["hidden"] == 0 and parts["kl"] == pytest.approx(0, abs=1e-6) and parts["ce"] > 0


def test_parts_are_what_the_paper_says(llm, batch) -> None:
    _, targets, teacher, student = batch
    parts = distillation_loss(llm, teacher, student, targets, ObjectiveConfig()).parts
    per_layer = [
        (F.smooth_l1_loss(s / t.std(), t / t.std(), beta=1.0, reduction="none").mean(1) * targets.weights).sum()
        for s, t in zip(student, teacher, strict=True)
    ]
    assert parts["hidden"] == pytest.approx(float(sum(per_layer)) / len(per_layer), rel=1e-5)
    head = llm.model.get_output_embeddings()
    p, q = head(teacher[-1]).softmax(-1), head(student[-1]).softmax(-1)
    kl = ((p * (p.log() - q.log())).sum(1) * targets.weights).sum()
    assert parts["kl"] == pytest.approx(float(kl), rel=1e-4)


@pytest.mark.parametrize("part", ["hidden", "kl", "ce"])
def test_each_part_can_stand_alone(llm, batch, part: str) -> None:
    _, targets, teacher, student = batch
    whole = distillation_loss(llm, teacher, student, targets, ObjectiveConfig(hidden=1, kl=1, ce=1)).parts
    only = ObjectiveConfig(**{"hidden": 0, "kl": 0, "ce": 0, part: 2.0})
    made = distillation_loss(llm, teacher, student, targets, only)
    assert float(made.total) == pytest.approx(2 * whole[part], rel=1e-5)


def test_question_tokens_count_only_where_asked(llm, batch) -> None:
    examples, _, teacher, student = batch
    targets = targets_of(examples, prompt_weight=0.0, kind_weights={}, device=llm.device)
    read = ~targets.is_answer
    moved = [torch.where(read[:, None], s + 100.0, s) for s in student]
    config = ObjectiveConfig(prompt=0.0)
    assert distillation_loss(llm, teacher, moved, targets, config).parts["hidden"] == pytest.approx(
        distillation_loss(llm, teacher, student, targets, config).parts["hidden"], rel=1e-6
    )


def test_answer_loss_and_nll_agree_with_the_models_own(llm) -> None:
    ex = example()
    one = type(ex)(ex.prefix, ex.branches[:1])
    targets = targets_of([one], prompt_weight=0.2, kind_weights={}, device=llm.device)
    with torch.no_grad():
        hidden = last_hidden_state(llm, pack([one], llm))
        ids = [t for part in one.prefix for t in part.ids]
        ids += [*one.branches[0].prompt, *one.branches[0].target]
        labels = [-100] * (len(ids) - 2) + ids[-2:]
        expected = llm.model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
    assert float(answer_loss(llm, hidden, targets)) == pytest.approx(float(expected), rel=1e-4)
    assert nll_by_kind(llm, hidden, targets) == {"qa": (pytest.approx(2 * float(expected), rel=1e-4), 2)}
