"""Sampled decoding: what transformers' `generate` would choose from, the same in a batch as alone; greedy unchanged."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from compllm_rag import GenerationConfig, LocalGenerator, TargetLLM
from compllm_rag.config import checked
from compllm_rag.errors import ConfigurationError
from compllm_rag.generation.sampling import Choice
from compllm_rag.prompt import PromptPlan, TextSpan

SAMPLED: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.4, "top_p": 0.95, "top_k": 80, "seed": 5}


def plan(llm: TargetLLM, text: str = "Who built the lighthouse?") -> PromptPlan:
    return PromptPlan((TextSpan(tuple(llm.tokenizer(text)["input_ids"])),))


def test_a_seed_gives_one_answer_alone_streamed_and_in_any_batch(llm: TargetLLM) -> None:
    made, config = LocalGenerator(llm), GenerationConfig(**SAMPLED)
    plans = [plan(llm), plan(llm, "Where?"), plan(llm, "When did Marsh die, and who was with her?")]
    alone = [made.generate([one], config)[0].text for one in plans]
    assert [answer.text for answer in made.generate(plans, config)] == alone
    assert ["".join(made.stream(one, config)) for one in plans] == alone
    others = {made.generate([plan(llm)], config.model_copy(update={"seed": seed}))[0].text for seed in range(8)}
    assert len(others) > 4
    unseeded = GenerationConfig(max_new_tokens=10, temperature=1.4)
    assert len({made.generate([plan(llm)], unseeded)[0].text for _ in range(4)}) > 1


def test_chosen_as_transformers_does(llm: TargetLLM) -> None:
    """Of 400 first tokens, none lies outside what top_k and top_p leave, and all that is likely occurs."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03]]))

    def drawn(**settings: Any) -> Counter[int]:
        return Counter(Choice(GenerationConfig(seed=seed, **settings), 1)(logits)[0] for seed in range(400))

    assert set(drawn(temperature=1.0)) == {0, 1, 2, 3, 4}
    assert set(drawn(temperature=1.0, top_k=2)) == {0, 1}
    assert set(drawn(temperature=1.0, top_p=0.85)) == {0, 1, 2}
    assert drawn(temperature=0.3)[0] > drawn(temperature=1.0)[0] > drawn(temperature=3.0)[0]
    assert 170 < drawn(temperature=1.0)[0] < 230


def test_repetition_penalty_is_that_of_transformers(llm: TargetLLM) -> None:
    """On the tokens of the answer, as `generate` has it for prompts that are embeddings."""
    one, limit = plan(llm), 16
    embeds = llm.embedding(torch.tensor([one.spans[0].ids]))
    with torch.inference_mode():
        expected = llm.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=limit,
            do_sample=False,
            repetition_penalty=1.7,
        )[0].tolist()
    [made] = LocalGenerator(llm).generate([one], GenerationConfig(max_new_tokens=limit, repetition_penalty=1.7))
    assert made.token_ids == [token for token in expected if token not in llm.stop_ids()]
    [plain] = LocalGenerator(llm).generate([one], GenerationConfig(max_new_tokens=limit))
    assert made.token_ids != plain.token_ids


def test_greedy_takes_the_logits_as_they_are() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]], dtype=torch.bfloat16)
    assert Choice(GenerationConfig(), 2)(logits) == logits.argmax(-1).tolist()
    before = logits.clone()
    Choice(GenerationConfig(temperature=0.5, repetition_penalty=1.5, seed=1), 2)(logits)
    assert torch.equal(before, logits)


@pytest.mark.parametrize(
    "settings",
    [{"top_p": 0.5}, {"top_k": 4}, {"seed": 1}, {"temperature": -1}, {"temperature": 1, "top_p": 0}, {"top_q": 1}],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GenerationConfig(**settings)


@pytest.mark.parametrize("wrong", [{"temperature": math.inf}, {"temperature": 1e-40}, {"seed": 2**64}, {"seed": -1}])
def test_settings_beyond_what_can_be_drawn_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="makes no sense"):
        checked(GenerationConfig, **{"temperature": 1.0, **wrong})
    GenerationConfig(temperature=1e-6, seed=2**63 - 1)
