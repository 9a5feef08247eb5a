"""KV caches of prompts that begin alike: answers are those of reading all anew, whatever happened in between."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import toy
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import ConfigurationError, DeviceMemoryError
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.generation.reuse import PrefixCache, ReusingForward, agreement, atoms_of
from compllm_rag.library import ConceptLibrary
from compllm_rag.prompt import ConceptSpan, PromptPlan, QAPrompt, TextSpan
from compllm_rag.store.memory import MemoryStore
from trained import trained_deep

ARCHITECTURES = (*toy.ARCHITECTURES, "gemma2", "qwen2")
PARAGRAPHS = toy.TEXT.strip().split("\n\n")
LIMIT = GenerationConfig(max_new_tokens=8)
OPENING = (2, 50, 51, 52, 53, 3)


@functools.cache
def deep_of(architecture: str) -> DeepCompressor:
    made = trained_deep(toy.llm(architecture, layers=4))
    made.llm.model.generation_config.eos_token_id = None
    return made


@functools.cache
def library_of(architecture: str, rate: float = 1.0) -> ConceptLibrary:
    compressor = deep_of(architecture)
    return ConceptLibrary(compressor, MemoryStore(compressor.spec.width), rate=rate)


def generator_of(architecture: str = "llama", **options: Any) -> LocalGenerator:
    compressor = deep_of(architecture)
    return LocalGenerator(compressor.llm, LIMIT, halves=compressor.halves, **options)


def turn(library: ConceptLibrary, history: Sequence[int], chosen: Sequence[int], question: int) -> PromptPlan:
    """Opening and earlier turns, passages, the newest question."""
    bodies = [library.fetch(PARAGRAPHS[i]).span(number) for number, i in enumerate(chosen)]
    return PromptPlan((TextSpan(OPENING), TextSpan(tuple(history)), *bodies, TextSpan((60, question, 2))))


def text(*ids: int) -> PromptPlan:
    return PromptPlan((TextSpan(ids),))


def same(prefixed: LocalGenerator, plain: LocalGenerator, plan: PromptPlan) -> int:
    """That both answer alike, in logits too; the positions that were reused."""
    forward = prefixed.lay_out([plan])
    assert isinstance(forward, ReusingForward)
    wanted = plain.lay_out([plan]).prefill()
    assert torch.allclose(forward.prefill(), wanted, atol=1e-4 * float(wanted.abs().max()))
    if prefixed.prefixes is not None:
        prefixed.prefixes.clear()
    return forward.reused


CHAT = [  # history, passages, question
    ((), (0, 1), 70),
    ((80, 81, 82, 83), (1, 2), 71),
    ((80, 81, 82, 83, 84, 85), (2,), 72),
    ((80, 81, 82, 83, 84, 85, 86, 87, 88, 89), (0, 2), 73),
]


@pytest.mark.parametrize("rate", [1.0, 2.5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_turns_of_a_chat_with_deep_concepts(architecture: str, rate: float) -> None:
    library, prefixes = library_of(architecture, rate), PrefixCache()
    plain, prefixed = generator_of(architecture), generator_of(architecture, prefixes=prefixes)
    shares = []
    for history, chosen, question in CHAT:
        plan = turn(library, history, chosen, question)
        [wanted], [made] = plain.generate([plan]), prefixed.generate([plan])
        assert made.token_ids == wanted.token_ids
        assert (wanted.reused_positions, made.prompt_positions) == (0, plan.positions)
        shares.append(made.reused_positions)
        stream = prefixed.stream(plan)
        assert "".join(stream) == wanted.text
        assert stream.result.token_ids == wanted.token_ids
        assert stream.result.reused_positions == plan.positions - 1
    assert shares == [0, 6, 10, 12]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_of_a_prompt_that_goes_on_with_another(architecture: str) -> None:
    library = library_of(architecture)
    for first, second, reused in [
        (turn(library, (), (0, 1), 70), turn(library, (), (0, 1), 71), None),  # all passages the same
        (turn(library, (), (0, 1), 70), turn(library, (), (0, 2), 70), None),  # the first the same
        (turn(library, (), (0, 1), 70), turn(library, (80,), (0, 1), 70), 6),  # passages at other positions
        (text(*range(40, 100)), text(*range(40, 80), 5, 6, 7), 40),
    ]:
        prefixed, plain = generator_of(architecture, prefixes=PrefixCache()), generator_of(architecture)
        prefixed.generate([first])
        shared = agreement(atoms_of(first), atoms_of(second))
        expected = sum(1 if isinstance(atom, int) else len(atom) for atom in atoms_of(second)[:shared])
        assert same(prefixed, plain, second) == expected
        assert reused in (None, expected)


def test_concepts_of_the_input_embeddings() -> None:
    prefixed, plain = generator_of(prefixes=PrefixCache()), generator_of()
    concepts = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    plans = [
        PromptPlan((TextSpan(OPENING), ConceptSpan(concepts, 0), TextSpan((60, question, 2)))) for question in (70, 71)
    ]
    prefixed.generate([plans[0]])
    assert same(prefixed, plain, plans[1]) == 12


def test_concepts_are_known_by_their_values_and_places() -> None:
    values = torch.randn(4, 32)
    one = ConceptSpan(values, 0, torch.tensor([0, 1, 2, 3]), 4)
    for other, equal in [
        (ConceptSpan(values.clone(), 3, torch.tensor([0, 1, 2, 3]), 4), 1),
        (ConceptSpan(values + 1e-3, 0, torch.tensor([0, 1, 2, 3]), 4), 0),
        (ConceptSpan(values, 0, torch.tensor([0, 1, 2, 4]), 4), 0),
        (ConceptSpan(values, 0, torch.tensor([0, 1, 2, 3]), 5), 0),
        (ConceptSpan(values, 0), 0),
        (ConceptSpan(values.half(), 0, torch.tensor([0, 1, 2, 3]), 4), 0),
        (ConceptSpan(values[:3], 0, torch.tensor([0, 1, 2]), 4), 0),
        (7, 0),
    ]:
        assert agreement([one], [other]) == agreement([other], [one]) == equal


def test_an_answer_is_part_of_what_is_kept_where_there_are_no_passages() -> None:
    prefixes = PrefixCache()
    prefixed, plain = generator_of(prefixes=prefixes), generator_of()
    first = text(*OPENING, 70)
    [made] = prefixed.generate([first])
    second = text(*OPENING, 70, *made.token_ids, 3, 2, 71)
    [wanted], [again] = plain.generate([second]), prefixed.generate([second])
    assert again.token_ids == wanted.token_ids
    assert again.reused_positions == len(OPENING) + 1 + len(made.token_ids) - 1  # the last token was never read
    assert len(prefixes) == 1  # one conversation


def test_text_and_concepts_do_not_share_what_they_read() -> None:
    library = library_of("llama")
    prefixed, plain = generator_of(prefixes=PrefixCache()), generator_of()
    prefixed.generate([turn(library, (), (0,), 70)])
    plan = text(*OPENING, 80, 81)
    [made], [wanted] = prefixed.generate([plan]), plain.generate([plan])
    assert (made.reused_positions, made.token_ids) == (0, wanted.token_ids)


def test_a_batch_neither_finds_nor_leaves_anything() -> None:
    prefixes = PrefixCache()
    prefixed = generator_of(prefixes=prefixes)
    made = prefixed.generate([text(*OPENING, 70), text(*OPENING, 70, 71)])
    assert [each.reused_positions for each in made] == [0, 0]
    assert len(prefixes) == 0


def test_sliding_windows_that_cannot_remember_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a transformers whose caches have no such switch."""
    monkeypatch.setattr("compllm_rag.generation.reuse.remembering_cache", lambda cache: cache)
    long = text(*range(40, 80))
    for architecture, reused in [("llama", 30), ("mistral", 0), ("gemma3", 0), ("gemma2", 0)]:
        prefixed, plain = generator_of(architecture, prefixes=PrefixCache()), generator_of(architecture)
        prefixed.generate([long], GenerationConfig(max_new_tokens=1))
        assert same(prefixed, plain, text(*range(40, 70), 5, 6)) == reused
    for architecture in ("mistral", "gemma3"):  # nothing has left the window yet; or the whole prompt is gone on with
        prefixed, plain = generator_of(architecture, prefixes=PrefixCache()), generator_of(architecture)
        prefixed.generate([text(*range(40, 50))], GenerationConfig(max_new_tokens=1))
        assert same(prefixed, plain, text(*range(40, 48), 5, 6)) == 8
        prefixed.generate([long], GenerationConfig(max_new_tokens=1))
        assert same(prefixed, plain, text(*range(40, 80), 5, 6)) == 40


