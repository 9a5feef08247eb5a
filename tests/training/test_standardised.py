"""The head as it is trained is, as a function, the head as it ships."""

from __future__ import annotations

import pytest
import torch

import toy
from compllm_rag.training.standardised import StandardisedHead, plain_head, standardise
from trained import trained

SEGMENTS = [tuple(range(5 + i, 5 + i + n)) for i, n in enumerate((3, 20, 7, 12, 20, 15, 9) * 6)]
KS = [max(1, len(s) // 2) for s in SEGMENTS]


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_concepts_stay_the_same_there_and_back(architecture: str) -> None:
    made = trained(toy.llm(architecture))
    before, plain = made.compress(SEGMENTS, KS), made.head
    standardise(made, SEGMENTS, KS)
    assert isinstance(made.head, StandardisedHead)
    inside = made.compress(SEGMENTS, KS)
    with plain_head(made):
        assert type(made.head) is torch.nn.Linear
        torch.testing.assert_close(made.head.weight, plain.weight, atol=1e-5, rtol=1e-4)
        after = made.compress(SEGMENTS, KS)
    for one, two, three in zip(before, inside, after, strict=True):
        torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(three, one, atol=1e-4, rtol=1e-4)


def test_inputs_have_no_mean_and_unit_spread() -> None:
    made = trained(toy.llm())
    standardise(made, SEGMENTS, KS)
    seen: list[torch.Tensor] = []
    made.head.weight.data = torch.eye(made.hidden_size)
    made.head.bias.data.zero_()
    made.head.register_forward_hook(lambda module, given, out: seen.append(out.detach()))
    for segment, k in zip(SEGMENTS, KS, strict=True):
        made.compress([segment], [k])
    states = torch.cat([s.flatten(0, 1) for s in seen])
    torch.testing.assert_close(states.mean(0), torch.zeros(made.hidden_size), atol=1e-3, rtol=0)
    torch.testing.assert_close(states.std(0), torch.ones(made.hidden_size), atol=1e-2, rtol=0)
