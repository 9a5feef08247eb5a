"""Prompts with deep concepts, answered: alone, in a batch, streamed, given up, and scored."""

from __future__ import annotations

import functools
import gc
import threading

import pytest
import torch

import toy
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import ConfigurationError, InvalidConceptsError, MissingConceptsError, PromptTooLongError
from compllm_rag.evaluation.scoring import ScoringGenerator
from compllm_rag.generation.halves import SplitForward, States, Tokens, split_rows
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.library import ConceptLibrary, Fetched
from compllm_rag.models.halves import Halves
from compllm_rag.prompt import ConceptSpan, PromptPlan, QAPrompt, TextSpan, lay_out
from compllm_rag.store.memory import MemoryStore
from trained import trained_deep

PARAGRAPHS = toy.TEXT.strip().split("\n\n")
LIMIT = GenerationConfig(max_new_tokens=10)
QUESTION = "Who built the lighthouse?"


@functools.cache
def deep_of(architecture: str) -> DeepCompressor:
    return trained_deep(toy.llm(architecture, layers=4))


@functools.cache
def library_of(architecture: str, rate: float = 1.0) -> ConceptLibrary:
    compressor = deep_of(architecture)
    return ConceptLibrary(compressor, MemoryStore(compressor.spec.width), rate=rate)


def plan(library: ConceptLibrary, n: int = 3, *, text: tuple[int, ...] = (), question: str = QUESTION) -> PromptPlan:
    """A question behind the first paragraphs, some of them as text."""
    bodies = [
        TextSpan(library.passage(p).ids, i) if i in text else library.fetch(p).span(i)
        for i, p in enumerate(PARAGRAPHS[:n])
    ]
    prompt = QAPrompt(library.llm.tokenizer)
    return prompt.plan(question, [(f"T{i}", [body]) for i, body in enumerate(bodies)])


def generator_of(library: ConceptLibrary) -> LocalGenerator:
    return LocalGenerator(library.llm, LIMIT, halves=library.halves)


def read_anew(library: ConceptLibrary, prompt: PromptPlan, n: int) -> list[int]:
    """Greedy tokens without any cache: the prompt and what was said so far, from the start for each token."""
    said: list[int] = []
    for _ in range(n):
        row: list[Tokens | States] = []
        at = 0
        for span in prompt.spans:
            if isinstance(span, TextSpan):
                row.append(Tokens(span.ids, torch.arange(len(span)) + at))
                at += len(span)
            else:
                row.append(States(span.concepts, span.places + at))
                at += span.n_tokens
        row.append(Tokens(said, torch.arange(len(said)) + at))
        said.append(int(SplitForward(library.halves, [row]).prefill().argmax()))
    return said


@pytest.mark.parametrize("rate", [1.0, 2.5])
@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_an_answer_is_that_of_reading_everything_anew_for_each_token(architecture: str, rate: float) -> None:
    library = library_of(architecture, rate)
    prompt = plan(library)
    assert prompt.deep
    [made] = generator_of(library).generate([prompt])
    library.llm.model.generation_config.eos_token_id = None
    assert made.token_ids == read_anew(library, prompt, LIMIT.max_new_tokens)[: len(made.token_ids)]
    assert made.prompt_positions == prompt.positions
    assert (prompt.extent == prompt.positions) == (rate == 1.0)


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_text_is_read_by_the_llm_as_if_nothing_had_been_trained(architecture: str) -> None:
    library = library_of(architecture)
    fresh = toy.llm(architecture, layers=4)
    plans = [plan(library, text=(0, 1, 2)), plan(library, n=1, text=(0,))]
    wanted = LocalGenerator(fresh, LIMIT).generate(plans)
    assert [made.token_ids for made in generator_of(library).generate(plans)] == [made.token_ids for made in wanted]
    assert torch.equal(
        generator_of(library).lay_out(plans).prefill(), LocalGenerator(fresh).prefill(lay_out(plans, fresh))[0]
    )


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_a_batch_of_text_and_deep_concepts_answers_as_each_alone(architecture: str) -> None:
    library, sparse = library_of(architecture), library_of(architecture, 2.5)
    plans = [
        plan(library),
        plan(library, text=(0, 1, 2)),
        plan(sparse, n=2),
        plan(library, text=(1,)),
        plan(library, n=1, text=(0,), question="When?"),
    ]
    generator = generator_of(library)
    assert [p.deep for p in plans] == [True, False, True, True, False]
    together = generator.generate(plans)
    for made, one in zip(together, plans, strict=True):
        [alone] = generator.generate([one])
        assert (made.token_ids, made.text, made.finish_reason) == (alone.token_ids, alone.text, alone.finish_reason)
        assert made.prompt_positions == one.positions
        stream = generator.stream(one)
        assert "".join(stream) == alone.text
        assert stream.result.token_ids == alone.token_ids


def test_concepts_stand_at_the_positions_of_their_tokens() -> None:
    library = library_of("llama", 2.5)
    prompt = plan(library, n=2)
    [row] = split_rows([prompt])
    text = plan(library, n=2, text=(0, 1))
    at = 0
    for item, span in zip(row, text.spans, strict=True):
        own = torch.as_tensor(item.positions).tolist()
        if isinstance(item, Tokens):
            assert own == list(range(at, at + len(span)))
        else:
            passage = library.passage(PARAGRAPHS[span.passage])
            kept = library.compressor.kept_places(passage.segments, passage.n_concepts)
            assert own == [at + place for places in kept for place in places]  # one unit a paragraph
        at += len(span)
    assert prompt.extent == text.positions == at > prompt.positions


