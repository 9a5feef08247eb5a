"""Run by vLLM's own Python (`test_vllm_real.py`): the engine in this process answers as transformers does."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import torch

import toy
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import ConfigurationError, GeneratorMismatchError, PromptTooLongError
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.generation.vllm.engine import VLLMEngineGenerator
from compllm_rag.prompt import ConceptSpan, PromptPlan, TextSpan

LIMIT = GenerationConfig(max_new_tokens=16)
HEAD = 32  # the narrowest heads that vLLM computes on a CPU


def refused(kind: type[Exception], work: object) -> None:
    try:
        work()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def main() -> None:
    from vllm import LLM

    llm = toy.llm(head=HEAD)
    ids = tuple(llm.tokenizer(toy.TEXT, add_special_tokens=False)["input_ids"])
    concepts = (llm.embed(ids[40:80]) + llm.embed(ids[80:120])) / 2  # (40, hidden_size), no token's embeddings
    plans = [
        PromptPlan((TextSpan(ids[:30]),)),
        PromptPlan((TextSpan(ids[:9]), ConceptSpan(concepts, 0), TextSpan(ids[9:20]))),
        PromptPlan((TextSpan(ids[:9]), ConceptSpan(concepts[:7], 0), TextSpan(ids[30:34]))),
    ]
    expected = LocalGenerator(llm, LIMIT).generate(plans)
    with tempfile.TemporaryDirectory() as folder:
        model = str(toy.save(Path(folder), head=HEAD))
        limits = {"max_model_len": 512, "max_num_seqs": 4}
        engine = LLM(model, dtype="float32", enforce_eager=True, enable_prompt_embeds=True, **limits)
        generator = VLLMEngineGenerator(engine, llm, LIMIT)
        assert [one.token_ids for one in generator.generate(plans)] == [one.token_ids for one in expected]
        for plan, want in zip(plans, expected, strict=True):
            stream = generator.stream(plan)
            pieces = list(stream)
            assert stream.result.token_ids == want.token_ids and "".join(pieces) == want.text
            assert stream.result.finish_reason == want.finish_reason and len(pieces) > 1
        cancel = threading.Event()
        stream = generator.stream(plans[1], GenerationConfig(max_new_tokens=300), cancel)
        for _ in stream:
            cancel.set()
        assert len(stream.result.token_ids) < 20
        assert generator.generate(plans)[2].token_ids == expected[2].token_ids  # nothing of it is left
        refused(PromptTooLongError, lambda: generator.stream(PromptPlan((TextSpan((50,) * 510),))))
        deep = ConceptSpan(torch.zeros(1, 32), 0, places=torch.tensor([0]), n_tokens=1)
        refused(ConfigurationError, lambda: generator.stream(PromptPlan((deep, TextSpan((5,))))))
        refused(GeneratorMismatchError, lambda: VLLMEngineGenerator(engine, toy.llm(seed=1, head=HEAD)))
    print("equal")


if __name__ == "__main__":
    main()
