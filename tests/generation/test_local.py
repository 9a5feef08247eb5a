"""Answers end where they should, and what is abandoned leaves nothing running."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch

import toy
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import PromptTooLongError
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import ConceptSpan, PromptPlan, TextSpan

LIMIT = 24


def prompt(llm: TargetLLM, text: str = toy.TEXT[:120]) -> PromptPlan:
    ids = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
    return PromptPlan((TextSpan(tuple(ids)), ConceptSpan(llm.embed([50, 60, 70]), 0), TextSpan((80,))))


@pytest.fixture
def llm() -> TargetLLM:
    """A random Llama of this test's own, since some change its stop tokens."""
    return toy.llm()


@pytest.fixture
def generator(llm: TargetLLM) -> LocalGenerator:
    return LocalGenerator(llm, GenerationConfig(max_new_tokens=LIMIT))


def test_an_answer_ends_at_the_limit(llm: TargetLLM, generator: LocalGenerator) -> None:
    stream = generator.stream(prompt(llm))
    text = "".join(stream)
    result = stream.result
    assert result.finish_reason == "length"
    assert len(result.token_ids) == LIMIT
    assert text == result.text == llm.tokenizer.decode(result.token_ids)
    assert result.prompt_positions == prompt(llm).positions
    [whole] = generator.generate([prompt(llm)])
    assert (whole.text, whole.token_ids, whole.finish_reason) == (text, result.token_ids, "length")


def test_the_calls_own_limit_goes_before_the_generators(llm: TargetLLM, generator: LocalGenerator) -> None:
    one = GenerationConfig(max_new_tokens=1)
    stream = generator.stream(prompt(llm), one)
    list(stream)
    assert len(stream.result.token_ids) == 1
    assert len(generator.generate([prompt(llm)], one)[0].token_ids) == 1


def test_an_answer_ends_at_a_stop_token_which_is_not_part_of_it(llm: TargetLLM, generator: LocalGenerator) -> None:
    free = generator.generate([prompt(llm)])[0].token_ids
    stop = next(token for token in free[5:] if token not in free[:5])
    llm.model.generation_config.eos_token_id = [stop, 3]
    expected = free[: free.index(stop)]
    stream = generator.stream(prompt(llm))
    list(stream)
    for result in (stream.result, *generator.generate([prompt(llm)] * 2)):
        assert result.token_ids == expected
        assert result.finish_reason == "stop"
        assert result.text == llm.tokenizer.decode(expected)


def test_an_answer_that_is_empty_at_once(llm: TargetLLM, generator: LocalGenerator) -> None:
    first = generator.generate([prompt(llm)])[0].token_ids[0]
    llm.model.generation_config.eos_token_id = first
    stream = generator.stream(prompt(llm))
    assert list(stream) == []
    for result in (stream.result, *generator.generate([prompt(llm)])):
        assert (result.text, result.token_ids, result.finish_reason) == ("", [], "stop")


def test_an_answer_ends_in_front_of_a_stop_text(llm: TargetLLM, generator: LocalGenerator) -> None:
    free = generator.generate([prompt(llm)])[0].text
    stop = free[6:9]
    config = GenerationConfig(max_new_tokens=LIMIT, stop=(stop, "never to be found"))
    stream = generator.stream(prompt(llm), config)
    text = "".join(stream)
    [whole] = generator.generate([prompt(llm)], config)
    for result in (stream.result, whole):
        assert result.text == text == free[: free.index(stop)]
        assert result.finish_reason == "stop"
        assert len(result.token_ids) < LIMIT


def test_the_rows_of_a_batch_end_each_by_itself(llm: TargetLLM, generator: LocalGenerator) -> None:
    plans = [prompt(llm), prompt(llm, "Gulls nest in the lamp room; the stairs are closed.")]
    alone = [generator.generate([plan])[0] for plan in plans]
    stop = next(t for t in alone[0].token_ids[3:] if t not in alone[1].token_ids and t not in alone[0].token_ids[:3])
    llm.model.generation_config.eos_token_id = [stop]
    first, second = generator.generate(plans)
    assert first.finish_reason == "stop"
    assert first.token_ids == alone[0].token_ids[: alone[0].token_ids.index(stop)]
    assert second.finish_reason == "length"
    assert second.token_ids == alone[1].token_ids


def test_no_prompts_are_no_answers(generator: LocalGenerator) -> None:
    assert generator.generate([]) == []