# What is kept


def test_the_least_used_prompt_goes_first() -> None:
    prefixes = PrefixCache(prompts=2)
    prefixed = generator_of(prefixes=prefixes)
    plans = [text(*range(start, start + 12)) for start in (40, 60, 80)]
    reused = [prefixed.generate([plans[i]])[0].reused_positions for i in (0, 1, 0, 2, 0, 1)]
    assert reused == [0, 0, 11, 0, 11, 0]
    assert len(prefixes) == 2


def test_bytes_are_bounded() -> None:
    prefixed = generator_of(prefixes=PrefixCache())
    prefixed.generate([text(*range(40, 52))], GenerationConfig(max_new_tokens=1))
    size = prefixed.prefixes.nbytes
    assert size == 12 * 4 * 2 * 2 * 8 * 4  # positions, layers, keys and values, heads, width, bytes
    one = GenerationConfig(max_new_tokens=1)
    for most, kept in [(size - 1, 0), (size, 1), (2 * size - 1, 1), (2 * size, 2)]:
        prefixed = generator_of(prefixes=PrefixCache(max_bytes=most))
        for start in (40, 60):
            prefixed.generate([text(*range(start, start + 12))], one)
        assert len(prefixed.prefixes) == kept
        assert prefixed.prefixes.nbytes == kept * size


