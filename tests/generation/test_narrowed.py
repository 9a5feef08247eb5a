"""Narrowed prompts: all of the concepts below layer T, the attended ones above it, in batches, parts and steps."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

import toy
from compllm_rag.config import GenerationConfig, Narrowing
from compllm_rag.errors import ConfigurationError, UnsupportedModelError
from compllm_rag.generation.batching import BatchingGenerator
from compllm_rag.generation.forward import Past, last_of
from compllm_rag.generation.halves import SplitForward, States, Tokens
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.generation.narrowed import NarrowedForward
from compllm_rag.generation.reuse import PrefixCache
from compllm_rag.generation.scheduler import Scheduler
from compllm_rag.generation.vllm.deep_rows import RowLayout, deep_rows
from compllm_rag.llamaindex.read_options import require_narrowing
from compllm_rag.models.halves import Halves, second_tree
from compllm_rag.models.llm import decoder_of
from compllm_rag.models.narrowing import AttentionCount, NarrowedHalves, kept_concepts, kept_slots
from compllm_rag.prompt import PromptPlan
from tests.generation.test_reuse import LIMIT, deep_of, library_of, text, turn

# Mistral's toy has nothing but windows of 16 slots.
ARCHITECTURES = ("llama", "qwen3", "gemma3", "gemma2", "qwen2")
DEPTH, LAYER, TOP = 4, 1, 3
IDS = list(range(5, 385, 7))
QUARTER = Narrowing(layer=TOP, share=0.25)


@functools.cache
def halves_of(architecture: str) -> Halves:
    return Halves(toy.llm(architecture, layers=DEPTH), LAYER)


def narrowed_of(architecture: str, narrowing: Narrowing = QUARTER) -> NarrowedHalves:
    return NarrowedHalves(halves_of(architecture), narrowing)


def states(n: int, seed: int = 0) -> States:
    """Concepts at every other position."""
    return States(torch.randn(n, 32, generator=torch.Generator().manual_seed(seed)))


def rows() -> list[list[Tokens | States]]:
    """Three prompts, of other lengths, with one, two and no runs of concepts."""
    return [
        [Tokens(IDS[:5]), states(19), Tokens(IDS[20:27])],
        [Tokens(IDS[:3]), states(6, 1), Tokens(IDS[9:11]), states(17, 2), Tokens(IDS[30:34])],
        [Tokens(IDS[:30])],
    ]


ASKING = [7, 4, 5]


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-4 * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_of_the_concepts_are_what_is_read_without_narrowing(architecture: str) -> None:
    narrowed = narrowed_of(architecture, Narrowing(layer=TOP, share=1.0))
    mine, plain = NarrowedForward(narrowed, rows(), ASKING), SplitForward(narrowed.halves, rows())
    assert close(mine.prefill(), plain.prefill())
    for token in IDS[:4]:
        assert close(mine.step([token] * 3), plain.step([token] * 3))


@pytest.mark.parametrize("most", [None, 7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_of_a_batch_is_read_as_if_it_were_alone_and_parts_as_the_whole(
    architecture: str, most: int | None
) -> None:
    narrowed = narrowed_of(architecture)
    together = NarrowedForward(narrowed, rows(), ASKING)
    alone = [NarrowedForward(narrowed, [row], [n]) for row, n in zip(rows(), ASKING, strict=True)]
    assert close(last_of(together.prefill_parts(most=most)), torch.cat([one.prefill() for one in alone]))
    fork = together.fork()
    for token in IDS[:4]:
        logits = together.step([token] * 3)
        assert close(logits, torch.cat([one.step([token]) for one in alone]))
        assert close(fork.step([token] * 3), logits)
    plain = SplitForward(narrowed.halves, rows()).prefill()
    assert not close(together.prefill()[:2], plain[:2])  # something was left behind
    assert close(together.prefill()[2], plain[2])  # nothing to leave behind


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
@torch.inference_mode()
def test_counted_attention_is_that_of_the_llm(architecture: str) -> None:
    # By transformers' own plain attention over the same layers, which gives its weights away.
    narrowed = narrowed_of(architecture)
    forward = NarrowedForward(narrowed, rows()[:1], ASKING[:1])
    forward.prefill()
    [row], plain = rows()[:1], second_tree(narrowed.middle)
    for module in plain.modules():
        if getattr(module, "config", None) is not None:
            module.config._attn_implementation = "eager"
    low = halves_of(architecture)
    tokens = torch.tensor([[*row[0].ids, *row[2].ids]])
    places = torch.tensor([[*range(5), *range(24, 31)]])
    below = low.below(low.llm.embedding(tokens), torch.ones_like(tokens), places)
    joined = torch.cat([below[:, :5], row[1].states[None], below[:, 5:]], 1)
    weights = plain(
        inputs_embeds=joined, attention_mask=torch.ones(1, 31), position_ids=torch.arange(31)[None],
        output_attentions=True, use_cache=False,
    ).attentions  # fmt: skip
    # (heads, 31, 31) of each layer; a layer with a window of 16 is not looked at.
    wanted = sum(weights[i][0][:, 24:].amax(0).mean(0) for i in sorted(narrowed._looked))
    torch.testing.assert_close(forward._count.total[0], wanted, atol=1e-5, rtol=1e-4)
    chosen = wanted[5:24].topk(kept_concepts(19, 0.25)).indices.sort().values + 5
    kept = kept_slots(forward._count.total, ~forward._is_token, forward._mask.bool(), 0.25)
    assert kept.order[0].tolist() == [*range(5), *chosen.tolist(), *range(24, 31)]


def test_layers_above_hold_what_was_kept_of_the_kv_cache() -> None:
    narrowed = narrowed_of("llama")
    forward = NarrowedForward(narrowed, rows()[:1], ASKING[:1])
    forward.prefill()
    lower, upper = forward.caches
    assert [layer.keys.shape[-2] for layer in lower.layers] == [12]
    assert [layer.keys.shape[-2] for layer in upper.layers] == [31, 31, 12 + kept_concepts(19, 0.25)]


def test_which_slots_go_on() -> None:
    attention = torch.tensor([[0.0, 0.3, 0.9, 0.1, 0.0], [0.0, 0.2, 0.2, 0.2, 0.0]])
    concepts = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 0]])
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    kept = kept_slots(attention, concepts, real, 0.5)
    assert kept.order[0].tolist() == [0, 1, 2, 4] and kept.real[0].all()
    assert kept.order[1][kept.real[1]].tolist() == [1, 2, 4]  # of equals the first
    assert kept.of(attention)[0].tolist() == pytest.approx([0.0, 0.3, 0.9, 0.0])
    assert [kept_concepts(n, 0.1) for n in (0, 1, 4, 15, 100)] == [0, 1, 1, 2, 10]
    assert kept_concepts(9, 0.0) == 0


def test_a_question_that_comes_in_parts_is_counted_once() -> None:
    draw = torch.Generator().manual_seed(3)
    query, key = torch.randn(1, 4, 9, 8, generator=draw), torch.randn(1, 2, 9, 8, generator=draw)
    asking, real = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]]), torch.ones(1, 9)
    whole, parts = AttentionCount(asking, real), AttentionCount(asking, real)
    whole.add(query, key, 0.3)
    for begin, end in ((0, 3), (3, 6), (6, 9)):
        parts.add(query[:, :, begin:end], key[:, :, :end], 0.3)
    torch.testing.assert_close(parts.total, whole.total)
    # Query heads 0 and 1 share the keys of head 0; of each slot the head that attends most.
    scores = torch.einsum("hqd,hkd->hqk", query[0, :, 4:], key[0].repeat_interleave(2, 0)) * 0.3
    later = torch.arange(9)[None] > torch.arange(4, 9)[:, None]
    wanted = scores.masked_fill(later, -torch.inf).softmax(-1).amax(0).mean(0)
    torch.testing.assert_close(whole.total[0], wanted)
    assert 1.0 <= float(whole.total.sum()) <= 4.0


def test_of_a_long_question_the_end_is_looked_at() -> None:
    draw = torch.Generator().manual_seed(4)
    query, key = torch.randn(1, 2, 150, 8, generator=draw), torch.randn(1, 2, 150, 8, generator=draw)
    asking = torch.arange(150)[None] >= 10
    whole, end = (
        AttentionCount(asking, torch.ones(1, 150)),
        AttentionCount(asking & (torch.arange(150) >= 22), asking >= 0),
    )
    for count in (whole, end):
        count.add(query, key, 1.0)
    torch.testing.assert_close(whole.total, end.total)


def test_generators_read_each_prompt_in_its_own_way() -> None:
    library, compressor = library_of("llama"), deep_of("llama")
    plain = turn(library, (), (0, 1), 70)
    narrowing = Narrowing(layer=3, share=0.1)
    plans = [
        plain, text(*range(40, 75)), replace(plain, narrowing=narrowing),
        replace(turn(library, (80,), (2,), 71), narrowing=narrowing), replace(text(5, 6, 7), narrowing=narrowing),
    ]  # fmt: skip
    prefixes = PrefixCache()
    local = LocalGenerator(compressor.llm, LIMIT, halves=compressor.halves, prefixes=prefixes)
    alone = [local.generate([plan])[0].token_ids for plan in plans]
    assert len(prefixes) == 3  # narrowed prompts leave nothing there
    assert [made.token_ids for made in local.generate(plans)] == alone
    stream = local.stream(plans[2])
    assert "".join(stream) == stream.result.text and stream.result.token_ids == alone[2]
    batched = BatchingGenerator.over(local, Scheduler())
    assert [made.token_ids for made in batched.generate(plans)] == alone
    batched.scheduler.close()
    logits = [local.lay_out([plan]).prefill() for plan in (plans[0], plans[2])]
    assert not close(logits[1], logits[0])


def test_what_cannot_be_narrowed_is_refused() -> None:
    compressor = deep_of("llama")
    local = LocalGenerator(compressor.llm, GenerationConfig(max_new_tokens=2), halves=compressor.halves)
    plan = turn(library_of("llama"), (), (0,), 70)
    for layer in (1, 2, 4, 30):
        with pytest.raises(ConfigurationError, match="cannot be narrowed at this layer"):
            local.generate([replace(plan, narrowing=Narrowing(layer=layer))])
    with pytest.raises(UnsupportedModelError, match="sliding windows alone"):
        narrowed_of("mistral")
    flash = Halves(toy.llm("llama", layers=DEPTH), LAYER)
    decoder_of(flash.upper).config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="kind flash_attention_2"):
        NarrowedHalves(flash, QUARTER)
    logits = NarrowedForward(narrowed_of("mistral", Narrowing(layer=TOP, share=0.0)), rows(), ASKING).prefill()
    assert logits.isfinite().all()  # none of them: no need to look at attention
    forward = NarrowedForward(narrowed_of("llama"), rows(), ASKING)
    with pytest.raises(ConfigurationError, match="read from its start"):
        last_of(forward.prefill_parts(Past(2, 3, ())))
    with pytest.raises(ConfigurationError, match="vLLM cannot narrow"):
        layout = RowLayout.of(decoder_of(compressor.llm.model).config, 2)
        deep_rows(replace(plan, narrowing=Narrowing(layer=3)), compressor.llm, layout)


def test_an_llm_that_cannot_be_narrowed_is_refused_before_it_is_asked() -> None:
    compressor = deep_of("mistral")
    local = LocalGenerator(compressor.llm, GenerationConfig(max_new_tokens=2), halves=compressor.halves)
    with pytest.raises(ConfigurationError, match="sliding windows alone.*narrow at a later layer"):
        require_narrowing(local, QUARTER)
    require_narrowing(local, Narrowing(layer=TOP, share=0.0))


def test_narrowing_is_read_from_what_is_typed() -> None:
    assert Narrowing.parse("24") == Narrowing(layer=24, share=0.1)
    for text_ in ("24:0.25", "24:0", "24:0.1:chance"):
        assert str(Narrowing.parse(text_)) == text_
    for wrong in ("", "auto:", "24:", "0:0.5", "24:-0.1", "24:1.5", "x:0.1", "24:0.1:luck", "24:0.1:chance:2"):
        with pytest.raises(ConfigurationError):
            Narrowing.parse(wrong)


def test_none_or_any_of_the_concepts_can_go_on() -> None:
    forwards = [
        NarrowedForward(narrowed_of("llama", Narrowing.parse(way)), rows()[:1], ASKING[:1])
        for way in ("3:0", "3:0.25", "3:0.25:chance")
    ]
    logits = [forward.prefill() for forward in forwards]
    assert [forward.caches[1].layers[-1].keys.shape[-2] for forward in forwards] == [12, 17, 17]
    assert not close(logits[0], logits[1]) and not close(logits[1], logits[2])
    assert close(forwards[2].prefill(), logits[2])  # the same chance each time


def test_tokens_behind_the_last_passage_ask() -> None:
    plan = turn(library_of("llama"), (80, 81), (0, 1), 70)
    assert plan.asking == 3
    assert PromptPlan(plan.spans[:2]).asking == 8
