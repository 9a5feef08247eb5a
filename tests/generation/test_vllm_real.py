"""Against the real vLLM (its CPU build, in an environment of its own): answers are the local generator's.

One server for all that is looked at, in one test: a start takes most of the time, and tests of a file may be shared out
among processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_index.core import Document

import toy
from compllm_rag import ConceptIndex
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.loading import untrained_deep
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import ConfigurationError, GeneratorMismatchError, PromptTooLongError
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.generation.vllm import VLLMGenerator, VLLMSettings
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import ConceptSpan, PromptPlan, TextSpan
from tests.vllm_environment import engine_environment, installed
from tests.vllm_servers import VLLMProcess
from toy_embedder import HashEmbedder

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]
LIMIT = GenerationConfig(max_new_tokens=16)
HEAD = 32  # the narrowest heads that vLLM computes on a CPU
SCHEMA = '{"enum": ["lamp", "oil"]}'
ROOT = Path(__file__).resolve().parents[2]


def plans_for(llm: TargetLLM) -> list[PromptPlan]:
    """Prompts of text, and prompts with concepts that are no token's embeddings."""
    ids = llm.tokenizer(toy.TEXT, add_special_tokens=False)["input_ids"]
    made = [PromptPlan((TextSpan(tuple(ids[at : at + length])),)) for at, length in ((0, 5), (7, 40), (3, 170))]
    compressor = Compressor(llm)
    for at, length in ((30, 60), (0, 260)):
        segments = [ids[i : i + 20] for i in range(at, at + length - 19, 20)]
        concepts = torch.cat(compressor.compress(segments, [10] * len(segments)))  # untrained: embeddings of tokens
        mixed = (concepts + concepts.flip(0)) / 2
        made.append(PromptPlan((TextSpan(tuple(ids[:9])), ConceptSpan(mixed, 0), TextSpan(tuple(ids[9:20])))))
    return made


def test_a_real_server(tmp_path: Path) -> None:
    python, toy_folder = installed(), toy.save(tmp_path / "toy", head=HEAD)
    llm = TargetLLM.from_pretrained(toy_folder)
    plans, local = plans_for(llm), LocalGenerator(llm, LIMIT)
    expected = local.generate(plans)
    with VLLMProcess(python, toy_folder, tmp_path / "vllm.log") as server:
        generator = VLLMGenerator(server.url, llm, LIMIT)
        assert generator.window == 1024
        answers_are_the_local_ones(generator, plans, expected)
        repeated_prompts_hit_the_prefix_cache(generator, plans, expected)
        a_cancelled_answer_ends_at_the_server(generator, server, plans)
        schemas_and_chance_are_heeded(generator, plans)
        what_does_not_fit_is_refused(generator, llm, server)
        an_index_answers_alike(llm, server, tmp_path)
        generator.close()


def answers_are_the_local_ones(generator: VLLMGenerator, plans: list[PromptPlan], expected: list) -> None:
    """Greedy answers, token for token: alone, as a batch, and from several threads."""
    for plan, want in zip(plans, expected, strict=True):
        stream = generator.stream(plan)
        pieces = list(stream)
        assert stream.result.token_ids == want.token_ids and len(want.token_ids) > 3
        assert "".join(pieces) == stream.result.text == want.text and len(pieces) > 1
        assert stream.result.finish_reason == want.finish_reason
    assert [one.token_ids for one in generator.generate(plans * 3)] == [one.token_ids for one in expected * 3]
    with ThreadPoolExecutor(5) as pool:
        made = list(pool.map(lambda plan: generator.generate([plan])[0].token_ids, plans))
    assert made == [one.token_ids for one in expected]


def repeated_prompts_hit_the_prefix_cache(generator: VLLMGenerator, plans: list[PromptPlan], expected: list) -> None:
    """The cache is on, embedded prompts hit it, and answers stay the same; another tenant's salt misses."""
    [again] = generator.generate([plans[-1]])  # it fills a block of 128 positions
    assert again.reused_positions == 128 and again.token_ids == expected[-1].token_ids
    other = VLLMGenerator(generator.client.url, generator.llm, LIMIT, settings=VLLMSettings(cache_salt="another"))
    [apart] = other.generate([plans[-1]])
    assert apart.reused_positions == 0 and apart.token_ids == expected[-1].token_ids
    other.close()