@pytest.mark.parametrize("limits", [{"prompts": 0}, {"max_bytes": 0}])
def test_limits_that_make_no_sense(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="keeps something"):
        PrefixCache(**limits)


def test_reuse_can_be_switched_off() -> None:
    prefixed = generator_of(prefixes=PrefixCache())
    plan = text(*OPENING, 70)
    prefixed.generate([plan])
    prefixed.prefixes = None
    assert prefixed.generate([plan])[0].reused_positions == 0


# Trouble


def test_an_answer_that_is_given_up_disturbs_none() -> None:
    library, prefixes = library_of("llama"), PrefixCache()
    prefixed, plain = generator_of(prefixes=prefixes), generator_of()
    plan, following = turn(library, (), (0, 1), 70), turn(library, (80, 81), (0, 1), 71)
    for cancelled in (True, False):
        cancel = threading.Event()
        pieces = iter(prefixed.stream(plan, cancel=cancel))
        next(pieces)
        if cancelled:
            cancel.set()
            list(pieces)
        else:
            pieces.close()  # abandoned
        for each in (plan, following):
            assert prefixed.generate([each])[0].token_ids == plain.generate([each])[0].token_ids


@pytest.mark.parametrize("fails_at", range(1, 9))
def test_an_error_in_the_middle_leaves_nothing_half_written(fails_at: int) -> None:
    """At whatever layer of whatever step: the next answer is right."""
    compressor = trained_deep(toy.llm(layers=4))
    prefixed = LocalGenerator(compressor.llm, LIMIT, prefixes=PrefixCache())
    plain = LocalGenerator(compressor.llm, LIMIT)
    first, second = text(*OPENING, 70, 71), text(*OPENING, 70, 72, 73)
    prefixed.generate([first])
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise ValueError("on purpose")

    layers = compressor.llm.model.model.layers
    handles = [layer.mlp.register_forward_pre_hook(fail) for layer in layers]
    with pytest.raises(ValueError, match="on purpose"):
        prefixed.generate([second])
    for handle in handles:
        handle.remove()
    for plan in (second, first):
        assert prefixed.generate([plan])[0].token_ids == plain.generate([plan])[0].token_ids


def test_memory_that_runs_short_is_taken_from_what_is_kept() -> None:
    compressor = trained_deep(toy.llm(layers=4))
    prefixed = LocalGenerator(compressor.llm, LIMIT, prefixes=PrefixCache())
    wanted = prefixed.generate([text(*OPENING, 70)])[0].token_ids
    short = 1

    def refuse(*_: Any) -> None:
        nonlocal short
        short -= 1
        if short >= 0:
            raise torch.OutOfMemoryError("no room")

    handle = compressor.llm.model.model.layers[2].mlp.register_forward_pre_hook(refuse)
    [made] = prefixed.generate([text(*OPENING, 70)])
    assert (made.token_ids, made.reused_positions) == (wanted, 0)
    short = 2
    with pytest.raises(DeviceMemoryError):
        prefixed.generate([text(*OPENING, 70)])
    handle.remove()


def test_memory_that_runs_short_in_the_middle_of_an_answer_is_there_for_the_next() -> None:
    compressor = trained_deep(toy.llm(layers=4))
    prefixed = LocalGenerator(compressor.llm, LIMIT, prefixes=PrefixCache())
    calls = 0

    def refuse(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("no room")

    handle = compressor.llm.model.model.layers[2].mlp.register_forward_pre_hook(refuse)
    with pytest.raises(DeviceMemoryError):
        prefixed.generate([text(*OPENING, 70)])
    handle.remove()
    assert len(prefixed.prefixes) == 0
    assert prefixed.generate([text(*OPENING, 70)])[0].reused_positions == 0


def test_threads_share_what_is_kept() -> None:
    library, prefixes = library_of("llama"), PrefixCache(prompts=2)
    prefixed, plain = generator_of(prefixes=prefixes), generator_of()
    plans = [turn(library, history, chosen, question + i) for i in range(3) for history, chosen, question in CHAT]
    wanted = [plain.generate([plan])[0].token_ids for plan in plans]
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda plan: prefixed.generate([plan])[0].token_ids, plans * 3))
    assert made == wanted * 3
    assert len(prefixes) <= 2


def test_the_opening_is_reused_between_questions() -> None:
    library, prefixed = library_of("llama"), generator_of(prefixes=PrefixCache())
    prompt = QAPrompt(library.llm.tokenizer)
    plans = [
        prompt.plan(question, [(f"T{question}", [library.fetch(PARAGRAPHS[i]).span(0)])])
        for i, question in enumerate(("Who?", "When?"))
    ]
    first, second = [prefixed.generate([plan])[0] for plan in plans]
    assert first.reused_positions == 0
    assert second.reused_positions >= len(prompt.opening)
