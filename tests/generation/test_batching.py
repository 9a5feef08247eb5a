"""Answers decoded beside others are those of each alone, and what happens to one does not happen to the others."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import toy
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import ConfigurationError, DeviceMemoryError, InvalidConceptsError, OverloadedError
from compllm_rag.generation.batching import BatchingGenerator
from compllm_rag.generation.forward import last_of
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.generation.reuse import PrefixCache
from compllm_rag.generation.row_cache import RowCache, RowLayer
from compllm_rag.generation.rows import SingleSteps, SplitSteps, WholeSteps
from compllm_rag.generation.scheduler import Scheduler
from compllm_rag.metrics import exposition
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import ConceptSpan, PromptPlan, TextSpan
from tests.generation.test_reuse import ARCHITECTURES, deep_of, library_of, text, turn

LIMIT = GenerationConfig(max_new_tokens=10)


def pair(architecture: str = "llama", **options: Any) -> tuple[LocalGenerator, BatchingGenerator]:
    """A generator, and one over the same LLM that decodes answers together."""
    compressor = deep_of(architecture)
    local = LocalGenerator(compressor.llm, LIMIT, halves=compressor.halves)
    return local, BatchingGenerator.over(local, Scheduler(**options))


def plans_of(architecture: str) -> list[PromptPlan]:
    """Text, concepts among the input embeddings, and deep concepts at two rates; all of other lengths."""
    library, sparse = library_of(architecture), library_of(architecture, 2.5)
    concepts = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    return [
        turn(library, (), (0, 1), 70),
        text(*range(40, 75)),
        turn(sparse, (80, 81), (2,), 71),
        PromptPlan((TextSpan((50, 51)), ConceptSpan(concepts, 0), TextSpan((60, 2)))),
    ]


def alone(
    local: LocalGenerator, plans: Sequence[PromptPlan], config: GenerationConfig | None = None
) -> list[list[int]]:
    return [local.generate([plan], config)[0].token_ids for plan in plans]


def until(true: Callable[[], bool], limit: float = 120) -> None:
    deadline = time.monotonic() + limit
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def idle(generator: BatchingGenerator) -> bool:
    scheduler = generator.scheduler
    return scheduler._thread is None and not scheduler._active and not scheduler._queue


class Turnstile:
    """Lets a scheduler take a step only when the test says so."""

    def __init__(self, generator: BatchingGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open, self._turns, stock = False, threading.Semaphore(0), generator.scheduler._decode

        def decode() -> None:
            while not (self._open or self._turns.acquire(timeout=0.01)):
                pass
            stock()

        monkeypatch.setattr(generator.scheduler, "_decode", decode)

    def turns(self, n: int) -> None:
        for _ in range(n):
            self._turns.release()

    def open(self) -> None:
        self._open = True


# The same answers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_those_of_each_alone(architecture: str) -> None:
    """Sliding windows of 16 slots are shorter than the prompts; a prompt is read in parts of 7."""
    local, batching = pair(architecture, part=7)
    plans = plans_of(architecture)
    assert [plan.deep for plan in plans] == [True, False, True, False]
    made = batching.generate(plans)
    for each, plan in zip(made, plans, strict=True):
        [wanted] = local.generate([plan])
        assert (each.token_ids, each.text, each.finish_reason) == (wanted.token_ids, wanted.text, wanted.finish_reason)
        assert each.prompt_positions == plan.positions and len(each.token_ids) > 1
        assert min(each.layout_s, each.prefill_s, each.decode_s) > 0
    assert {type(steps) for _, steps in batching.scheduler._steps} == {WholeSteps, SplitSteps}
    told = exposition(batching.scheduler.measures.collect())
    assert "compllm_batch_wait_seconds_count 4.0" in told
    assert 'compllm_batch_step_rows_bucket{le="1.0"} ' in told and "compllm_batch_rows 0.0" in told
    until(lambda: idle(batching))


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2"])
def test_a_prompt_read_in_parts_is_read_as_a_whole(architecture: str) -> None:
    local, _ = pair(architecture)
    for plan in plans_of(architecture):
        wanted = local.lay_out([plan]).prefill()
        parts = list(local.lay_out([plan]).prefill_parts(most=4))
        assert all(part is None for part in parts[:-1]) and len(parts) > 1
        assert torch.allclose(parts[-1], wanted, atol=1e-4 * float(wanted.abs().max()))
    kept = LocalGenerator(local.llm, LIMIT, halves=local.halves, prefixes=PrefixCache())
    for plan in plans_of(architecture)[:2] * 2:
        wanted = local.lay_out([plan]).prefill()
        got = last_of(kept.lay_out([plan]).prefill_parts(most=4))
        assert torch.allclose(got, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_one_joins_while_others_run_and_one_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    local, batching = pair(rows=2)
    plans = plans_of("llama")
    limits = [GenerationConfig(max_new_tokens=n) for n in (10, 3, 12, 1)]
    turnstile = Turnstile(batching, monkeypatch)
    streams = [batching.stream(plan, limit) for plan, limit in zip(plans, limits, strict=True)]
    pieces = [iter(stream) for stream in streams]
    streams[0].begin()
    turnstile.turns(4)
    until(lambda: [request._made for request in batching.scheduler._active] == [4])
    for stream in streams[1:]:
        stream.begin()
    turnstile.turns(3)
    until(lambda: len(batching.scheduler._queue) == 2)  # one has joined, the others wait for a place
    turnstile.open()
    for stream, own in zip(streams, pieces, strict=True):
        assert "".join(own) == stream.result.text
    wanted = [alone(local, [plan], limit)[0] for plan, limit in zip(plans, limits, strict=True)]
    assert [stream.result.token_ids for stream in streams] == wanted
    assert streams[3].result.queue_s > 0


def test_each_is_decoded_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    local, batching = pair()
    [plan] = plans_of("llama")[1:2]
    free = local.generate([plan])[0]
    configs = [
        LIMIT,
        GenerationConfig(max_new_tokens=8, temperature=1.3, top_p=0.9, seed=5),
        GenerationConfig(max_new_tokens=8, temperature=0.8, top_k=20, seed=6),
        GenerationConfig(max_new_tokens=6, repetition_penalty=1.7),
        GenerationConfig(max_new_tokens=10, stop=(free.text[4:6],)),
    ]
    with ThreadPoolExecutor(len(configs)) as threads:
        made = list(threads.map(lambda config: batching.generate([plan], config)[0], configs))
    for each, config in zip(made, configs, strict=True):
        [wanted] = local.generate([plan], config)
        assert (each.token_ids, each.text, each.finish_reason) == (wanted.token_ids, wanted.text, wanted.finish_reason)
    assert made[-1].finish_reason == "stop"
    stop = next(token for token in free.token_ids[2:] if token not in free.token_ids[:2])
    monkeypatch.setattr(local.llm.model.generation_config, "eos_token_id", [stop])
    made = batching.generate([plan, plan])
    assert [each.token_ids for each in made] == [free.token_ids[: free.token_ids.index(stop)]] * 2
    assert {each.finish_reason for each in made} == {"stop"}


def test_prompts_go_on_with_earlier_ones() -> None:
    local, _ = pair()
    batching = BatchingGenerator(local.llm, LIMIT, halves=local.halves, prefixes=PrefixCache())
    library = library_of("llama")
    plans = [turn(library, (), (0, 1), question) for question in (70, 71)]
    first, again = batching.generate(plans[:1])[0], batching.generate(plans[1:])[0]
    assert [first.token_ids, again.token_ids] == alone(local, plans)
    assert first.reused_positions == 0 < again.reused_positions == plans[0].positions - 2


# Giving up, and trouble


def test_who_gives_up_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    local, batching = pair()
    plans, cancel = plans_of("llama"), threading.Event()
    turnstile = Turnstile(batching, monkeypatch)
    given_up, stays, cancelled = (
        batching.stream(plans[0]), batching.stream(plans[1]), batching.stream(plans[2], cancel=cancel),
    )  # fmt: skip
    for stream in (given_up, stays, cancelled):
        stream.begin()
    turnstile.turns(6)
    until(lambda: len(batching.scheduler._active) == 3 and batching.scheduler._active[2]._made >= 2)
    pieces = iter(given_up)
    next(pieces)
    pieces.close()  # as when a caller walks away
    cancel.set()
    turnstile.turns(1)
    until(lambda: len(batching.scheduler._active) == 1)
    turnstile.open()
    assert "".join(stays) == stays.result.text
    assert stays.result.token_ids == alone(local, [plans[1]])[0]
    assert list(stays) == []  # nothing comes a second time, and nobody waits for it
    assert list(cancelled) == []
    assert given_up.result.finish_reason == cancelled.result.finish_reason == "cancelled"
    assert len(given_up.result.token_ids) < LIMIT.max_new_tokens
    until(lambda: idle(batching))


def test_nothing_is_queued_before_a_stream_is_read() -> None:
    _, batching = pair()
    stream = batching.stream(text(50, 51))
    assert stream.result.finish_reason == "cancelled" and idle(batching)
    stop = threading.Event()
    stop.set()
    stream = batching.stream(text(50, 51), cancel=stop)
    assert (list(stream), stream.result.token_ids, stream.result.finish_reason) == ([], [], "cancelled")


def test_an_error_is_that_of_one_answer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    local, batching = pair()
    plans = [text(*range(40, 75)), text(99, 50, 51), text(*range(60, 80)), text(50, 60, 70)]
    wide = PromptPlan((TextSpan((50,)), ConceptSpan(torch.zeros(2, 31), 0), TextSpan((60,))))
    stock = WholeSteps.step

    def step(self: WholeSteps, rows: Sequence[Any], tokens: Sequence[int]) -> torch.Tensor:
        if any(row.position == 5 for row in rows):
            raise RuntimeError("the short one, in its third step")
        return stock(self, rows, tokens)

    monkeypatch.setattr(WholeSteps, "step", step)
    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(batching.generate, [plan]) for plan in plans]
        refused = threads.submit(batching.generate, [wide])
    with pytest.raises(InvalidConceptsError):
        refused.result()
    short = [answer for answer, plan in zip(answers, plans, strict=True) if plan.positions == 3]
    for answer in short:
        with pytest.raises(RuntimeError, match="the short one"):
            answer.result()
    monkeypatch.undo()
    wanted = alone(local, [plans[0], plans[2]])
    assert [answers[i].result()[0].token_ids for i in (0, 2)] == wanted


def test_a_step_that_failed_can_be_taken_again() -> None:
    """What an unfinished step put into some layers is put there again."""
    layer = RowLayer(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), None, 1)
    for value in (1.0, 2.0):
        keys, values = layer.put(torch.full((1, 1, 1, 4), value), torch.full((1, 1, 1, 4), -value))
        assert (keys.shape[-2], float(keys[0, 0, -1, 0]), float(values[0, 0, -1, 0])) == (3, value, -value)
    layer.count()
    assert layer.put(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))[0].shape[-2] == 4


@pytest.mark.parametrize("window", [None, 1, 5, 200])
def test_a_row_grows_and_sees_its_window(window: int | None) -> None:
    begun = torch.arange(9.0).view(1, 1, 9, 1)
    first = begun if window is None else begun[:, :, max(0, 10 - window) :]
    layer = RowLayer(first, -first, window, 3)
    for value in range(9, 140):
        keys, values = layer.put(torch.full((1, 1, 1, 1), float(value)), torch.full((1, 1, 1, 1), -float(value)))
        layer.count()
        seen = list(range(value + 1))[-(window or 1000) :]
        assert keys.flatten().tolist() == seen and (-values).flatten().tolist() == seen


def test_caches_of_other_kinds_are_not_taken_for_keys_and_values() -> None:
    layer = SimpleNamespace(is_initialized=True, keys=torch.zeros(1, 1, 2, 4), values=torch.zeros(1, 1, 2, 4))
    with pytest.raises(TypeError, match="SimpleNamespace"):
        RowCache.of(SimpleNamespace(layers=[layer]), 4)


def test_an_llm_that_takes_no_common_steps_is_decoded_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    llm = toy.llm()
    llm.model.generation_config.eos_token_id = None
    local = LocalGenerator(llm, LIMIT)
    plans = [text(*range(40, 75)), text(50, 51)]
    wanted = alone(local, plans)
    llm.model.model.rotary_emb.rope_type = "dynamic"  # which changes nothing in a prompt this short
    batching = BatchingGenerator.over(local)
    with caplog.at_level(logging.WARNING):
        made = batching.generate(plans)
    llm.model.model.rotary_emb.rope_type = "default"
    assert [each.token_ids for each in made] == wanted
    assert [type(steps) for _, steps in batching.scheduler._steps] == [SingleSteps]
    assert "one by one" in caplog.text and "dynamic" in caplog.text


def test_there_is_a_bound_to_what_waits(llm: TargetLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batching = BatchingGenerator(llm, LIMIT, scheduler=Scheduler(1, 1))
    turnstile = Turnstile(batching, monkeypatch)
    streams = [batching.stream(text(50, 51, n)) for n in (60, 61, 62)]
    for stream in streams[:2]:
        stream.begin()
    with pytest.raises(OverloadedError, match=r"at most 1 and 1.*Next step: try again later"):
        next(iter(streams[2]))
    assert "compllm_batch_refused_total 1.0" in exposition(batching.scheduler.measures.collect())
    with ThreadPoolExecutor(1) as threads:
        patient = threads.submit(batching.generate, [text(50, 52, n) for n in range(5)])  # these wait for a place
        turnstile.open()
        assert len(patient.result(120)) == 5
    for stream in streams[:2]:
        assert "".join(stream) == stream.result.text != ""


def test_closing_ends_what_runs_and_refuses_the_rest(llm: TargetLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batching = BatchingGenerator(llm, LIMIT, scheduler=Scheduler(1, 4))
    turnstile = Turnstile(batching, monkeypatch)
    streams = [batching.stream(text(50, 51, n)) for n in (60, 61)]
    for stream in streams:
        stream.begin()
    turnstile.open()
    assert batching.scheduler.close(60)
    for stream in streams:
        with pytest.raises(OverloadedError, match="no more prompts"):
            list(stream)
        assert stream.result.finish_reason == "cancelled"
    assert idle(batching)
    with pytest.raises(OverloadedError, match="no more prompts"):
        batching.generate([text(50, 51)])
    assert batching.scheduler.close()


def test_a_batch_that_is_closed_on_gives_no_half_answers(llm: TargetLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batching = BatchingGenerator(llm, LIMIT, scheduler=Scheduler(1, 4))
    turnstile = Turnstile(batching, monkeypatch)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(batching.generate, [text(50, 51, n) for n in (60, 61, 62)])
        turnstile.turns(2)
        while not batching.scheduler._active:
            time.sleep(0.01)
        closing = threading.Thread(target=batching.scheduler.close, args=(60,))
        closing.start()
        turnstile.open()
        with pytest.raises(OverloadedError, match="no more prompts"):
            asked.result(60)
        closing.join()


def test_a_prompt_without_memory_beside_others_is_read_when_they_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    local, batching = pair()
    plans, asked = [text(*range(40, 60)), text(*range(60, 90))], list[int]()

    def lay_out(chosen: Sequence[PromptPlan]) -> Any:
        if chosen[0].positions == 30:
            asked.append(len(batching.scheduler._active))
            if asked[-1] > 1:
                raise DeviceMemoryError("no memory is left")
        return local.lay_out(chosen)

    monkeypatch.setattr(batching, "lay_out", lay_out)
    made = batching.generate(plans)
    assert [each.token_ids for each in made] == alone(local, plans)
    assert asked in ([2, 1], [1])

    def never(chosen: Sequence[PromptPlan]) -> Any:
        raise DeviceMemoryError("no memory is left")

    monkeypatch.setattr(batching, "lay_out", never)
    with pytest.raises(DeviceMemoryError):
        batching.generate(plans)


def test_a_fault_of_the_scheduler_reaches_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    _, batching = pair()

    def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(batching.scheduler, "_decode", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        batching.generate([text(50, 51)])
    monkeypatch.undo()
    assert len(batching.generate([text(50, 51)])[0].token_ids) == LIMIT.max_new_tokens


def test_settings_that_make_no_sense() -> None:
    for options in ({"rows": 0}, {"waiting": -1}, {"part": 0}):
        with pytest.raises(ConfigurationError, match="places and reads"):
            Scheduler(**options)
