"""Answers that follow a JSON schema, whatever the LLM would have liked to say."""

from __future__ import annotations

import json
import sys
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from compllm_rag import GenerationConfig, LocalGenerator, TargetLLM
from compllm_rag.errors import ConfigurationError, MissingExtraError
from compllm_rag.prompt import PromptPlan, TextSpan


class Building(BaseModel):
    kind: Literal["lighthouse", "museum"]
    lit: bool
    name: str = Field(max_length=6)


SCHEMA = json.dumps(Building.model_json_schema())


def plans(llm: TargetLLM) -> list[PromptPlan]:
    asked = ("Who built it?", "Where is the museum, and what does it keep?", "When?")
    return [PromptPlan((TextSpan(tuple(llm.tokenizer(text)["input_ids"])),)) for text in asked]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_answer_is_an_object_alone_and_in_a_batch(llm: TargetLLM, temperature: float) -> None:
    made = LocalGenerator(llm)
    seed = 3 if temperature else None
    config = GenerationConfig(max_new_tokens=200, json_schema=SCHEMA, temperature=temperature, seed=seed)
    answers = made.generate(plans(llm), config)
    for answer, plan in zip(answers, plans(llm), strict=True):
        assert answer.finish_reason == "stop"
        assert Building.model_validate(json.loads(answer.text, strict=False))
        assert "".join(made.stream(plan, config)) == answer.text
    # Without a schema it says something else.
    assert made.generate(plans(llm)[:1])[0].text[:1] != "{"


def test_the_extra_is_named_where_it_lacks(llm: TargetLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'compllm-rag\[structured\]'"):
        LocalGenerator(llm).generate(plans(llm)[:1], GenerationConfig(json_schema=SCHEMA))


def test_a_schema_that_is_none_is_refused(llm: TargetLLM) -> None:
    for schema in ("no JSON", '{"type": "nothing"}'):
        with pytest.raises(ConfigurationError, match="schema"):
            LocalGenerator(llm).generate(plans(llm)[:1], GenerationConfig(json_schema=schema))