def a_cancelled_answer_ends_at_the_server(
    generator: VLLMGenerator, server: VLLMProcess, plans: list[PromptPlan]
) -> None:
    """Whether it is cancelled or left, the engine stops working on it."""
    long = GenerationConfig(max_new_tokens=700)
    cancel = threading.Event()
    stream = generator.stream(plans[0], long, cancel)
    for n, _ in enumerate(stream):
        if n == 2:
            cancel.set()
    assert stream.result.finish_reason in ("cancelled", "stop")
    left = generator.stream(plans[1], long)
    pieces = iter(left)
    next(pieces)
    pieces.close()
    deadline = time.monotonic() + 60
    while server.running():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert len(stream.result.token_ids) < 600 and len(left.result.token_ids) < 600


def schemas_and_chance_are_heeded(generator: VLLMGenerator, plans: list[PromptPlan]) -> None:
    for plan in (plans[0], plans[-1]):
        [made] = generator.generate([plan], GenerationConfig(max_new_tokens=40, json_schema=SCHEMA))
        assert json.loads(made.text) in ("lamp", "oil")
    drawn = GenerationConfig(max_new_tokens=16, temperature=1.5, seed=3)
    first, second = (generator.generate([plans[-1]], drawn)[0].token_ids for _ in range(2))
    assert first == second != generator.generate([plans[-1]])[0].token_ids


def what_does_not_fit_is_refused(generator: VLLMGenerator, llm: TargetLLM, server: VLLMProcess) -> None:
    with pytest.raises(PromptTooLongError, match="max-model-len"):
        generator.stream(PromptPlan((TextSpan((50,) * 1020),)))
    with pytest.raises(GeneratorMismatchError, match="another LLM"):
        VLLMGenerator(server.url, toy.llm(seed=1, head=HEAD), LIMIT).generate([PromptPlan((TextSpan((50, 60)),))])
    with pytest.raises(GeneratorMismatchError, match="expected nobody"):
        _ = VLLMGenerator(server.url, llm, settings=VLLMSettings(model="nobody")).window


def an_index_answers_alike(llm: TargetLLM, server: VLLMProcess, folder: Path) -> None:
    """The way users go: an address, a storage of concepts at the input embeddings, and one of deep concepts."""
    question = "Who built the lighthouse?"
    for codec, compressor in (("input", Compressor(llm)), ("deep", untrained_deep(llm))):
        storage = folder / codec
        with ConceptIndex.create(storage, embedder=HashEmbedder(), compressor=compressor, chunk_size=60) as index:
            index.ingest([Document(text=toy.TEXT, id_="rock.md")])
            here = {mode: str(index.as_query_engine(mode=mode).query(question)) for mode in ("text", "concepts")}
        own: dict[str, Any] = {"embedder": HashEmbedder(), "compressor": compressor}
        with ConceptIndex.load(storage, read_only=True, generator=f"vllm:{server.url}", **own) as index:
            assert str(index.as_query_engine(mode="text").query(question)) == here["text"]
            if codec == "input":
                streamed = index.as_query_engine(mode="concepts", streaming=True).query(question)
                assert "".join(streamed.response_gen) == here["concepts"]
            else:
                with pytest.raises(ConfigurationError, match="--codec input"):
                    index.as_query_engine(mode="concepts").query(question)


def test_the_engine_in_this_process() -> None:
    """Runs in vLLM's own environment, which has what generation needs of this package's requirements."""
    here = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment = engine_environment() | here
    words = [str(installed()), str(ROOT / "tests" / "vllm_in_process.py")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1400, check=False)
    assert done.returncode == 0 and done.stdout.endswith("equal\n"), done.stdout[-1000:] + done.stderr[-4000:]