def test_a_gap_counts_for_the_window() -> None:
    library = library_of("llama", 4.0)
    prompt = plan(library)
    llm = toy.llm(layers=4, window=prompt.extent + LIMIT.max_new_tokens)
    LocalGenerator(llm, LIMIT, halves=library.halves).stream(prompt)
    small = LocalGenerator(
        toy.llm(layers=4, window=prompt.extent + LIMIT.max_new_tokens - 1), LIMIT, halves=library.halves
    )
    assert prompt.positions + LIMIT.max_new_tokens < small.window
    for asking in (small.stream, lambda p: small.generate([p])):
        with pytest.raises(PromptTooLongError, match=f"{prompt.extent} positions"):
            asking(prompt)


# In trouble


def test_a_generator_without_halves_says_what_it_needs() -> None:
    library = library_of("llama")
    generator = LocalGenerator(library.llm, LIMIT)
    for asking in (generator.stream, lambda p: generator.generate([p])):
        with pytest.raises(ConfigurationError, match="cannot read deep concepts.*pass `halves`"):
            asking(plan(library))
    with pytest.raises(InvalidConceptsError, match="do not stand among input embeddings"):
        lay_out([plan(library)], library.llm)
    with pytest.raises(MissingConceptsError, match="read it as text"):
        Fetched(None, 0, 1, 0.0).span(0)


def test_concepts_of_another_width_are_refused() -> None:
    library = library_of("llama")
    span = ConceptSpan(torch.zeros(2, 31), 0, torch.tensor([0, 1]), 2)
    with pytest.raises(InvalidConceptsError, match=r"\(n_concepts, 32\)"):
        generator_of(library).generate([PromptPlan((TextSpan((5,)), span, TextSpan((6,))))])


def test_cancelling_ends_an_answer_at_the_next_token() -> None:
    library = library_of("llama")
    library.llm.model.generation_config.eos_token_id = None
    [whole] = generator_of(library).generate([plan(library)])
    cancel = threading.Event()
    stream = generator_of(library).stream(plan(library), cancel=cancel)
    for _ in stream:
        if len(stream.result.token_ids) >= 3:
            cancel.set()
    assert stream.result.finish_reason == "cancelled"
    assert 3 <= len(stream.result.token_ids) < len(whole.token_ids)
    assert stream.result.token_ids == whole.token_ids[: len(stream.result.token_ids)]


def test_an_abandoned_stream_leaves_nothing_running() -> None:
    library = library_of("llama")
    stream = generator_of(library).stream(plan(library))
    before = threading.active_count()
    pieces = iter(stream)
    next(pieces)
    del pieces
    gc.collect()
    assert not torch.is_inference_mode_enabled()
    assert stream.result.finish_reason == "cancelled"
    assert threading.active_count() <= before  # one of another test may have ended meanwhile
    [again] = generator_of(library).generate([plan(library)])
    assert again.token_ids[: len(stream.result.token_ids)] == stream.result.token_ids


# Scored


@torch.inference_mode()
def one_pass(library: ConceptLibrary, prompt: PromptPlan, answer: list[int]) -> float:
    """Log-likelihood by one forward of each half over prompt and answer, without caches."""
    spans = (*prompt.spans, TextSpan(tuple(answer)))
    ids, below, where, joined = [], [], [], []
    at = 0
    for span in spans:
        if isinstance(span, TextSpan):
            ids += span.ids
            below += range(at, at + len(span))
            where += range(at, at + len(span))
            joined += [None] * len(span)
        else:
            where += [at + place for place in span.places.tolist()]
            joined += list(span.concepts.float())
        at += span.extent
    halves, tokens = library.halves, torch.tensor([ids])
    hidden = iter(halves.below(halves.llm.embedding(tokens), torch.ones_like(tokens), torch.tensor([below]))[0])
    rows = torch.stack([next(hidden) if row is None else row for row in joined])[None]
    mask = torch.ones(rows.shape[:2], dtype=torch.long)
    logits = halves.above(rows, mask, torch.tensor([where]))[0, -len(answer) - 1 : -1].log_softmax(-1)
    return float(logits.gather(1, torch.tensor(answer)[:, None]).sum())


@pytest.mark.parametrize("answer", [False, True])
@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_likelihoods_are_those_of_one_pass_over_prompt_and_answer(architecture: str, answer: bool) -> None:
    library, sparse = library_of(architecture), library_of(architecture, 2.5)
    plans = [plan(library), plan(sparse, n=2), plan(library, text=(1,))]
    targets = [[50, 60, 70, 80], [99], [200, 3]]
    wanted = [one_pass(library, p, t) for p, t in zip(plans, targets, strict=True)]
    _, prefilled = ScoringGenerator(library.llm, LIMIT, halves=library.halves).run(plans, answer=answer)
    for _ in range(2):  # any number of times
        assert prefilled.log_likelihoods(targets) == pytest.approx(wanted, abs=1e-3)
    turned = [targets[2], targets[0], targets[1]]
    wanted = [one_pass(library, p, t) for p, t in zip(plans, turned, strict=True)]
    assert prefilled.log_likelihoods(turned) == pytest.approx(wanted, abs=1e-3)


def test_without_memory_to_merge_the_reading_lora_questions_are_answered_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = library_of("llama")
    prompt = plan(library)
    [wanted] = generator_of(library).generate([prompt])

    def refuse(halves: Halves) -> Halves:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Halves, "merged", refuse)
    [found] = generator_of(library).generate([prompt])
    assert found.token_ids == wanted.token_ids
    assert "no memory to merge" in caplog.text