# Cancellation


def pieces_of(generator: LocalGenerator, llm: TargetLLM) -> list[str]:
    pieces = list(generator.stream(prompt(llm)))
    assert len(pieces) >= 4
    return pieces


def test_cancelling_ends_an_answer_at_the_next_token(llm: TargetLLM, generator: LocalGenerator) -> None:
    expected = pieces_of(generator, llm)
    cancel = threading.Event()
    stream = generator.stream(prompt(llm), cancel=cancel)
    got = []
    for piece in stream:
        got.append(piece)
        if len(got) == 2:
            known = len(stream.result.token_ids)
            cancel.set()
    assert got[:2] == expected[:2]
    assert stream.result.finish_reason == "cancelled"
    assert len(stream.result.token_ids) == known
    assert stream.result.text == "".join(got)


def test_an_answer_cancelled_before_it_began_is_empty(llm: TargetLLM, generator: LocalGenerator) -> None:
    cancel = threading.Event()
    cancel.set()
    stream = generator.stream(prompt(llm), cancel=cancel)
    assert list(stream) == []
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.token_ids == []


def test_an_abandoned_stream_leaves_nothing_running(llm: TargetLLM, generator: LocalGenerator) -> None:
    pieces_of(generator, llm)
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    handle = llm.model.register_forward_hook(count)
    threads = threading.active_count()
    stream = generator.stream(prompt(llm))
    iterator = iter(stream)
    piece = next(iterator)
    # While it is held open its caller may train, or do anything else.
    assert not torch.is_inference_mode_enabled()
    weight = torch.ones(1, requires_grad=True)
    (weight * 2).sum().backward()
    done = forwards
    assert 0 < done < LIMIT
    iterator.close()
    del iterator
    gc.collect()
    assert forwards == done
    assert threading.active_count() <= threads  # one of another test may have ended meanwhile
    assert not torch.is_inference_mode_enabled()
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.text.startswith(piece)
    handle.remove()
    # And the next answer is none the worse for it.
    assert list(generator.stream(prompt(llm))) == pieces_of(generator, llm)


def test_nothing_runs_before_a_stream_is_read(llm: TargetLLM, generator: LocalGenerator) -> None:
    llm.model.register_forward_hook(lambda *_: pytest.fail("ran"))
    assert generator.stream(prompt(llm)).result.finish_reason == "cancelled"


def test_two_streams_at_once_do_not_disturb_each_other(llm: TargetLLM, generator: LocalGenerator) -> None:
    plans = [prompt(llm), prompt(llm, "Marsh never saw the lamp lit.")]
    expected = ["".join(generator.stream(plan)) for plan in plans]
    streams = [iter(generator.stream(plan)) for plan in plans]
    got = ["", ""]
    for _ in range(2 * LIMIT):
        for i, stream in enumerate(streams):
            got[i] += next(stream, "")
    assert got == expected


# Limits and costs


def test_a_prompt_that_does_not_fit_the_window_is_refused_before_anything_runs() -> None:
    llm = toy.llm(window=64)
    generator = LocalGenerator(llm, GenerationConfig(max_new_tokens=8))
    assert generator.window == 64
    fits, too_long = (PromptPlan((TextSpan((50,) * n),)) for n in (56, 57))
    assert len(generator.generate([fits])[0].token_ids) <= 8
    with pytest.raises(PromptTooLongError, match=r"57 positions and 8 new tokens.*at most 64"):
        generator.stream(too_long)
    with pytest.raises(PromptTooLongError):
        generator.generate([fits, too_long])
    generator.stream(too_long, GenerationConfig(max_new_tokens=7))


def test_the_costs_of_an_answer_are_told(llm: TargetLLM, generator: LocalGenerator) -> None:
    stream = generator.stream(prompt(llm))
    list(stream)
    for result in (stream.result, *generator.generate([prompt(llm)])):
        assert result.layout_s > 0
        assert result.prefill_s > 0
        assert result.decode_s > 0


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_the_head_computes_logits_of_the_last_position_only(architecture: str) -> None:
    llm = toy.llm(architecture)
    plans = [prompt(llm), prompt(llm, "Short.")]
    seen: list[tuple[int, ...]] = []
    llm.model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    LocalGenerator(llm, GenerationConfig(max_new_tokens=3)).generate(plans)
    assert seen
    assert set(seen) == {(2, 1, 400)}
