"""Prompts through both halves: as the whole LLM where it can be compared, and each row as if it were alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import toy
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import ConfigurationError, InvalidConceptsError
from compllm_rag.generation.halves import SplitForward, States, Tokens
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import TargetLLM, decoder_of
from compllm_rag.prompt import ConceptSpan, PromptPlan, TextSpan, lay_out

ARCHITECTURES = (*toy.ARCHITECTURES, "qwen2", "gemma2")
DEPTH, STEPS = 4, 6
TEXT = list(range(5, 385, 7))
OPENING, CHUNK, TAIL = TEXT[:6], TEXT[6:32], TEXT[32:45]


@functools.cache
def halves_of(architecture: str, layer: int = 2) -> Halves:
    return Halves(toy.llm(architecture, layers=DEPTH), layer)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-4 * float(other.abs().max()), rtol=0)


@torch.inference_mode()
def chunk_states(halves: Halves) -> torch.Tensor:
    """States of the chunk right behind the opening, by the lower half alone."""
    ids = torch.tensor([OPENING + CHUNK])
    out = halves.below(halves.llm.embedding(ids), torch.ones_like(ids), torch.arange(ids.shape[1])[None])
    return out[0, len(OPENING) :]


def gapped(halves: Halves) -> list[Tokens | States]:
    """Every other state of the chunk, at its source position, and the tail behind all of them."""
    begin, end = len(OPENING), len(OPENING) + len(CHUNK)
    states = States(chunk_states(halves)[::2], range(begin, end, 2))
    return [Tokens(OPENING), states, Tokens(torch.tensor(TAIL), torch.arange(end, end + len(TAIL)))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batched", [False, True])
def test_entry_layer_0_is_todays_generator_bit_for_bit(architecture: str, batched: bool) -> None:
    halves = halves_of(architecture, 0)
    llm, concepts = halves.llm, torch.randn(11, 32, generator=torch.Generator().manual_seed(1))
    plans = [PromptPlan((TextSpan(tuple(OPENING)), ConceptSpan(concepts, 0), TextSpan(tuple(TAIL))))]
    rows: list[list[Tokens | States]] = [[Tokens(OPENING), States(concepts), Tokens(TAIL)]]
    if batched:
        plans.append(PromptPlan((TextSpan(tuple(CHUNK)), ConceptSpan(concepts[:2], 0), TextSpan((9,)))))
        rows.append([Tokens(CHUNK), States(concepts[:2]), Tokens([9])])
    generator, forward = LocalGenerator(llm), SplitForward(halves, rows)
    logits = forward.prefill()
    assert torch.equal(logits, generator.prefill(lay_out(plans, llm))[0])
    # Logits of the steps are seen through the same LLM, whose head is the last thing to run.
    seen: list[torch.Tensor] = []
    hook = llm.model.register_forward_hook(lambda module, args, out: seen.append(out.logits[:, -1]))
    tokens = list(generator._tokens(generator.lay_out(plans), plans, GenerationConfig(max_new_tokens=STEPS)))
    hook.remove()
    assert len(seen) == STEPS
    assert torch.equal(logits, seen[0])
    for given, wanted in zip(tokens, seen[1:], strict=False):
        assert torch.equal(forward.step(given), wanted)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_a_chunk_behind_the_opening_is_compressed_to_the_states_of_the_full_text(architecture: str) -> None:
    halves = halves_of(architecture)
    model, ids = halves.llm.model, torch.tensor([OPENING + CHUNK + TAIL])
    everything = model(input_ids=ids, output_hidden_states=True).hidden_states[halves.layer]
    begin, end = len(OPENING), len(OPENING) + len(CHUNK)
    assert close(chunk_states(halves), everything[0, begin:end])
    # Text up to the last token as states: the upper half has nothing to tell it from text. The last token has to go
    # through the lower half by itself, so it is read with what it would see there.
    forward = SplitForward(halves, [[States(everything[0, :-1]), Tokens(ids[0, -1:])]])
    alone = halves.below(halves.llm.embedding(ids[:, -1:]), torch.ones(1, 1), torch.tensor([[ids.shape[1] - 1]]))
    joined = torch.cat([everything[:, :-1], alone], 1)
    mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1])[None]
    assert close(forward.prefill(), halves.above(joined, mask, positions)[:, -1])
    assert close(halves.above(everything, mask, positions), model(input_ids=ids).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_text_alone_gives_the_whole_llms_logits_step_by_step(architecture: str, layer: int) -> None:
    halves = halves_of(architecture, layer)
    with torch.inference_mode():
        wanted = [halves.llm.model(input_ids=torch.tensor([ids])).logits[0] for ids in (TEXT[:45], TEXT[3:40])]
    forward = SplitForward(halves, [[Tokens(TEXT[:30]), Tokens(TEXT[30:39])], [Tokens(TEXT[3:34])]])
    got = [forward.prefill(), *(forward.step([TEXT[39 + i], TEXT[34 + i]]) for i in range(STEPS))]
    for i, logits in enumerate(got):
        assert close(logits[0], wanted[0][38 + i])
        assert close(logits[1], wanted[1][30 + i])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_rows_of_a_batch_are_padded_in_each_half_by_itself(architecture: str, layer: int) -> None:
    halves = halves_of(architecture, layer)
    states = chunk_states(halves)
    rows: list[list[Tokens | States]] = [
        gapped(halves),
        [Tokens(CHUNK), Tokens(TAIL)],  # most tokens, no concepts
        [Tokens(OPENING), States(states), Tokens([50]), States(states[3:9]), Tokens(TAIL[:2])],  # most slots
    ]
    together, alone = SplitForward(halves, rows), [SplitForward(halves, [row]) for row in rows]
    assert close(together.prefill(), torch.cat([one.prefill() for one in alone]))
    for token in TEXT[:STEPS]:
        logits = together.step([token] * 3)
        assert close(logits, torch.cat([one.step([token]) for one in alone]))
    assert (halves.layer, DEPTH - halves.layer) == (len(together.lower_cache.layers), len(together.upper_cache.layers))
    assert together.lower_cache.get_seq_length() == len(CHUNK) + len(TAIL) + STEPS
    assert together.upper_cache.get_seq_length() == len(OPENING) + len(CHUNK) + 1 + 6 + 2 + STEPS
    assert alone[0].lower_cache.get_seq_length() == len(OPENING) + len(TAIL) + STEPS
    assert alone[0].upper_cache.get_seq_length() == len(OPENING) + len(CHUNK) // 2 + len(TAIL) + STEPS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_is_what_a_longer_prompt_gives(architecture: str) -> None:
    halves = halves_of(architecture)
    row = gapped(halves)
    forward = SplitForward(halves, [row])
    forward.prefill()
    for count in range(1, STEPS):
        stepped = forward.step([TEXT[count]])
        longer = SplitForward(halves, [[*row, Tokens(TEXT[1 : count + 1])]])
        assert close(stepped, longer.prefill())


@torch.inference_mode()
def by_hand(llm: TargetLLM, hidden: torch.Tensor, positions: list[int], first: int, last: int) -> torch.Tensor:
    """Layers of the target itself over (n, hidden_size), causal, at any positions."""
    decoder: Any = decoder_of(llm.model)
    hidden, at = hidden[None], torch.tensor([positions])
    turned, n = decoder.rotary_emb(hidden, at), hidden.shape[1]
    mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
    for layer in decoder.layers[first:last]:
        hidden = layer(hidden, attention_mask=mask, position_ids=at, position_embeddings=turned, use_cache=False)
    return hidden[0]


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_gaps_are_read_as_the_layers_themselves_read_them(architecture: str) -> None:
    halves = halves_of(architecture)
    row, llm = gapped(halves), halves.llm
    begin, end = len(OPENING), len(OPENING) + len(CHUNK)
    text = [*range(begin), *range(end, end + len(TAIL))]
    below = by_hand(llm, llm.embed(OPENING + TAIL), text, 0, 2)
    kept = list(range(begin, end, 2))
    joined = torch.cat([below[:begin], chunk_states(halves)[::2], below[begin:]])
    above = by_hand(llm, joined, [*text[:begin], *kept, *text[begin:]], 2, DEPTH)
    with torch.inference_mode():
        wanted = llm.model.lm_head(decoder_of(llm.model).norm(above[-1:]))
    assert close(SplitForward(halves, [row]).prefill(), wanted)
    # Positions matter: closed up, the same concepts read otherwise.
    closed = [Tokens(OPENING), States(row[1].states), Tokens(TAIL)]
    assert not close(SplitForward(halves, [closed]).prefill(), wanted)


def test_a_sliding_window_counts_slots_and_not_positions() -> None:
    halves = halves_of("mistral", DEPTH - 1)  # one layer above: it sees its window of 16 and nothing else
    states = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))

    def logits(changed: int | None) -> torch.Tensor:
        mine = states.clone()
        if changed is not None:
            mine[changed] += 1.0
        tokens = Tokens(TAIL[:5], range(500, 505))
        return SplitForward(halves, [[States(mine, range(0, 200, 10)), tokens]]).prefill()

    plain = logits(None)  # 25 slots, of which the last sees 9 to 24
    assert torch.equal(logits(8), plain)
    assert not torch.equal(logits(9), plain)


def test_a_prefill_starts_anew() -> None:
    halves = halves_of("llama")
    forward = SplitForward(halves, [gapped(halves)])
    first, step = forward.prefill(), forward.step([7])
    assert torch.equal(forward.prefill(), first)
    assert torch.equal(forward.step(torch.tensor([7])), step)


def test_what_cannot_be_laid_out_is_refused() -> None:
    halves = halves_of("llama")
    states = States(torch.zeros(3, 32))
    for rows in ([], [[]], [[Tokens([5])], [states]], [[Tokens([]), states]]):
        with pytest.raises(ConfigurationError, match="no token"):
            SplitForward(halves, rows)
    for item in (Tokens([5, 6], [0]), States(torch.zeros(3, 32), [1, 2])):
        with pytest.raises(ConfigurationError, match="positions do not fit"):
            SplitForward(halves, [[Tokens([5]), item]])
    for wrong in (torch.zeros(3, 31), torch.zeros(32)):
        with pytest.raises(InvalidConceptsError, match=r"\(n_concepts, 32\)"):
            SplitForward(halves, [[Tokens([5]), States(wrong)]])
    forward = SplitForward(halves, [[Tokens([5]), states]])
    with pytest.raises(ConfigurationError, match="before the prefill"):
        forward.step([5])
    forward.prefill()
    with pytest.raises(ConfigurationError, match="2 rows after"):
        forward.step([5, 6])
