"""Run by vLLM's own Python (`test_vllm_deep.py`): its engine with this package's plugin reads deep concepts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from compllm_rag.config import GenerationConfig
from compllm_rag.errors import ConfigurationError, GeneratorMismatchError
from compllm_rag.generation.vllm.engine import VLLMEngineGenerator
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import ConceptSpan, PromptPlan, TextSpan
from vllm_in_process import refused


def plans_of(folder: Path) -> list[PromptPlan]:
    states, plans = load_file(folder / "states.safetensors"), []
    for spans in json.loads((folder / "plans.json").read_text()):
        made: list[TextSpan | ConceptSpan] = []
        for span in spans:
            ids = tuple(span["ids"])
            if "states" not in span:
                made.append(TextSpan(ids))
                continue
            places = torch.tensor(span["places"])
            made.append(ConceptSpan(states[span["states"]], 0, places, span["n_tokens"], ids))
        plans.append(PromptPlan(tuple(made)))
    return plans


def main(folder: Path, layer: int) -> None:
    from vllm import LLM

    llm = TargetLLM.from_pretrained(folder / "merged")
    limits = {"max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 512}
    engine = LLM(str(folder / "deep"), dtype="float32", enforce_eager=True, enable_prompt_embeds=True, **limits)
    limit = GenerationConfig(max_new_tokens=16)
    generator = VLLMEngineGenerator(engine, llm, limit, halves=Halves(llm, layer))
    plans, expected = plans_of(folder), json.loads((folder / "expected.json").read_text())
    for _ in range(2):  # the second time from the prefix cache
        found = [one.token_ids for one in generator.generate(plans)]
        assert found == expected, (found, expected)
    for plan, want in zip(plans, expected, strict=True):
        assert generator.generate([plan])[0].token_ids == want
    assert generator.generate([plans[-1]])[0].reused_positions == 128  # it fills a block
    unnamed = ConceptSpan(torch.zeros(1, llm.hidden_size), 0, torch.tensor([0]), 1)
    refused(ConfigurationError, lambda: generator.generate([PromptPlan((TextSpan((5,)), unnamed, TextSpan((6,))))]))
    refused(GeneratorMismatchError, lambda: VLLMEngineGenerator(engine, llm, limit))
    refused(GeneratorMismatchError, lambda: VLLMEngineGenerator(engine, llm, limit, halves=Halves(llm, layer + 1)))
    print("equal")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
