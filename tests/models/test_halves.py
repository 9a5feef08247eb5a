"""Two halves of an LLM do together what the whole does, and the whole does not notice."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    SiglipVisionConfig,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import toy
from compllm_rag.errors import ConfigurationError, UnsupportedModelError
from compllm_rag.models.halves import Halves, lower_half
from compllm_rag.models.llm import TargetLLM, decoder_of

ARCHITECTURES = (*toy.ARCHITECTURES, "qwen2", "gemma2")
DEPTH = 4
# Longer than any toy's sliding window of 16, so that a layer with the wrong kind of attention shows.
IDS = torch.arange(5, 350, 7)[None, :45]
SMALL: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": DEPTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip


@functools.cache
def llm_of(architecture: str) -> TargetLLM:
    return toy.llm(architecture, layers=DEPTH)


def logits_of(llm: TargetLLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return llm.model(input_ids=ids, use_cache=False).logits


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-4 * float(other.abs().max()), rtol=0)


@pytest.fixture(params=[(a, layer) for a in ARCHITECTURES for layer in (0, 1, 2, 3)], ids=lambda p: f"{p[0]}-{p[1]}")
def halves(request: pytest.FixtureRequest) -> Halves:
    architecture, layer = request.param
    return Halves(llm_of(architecture), layer)


@torch.inference_mode()
def test_both_halves_give_the_logits_of_the_whole(halves: Halves) -> None:
    embeddings, positions = halves.llm.embedding(IDS), torch.arange(IDS.shape[1])[None]
    mask = torch.ones_like(IDS)
    hidden = halves.below(embeddings, mask, positions)
    assert close(halves.above(hidden, mask, positions), logits_of(halves.llm, IDS))
    assert close(halves.above(hidden, mask, positions, keep=1), logits_of(halves.llm, IDS)[:, -1:])


@torch.inference_mode()
def test_left_padded_rows_give_what_they_give_alone(halves: Halves) -> None:
    short, pad = IDS[:, :30], IDS.shape[1] - 30
    ids = torch.cat([IDS, torch.nn.functional.pad(short, (pad, 0))])
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = halves.above(halves.below(halves.llm.embedding(ids), mask, positions), mask, positions)
    assert close(logits[:1], logits_of(halves.llm, IDS))
    assert close(logits[1:, pad:], logits_of(halves.llm, short))


@torch.inference_mode()
def test_cached_steps_give_the_logits_of_the_whole(halves: Halves) -> None:
    embeddings, positions, mask = halves.llm.embedding(IDS), torch.arange(IDS.shape[1])[None], torch.ones_like(IDS)
    low, high = halves.caches()
    out, begin = [], 0
    for end in (20, *range(21, IDS.shape[1] + 1)):
        at = positions[:, begin:end]
        hidden = halves.below(embeddings[:, begin:end], mask[:, :end], at, low)
        out.append(halves.above(hidden, mask[:, :end], at, high))
        begin = end
    assert close(torch.cat(out, 1), logits_of(halves.llm, IDS))
    assert low.get_seq_length() == (IDS.shape[1] if halves.layer else 0)
    assert high.get_seq_length() == IDS.shape[1]
    assert len(low.layers) == halves.layer
    assert len(high.layers) == DEPTH - halves.layer


@torch.inference_mode()
def test_the_lower_half_gives_the_residual_stream_in_front_of_the_entry_layer(halves: Halves) -> None:
    embeddings, positions = halves.llm.embedding(IDS), torch.arange(IDS.shape[1])[None]
    mask = torch.ones_like(IDS)
    wanted = halves.llm.model(input_ids=IDS, output_hidden_states=True).hidden_states[halves.layer]
    assert close(halves.below(embeddings, mask, positions), wanted)
    # The tree alone, too, with no layer at all.
    tree = halves.lower(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False)
    assert close(tree.last_hidden_state, wanted)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_target_does_not_notice_and_every_tensor_is_shared(architecture: str) -> None:
    llm = llm_of(architecture)
    before, config = logits_of(llm, IDS), llm.model.config.to_dict()
    halves = Halves(llm, 1)
    with torch.inference_mode():
        mask, positions = torch.ones_like(IDS), torch.arange(IDS.shape[1])[None]
        halves.above(halves.below(llm.embedding(IDS), mask, positions), mask, positions)
    assert torch.equal(logits_of(llm, IDS), before)
    assert llm.model.config.to_dict() == config
    assert [layer.self_attn.layer_idx for layer in decoder_of(llm.model).layers] == list(range(DEPTH))
    known = {t.data_ptr() for t in (*llm.model.parameters(), *llm.model.buffers())}
    for tree in (halves.lower, halves.upper):
        tensors = [*tree.parameters(), *tree.buffers()]
        assert tensors
        assert {t.data_ptr() for t in tensors} <= known
    upper = decoder_of(halves.upper)
    assert (len(halves.lower.layers), len(upper.layers)) == (1, DEPTH - 1)
    assert [layer.self_attn.layer_idx for layer in upper.layers] == list(range(DEPTH - 1))


def test_settings_of_each_layer_go_with_it() -> None:
    kinds = decoder_of(llm_of("gemma3").model).config.layer_types
    for layer in range(DEPTH):
        halves = Halves(llm_of("gemma3"), layer)
        assert halves.lower.config.layer_types == kinds[:layer]
        assert decoder_of(halves.upper).config.layer_types == kinds[layer:]
    qwen = decoder_of(Halves(llm_of("qwen2"), 1).upper).config
    assert (qwen.num_hidden_layers, qwen.max_window_layers) == (3, 1)
    assert qwen.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]


def test_a_compressors_tree_may_have_all_layers() -> None:
    llm = llm_of("gemma3")
    for layers in (None, DEPTH):
        tree = lower_half(llm.model, layers)
        assert (len(tree.layers), tree.config.num_hidden_layers) == (DEPTH, DEPTH)


# Models of other kinds


def smollm3() -> Any:
    return SmolLM3ForCausalLM(SmolLM3Config(**SMALL, no_rope_layers=[1, 0, 1, 0]))


def gemma3_with_images() -> Any:
    kinds = ["sliding_attention", "full_attention"] * 2
    text = Gemma3TextConfig(**SMALL, head_dim=8, layer_types=kinds, sliding_window=16, query_pre_attn_scalar=8)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=399)
    )


def granite(multiplier: float) -> Any:
    return GraniteForCausalLM(GraniteConfig(**SMALL, embedding_multiplier=multiplier))


def gemma4(shared: int) -> Any:
    return Gemma4ForCausalLM(
        Gemma4TextConfig(
            **SMALL, head_dim=8, global_head_dim=16, layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=16, hidden_size_per_layer_input=0, num_kv_shared_layers=shared,
        )
    )  # fmt: skip


def qwen3_next() -> Any:
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SMALL, head_dim=8, num_experts=0, layer_types=["linear_attention"] * 3 + ["full_attention"],
            linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        )
    )  # fmt: skip


@pytest.mark.parametrize("make", [smollm3, gemma3_with_images, lambda: granite(1.0)])
@torch.inference_mode()
def test_other_kinds_that_can_be_cut(make: Any) -> None:
    llm = TargetLLM(make(), toy.tokenizer())
    for layer in (1, 2):
        halves = Halves(llm, layer)
        mask, positions = torch.ones_like(IDS), torch.arange(IDS.shape[1])[None]
        logits = halves.above(halves.below(llm.embedding(IDS), mask, positions), mask, positions)
        assert close(logits, logits_of(llm, IDS))


@pytest.mark.parametrize(
    ("make", "trouble"),
    [
        (lambda: granite(12.0), "inputs scaled at the start"),
        (lambda: gemma4(2), "keys and values of other layers"),
        (lambda: gemma4(0), "differ from layer to layer"),
        (qwen3_next, "do not run without the others"),
    ],
)
def test_kinds_that_cannot_be_cut_are_refused(make: Any, trouble: str) -> None:
    llm = TargetLLM(make(), toy.tokenizer())
    with pytest.raises(UnsupportedModelError, match=trouble) as caught:
        Halves(llm, 2)
    assert "entry layer 0" in str(caught.value)


@pytest.mark.parametrize("make", [lambda: granite(12.0), lambda: gemma4(0)])
@torch.inference_mode()
def test_entry_layer_0_asks_nothing_of_an_llm(make: Any) -> None:
    llm = TargetLLM(make(), toy.tokenizer())
    halves = Halves(llm, 0)
    mask, positions = torch.ones_like(IDS), torch.arange(IDS.shape[1])[None]
    hidden = halves.below(llm.embedding(IDS), mask, positions, halves.caches()[0])
    assert close(halves.above(hidden, mask, positions, halves.caches()[1]), logits_of(llm, IDS))


@pytest.mark.parametrize("layer", [-1, DEPTH, DEPTH + 1])
def test_entry_layers_that_are_not_there_are_refused(layer: int) -> None:
    with pytest.raises(ConfigurationError, match="0 to 3") as caught:
        Halves(llm_of("llama"), layer)
    assert f"got {layer}" in str(caught.value)
