"""Branches behind one prefix must be what separate prompts would be."""

from __future__ import annotations

import pytest
import torch

import toy
from compllm_rag.models.llm import decoder_of
from compllm_rag.prompt import TextSpan
from compllm_rag.training.examples import Body, Branch, Example, pack, targets_of
from compllm_rag.training.objective import hidden_states
from training_samples import example


def alone(llm, ex: Example, number: int, concepts=None) -> torch.Tensor:
    """Hidden states that predict one branch's tokens, from a prompt of its own and no mask at all."""
    branch, rows = ex.branches[number], []
    given = iter(concepts or ())
    for part in ex.prefix:
        if isinstance(part, Body):
            rows.append(next(given) if concepts else llm.embed(part.ids))
        else:
            rows.append(llm.embed(part.ids))
    length = sum(map(len, rows))
    rows.append(llm.embed((*branch.prompt, *branch.target)))
    states = decoder_of(llm.model)(inputs_embeds=torch.cat(rows)[None], use_cache=False).last_hidden_state[0]
    n = len(branch.prompt) + len(branch.target)
    return states[length - (not branch.prompt) : length + n - 1]


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
@pytest.mark.parametrize("as_concepts", [False, True])
def test_branches_are_what_separate_prompts_would_be(architecture: str, as_concepts: bool) -> None:
    # A window of 16 is shorter than the examples: what slides must slide by position, not by place in the row.
    llm = toy.llm(architecture)
    examples = [example(0), Example((TextSpan((1, 2)), Body(((5, 6, 7),))), example(3).branches[:1])]
    concepts = None
    if as_concepts:
        generator = torch.Generator().manual_seed(0)
        concepts = [
            [torch.randn(max(1, len(b) // 2), llm.hidden_size, generator=generator) for b in e.bodies] for e in examples
        ]
    with torch.no_grad():
        made = hidden_states(llm, pack(examples, llm, concepts))[-1]
        expected = torch.cat(
            [
                alone(llm, e, n, concepts[i] if concepts else None)
                for i, e in enumerate(examples)
                for n in range(len(e.branches))
            ]
        )
    torch.testing.assert_close(made, expected, atol=2e-4, rtol=1e-3)


def test_targets_follow_the_order_of_the_predictions(llm) -> None:
    ex = example()
    targets = targets_of([ex, ex], prompt_weight=0.5, kind_weights={"copy": 2.0}, device=llm.device)
    packed = pack([ex, ex], llm)
    assert len(targets.ids) == len(packed.rows) == len(packed.columns) == 2 * (2 + 2 + 3 + 1)
    assert targets.ids.tolist()[:8] == [31, 32, 40, 41, 50, 51, 52, 60]
    assert targets.is_answer.tolist()[:8] == [False, False, True, True, True, True, True, True]
    assert targets.weights[targets.is_answer].sum() == pytest.approx(1.0)
    per = targets.weights[:8] / targets.weights[2]
    assert per.tolist() == pytest.approx([0.5, 0.5, 1, 1, 2 / 3, 2 / 3, 2 / 3, 4])
    assert [kind for kind, _ in targets.kinds] == ["qa", "continue", "copy"] * 2
    assert targets.ids[targets.kinds[1][1]].tolist() == [50, 51, 52]


def test_gradient_reaches_the_concepts_and_not_the_llm(llm) -> None:
    ex = example()
    concepts = [
        [torch.randn(2, llm.hidden_size, requires_grad=True), torch.randn(3, llm.hidden_size, requires_grad=True)]
    ]
    sum(state.sum() for state in hidden_states(llm, pack([ex], llm, concepts))).backward()
    assert all(c.grad is not None and c.grad.abs().sum() > 0 for c in concepts[0])
    assert all(p.grad is None for p in llm.model.parameters())


def test_targets_of_answers_alone_keep_their_kinds() -> None:
    branches = (Branch((30, 31, 32), (40, 41, 42)), Branch((), (50,), "copy"), Branch((35, 36), (60, 61)))
    targets = targets_of(
        [Example((TextSpan((1, 2)),), branches)], prompt_weight=0.0, kind_weights={}, device=torch.device("cpu")
    )
    alone = targets.answers()
    assert targets.ids.tolist() == [31, 32, 40, 41, 42, 50, 36, 60, 61]
    assert alone.ids.tolist() == [40, 41, 42, 50, 60, 61] and bool(alone.is_answer.all())
    assert [(kind, alone.ids[where].tolist()) for kind, where in alone.kinds] == [
        ("qa", [40, 41, 42]), ("copy", [50]), ("qa", [60, 61]),
    ]  # fmt: skip
    assert float(alone.weights.sum()) == pytest.approx(1.0)
