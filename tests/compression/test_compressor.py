"""What a concept is made of, and that it depends on its segment alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.spec import embedding_rms
from compllm_rag.config import CompressorConfig
from compllm_rag.errors import ConfigurationError
from compllm_rag.models.llm import TargetLLM, decoder_of
from trained import LORA, information, randomise, trained


def segments_of(llm: TargetLLM, *lengths: int) -> list[list[int]]:
    """Segments of the lengths given, all different."""
    ids = Compressor(llm, information=information(llm)).segmenter.tokenize(toy.TEXT).ids
    return [ids[7 * i : 7 * i + n] for i, n in enumerate(lengths)]


LENGTHS, KS = (20, 3, 11, 20, 1, 16), (10, 2, 6, 20, 1, 4)


# Untrained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_untrained_it_equals_hard_pruning_to_the_anchors(architecture: str, dtype: torch.dtype) -> None:
    llm = toy.llm(architecture)
    llm.model.to(dtype)
    compressor = Compressor(llm, CompressorConfig(**LORA), information=information(llm))
    segments = segments_of(llm, *LENGTHS)
    for segment, k, concepts in zip(segments, KS, compressor.compress(segments, KS), strict=True):
        kept = [segment[i] for i in compressor.anchors(segment, k)]
        assert concepts.dtype == torch.float32
        assert torch.equal(concepts, llm.embed(kept).float())


def test_gemmas_concepts_have_the_scale_of_what_its_layers_read() -> None:
    llm = toy.llm("gemma3")
    [concepts] = Compressor(llm).compress([[50, 60, 70]], [3])
    torch.testing.assert_close(concepts, llm.embedding.weight[[50, 60, 70]] * 32**0.5, rtol=1e-3, atol=1e-3)


def test_with_as_many_concepts_as_tokens_untrained_concepts_are_the_text(
    llm: TargetLLM, compressor: Compressor
) -> None:
    [segment] = segments_of(llm, 13)
    assert torch.equal(compressor.compress([segment], [13])[0], llm.embed(segment))


def test_queries_that_are_eos_start_from_nothing(llm: TargetLLM) -> None:
    [concepts] = Compressor(llm, CompressorConfig(queries="eos")).compress(segments_of(llm, 20), [5])
    assert torch.equal(concepts, torch.zeros(5, llm.hidden_size))


# Anchors


def test_anchors_are_the_most_informative_tokens_in_order_and_the_earlier_of_equals(llm: TargetLLM) -> None:
    table = torch.zeros(400)
    table[[50, 51, 52, 53]] = torch.tensor([5.0, 9.0, 5.0, 1.0])
    compressor = Compressor(llm, information=table)
    segment = [53, 50, 60, 51, 50, 52, 60]
    assert [compressor.anchors(segment, k) for k in range(1, 8)] == [
        [3],
        [1, 3],
        [1, 3, 4],
        [1, 3, 4, 5],
        [0, 1, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 6],
    ]
    # The batched path decides the same, padding or not.
    together = compressor.compress([segment, segment, [60] * 12], [2, 5, 3])
    assert torch.equal(together[0], llm.embed([50, 51]))
    assert torch.equal(together[1], llm.embed([53, 50, 51, 50, 52]))


@pytest.mark.parametrize("sink", [False, True])
def test_means_are_those_of_even_runs_of_tokens(llm: TargetLLM, sink: bool) -> None:
    compressor = Compressor(llm, CompressorConfig(queries="mean", sink=sink))
    segments = segments_of(llm, *LENGTHS)
    for segment, k, concepts in zip(segments, KS, compressor.compress(segments, KS), strict=True):
        embedded = llm.embed(segment).float()
        runs = [[i for i in range(len(segment)) if i * k // len(segment) == run] for run in range(k)]
        expected = torch.stack([embedded[run].mean(0) for run in runs])
        torch.testing.assert_close(concepts, expected, atol=1e-6, rtol=1e-5)


def words_of(llm: TargetLLM, segment: list[int]) -> list[list[int]]:
    """Indices of the tokens of each word: letters and digits with nothing between them."""
    out: list[list[int]] = []
    for i, name in enumerate(llm.tokenizer.convert_ids_to_tokens(segment)):
        goes_on = name[0].isalnum() and name[0] not in "\u0120\u010a"
        out[-1].append(i) if goes_on and out else out.append([i])
    return out


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_of_a_word_stand_and_fall_together(llm: TargetLLM, padded: bool) -> None:
    table = information(llm)
    compressor = Compressor(llm, CompressorConfig(anchor_words=True, sink=padded), information=table)
    segments = compressor.segmenter.split(toy.TEXT)
    several = 0
    for segment in segments:
        scores = {}
        for word in words_of(llm, segment):
            several += len(word) > 1
            for i in word:
                kept = word if len(word) <= 8 else [i]
                scores[i] = max(float(table[segment[j]]) for j in kept)
        for k in (1, max(1, len(segment) // 2), len(segment)):
            expected = sorted(sorted(range(len(segment)), key=lambda i: (-scores[i], i))[:k])
            assert compressor.anchors(segment, k) == expected
    assert several > 20
    ks = [max(1, len(segment) // 2) for segment in segments]
    for segment, k, concepts in zip(segments, ks, compressor.compress(segments, ks), strict=True):
        assert torch.equal(concepts, llm.embed([segment[i] for i in compressor.anchors(segment, k)]))


def test_text_without_blanks_has_no_words_to_go_by(llm: TargetLLM) -> None:
    [letters] = llm.tokenizer(["lmnopqrstuvwxyzl"], add_special_tokens=False)["input_ids"]
    table = torch.arange(400).float()
    by_word = Compressor(llm, CompressorConfig(anchor_words=True), information=table)
    assert len(words_of(llm, letters)) == 1 and len(letters) > 8
    assert by_word.anchors(letters, 3) == Compressor(llm, information=table).anchors(letters, 3)


def test_a_table_shorter_than_the_embedding_counts_the_rest_as_never_seen(llm: TargetLLM) -> None:
    compressor = Compressor(llm, information=torch.linspace(0, 1, 300))
    assert compressor.anchors([200, 350, 299, 100], 2) == [1, 2]


# A segment's concepts depend on nothing else


@pytest.mark.parametrize(
    "setting",
    [{}, {"sink": True}, {"anchor_positions": "source"}, {"queries": "eos", "sink": True}],
    ids=["default", "sink", "source positions", "eos queries"],
)
@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_concepts_are_the_same_alone_batched_padded_and_beside_hostile_neighbours(
    architecture: str, setting: dict[str, Any]
) -> None:
    llm = toy.llm(architecture)
    compressor = trained(llm, **setting)
    segments = segments_of(llm, *LENGTHS)
    alone = [compressor.compress([s], [k])[0] for s, k in zip(segments, KS, strict=True)]
    together = compressor.compress(segments, KS)
    for lone, batched in zip(alone, together, strict=True):
        torch.testing.assert_close(batched, lone, atol=1e-4, rtol=1e-4)
    # Neighbours of extreme embeddings, longest and with the most concepts, on either side.
    loudest = int(llm.embedding.weight.norm(dim=1).argmax())
    noisy = compressor.compress([[loudest] * 20, *segments, [3] * 20, [1]], [20, *KS, 20, 1])[1:-2]
    for lone, batched in zip(alone, noisy, strict=True):
        torch.testing.assert_close(batched, lone, atol=1e-4, rtol=1e-4)
    assert all(torch.isfinite(concepts).all() for concepts in alone)


def test_a_concept_does_depend_on_its_segment(llm: TargetLLM) -> None:
    compressor = trained(llm)
    [segment] = segments_of(llm, 12)
    other = [*segment[:-1], 350]
    kept = compressor.anchors(segment, 1)
    assert compressor.anchors(other, 1) == kept
    a, b = compressor.compress([segment, other], [1, 1])
    assert not torch.allclose(a, b, atol=1e-3)


def test_each_setting_makes_other_concepts(llm: TargetLLM) -> None:
    segments = segments_of(llm, 20)
    settings: list[dict[str, Any]] = [{}, {"sink": True}, {"anchor_positions": "source"}, {"queries": "eos"}]
    settings += [{"layers": 1}, {"scale": 3.0}]
    made = [trained(llm, **setting).compress(segments, [5])[0] for setting in settings]
    for a, b in itertools.combinations(made, 2):
        assert not torch.allclose(a, b, atol=1e-3)


def test_the_scale_multiplies_the_heads_output(llm: TargetLLM) -> None:
    segments = segments_of(llm, 20)
    [pruned] = Compressor(llm, information=information(llm)).compress(segments, [5])
    one, three = (trained(llm, scale=scale).compress(segments, [5])[0] - pruned for scale in (1.0, 3.0))
    torch.testing.assert_close(three, 3 * one, atol=1e-4, rtol=1e-4)


# Streams


def test_a_stream_is_read_no_further_than_its_window(llm: TargetLLM, compressor: Compressor) -> None:
    taken = 0

    def endless() -> Iterator[tuple[list[int], int]]:
        nonlocal taken
        for i in itertools.count():
            taken += 1
            yield [40 + i % 300] * (1 + i % 20), 1

    stream = compressor.compress_stream(endless(), read_ahead=32)
    for window in range(1, 4):
        found = [next(stream) for _ in range(32)]
        assert taken == 32 * window
        assert sorted(index for index, _ in found) == list(range(32 * (window - 1), 32 * window))
        for index, concepts in found:
            assert torch.equal(concepts, llm.embed([40 + index % 300]))
            # Its own memory, not a view that keeps the batch alive.
            assert concepts.untyped_storage().nbytes() == concepts.numel() * 4


def test_compress_keeps_the_order_given_across_windows(llm: TargetLLM, compressor: Compressor) -> None:
    segments = [[40 + i % 300] * (1 + (i * 7) % 20) for i in range(2100)]
    made = compressor.compress(segments, [1] * len(segments))
    assert len(made) == 2100
    assert torch.equal(torch.cat(made), llm.embed([s[0] for s in segments]))


def test_nothing_to_compress_is_no_concepts(compressor: Compressor) -> None:
    assert compressor.compress([], []) == []


@pytest.mark.parametrize(("n", "k"), [(0, 0), (0, 1), (5, 0), (5, -1), (5, 6), (21, 4)])
def test_segments_and_k_out_of_bounds_are_refused(compressor: Compressor, n: int, k: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{n} tokens into {k} concepts"):
        compressor.compress([[50] * 3, [50] * n], [1, k])


# Its own module tree


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_the_target_does_not_notice_its_compressor(architecture: str) -> None:
    llm = toy.llm(architecture)
    ids = torch.tensor([[5, 50, 60, 70, 80]])
    names = [name for name, _ in llm.model.named_modules()]

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return llm.model(input_ids=ids).logits

    before = logits()
    compressor = trained(llm, layers=1)
    assert torch.equal(logits(), before)
    compressor.compress(segments_of(llm, *LENGTHS), KS)
    assert torch.equal(logits(), before)
    assert [name for name, _ in llm.model.named_modules()] == names
    assert len(decoder_of(llm.model).layers) == 2


def test_base_tensors_are_shared_and_only_lora_and_head_are_new(llm: TargetLLM) -> None:
    compressor = trained(llm)
    known = {tensor.data_ptr() for tensor in llm.model.parameters()}
    mine = dict(compressor.decoder.named_parameters())
    lora = {name for name in mine if ".lora_" in name}
    assert len(lora) == 2 * 3 * 2
    assert all(tensor.data_ptr() in known for name, tensor in mine.items() if name not in lora)
    assert all(tensor.data_ptr() not in known for name, tensor in mine.items() if name in lora)


def perturbed(llm: TargetLLM, layer: int) -> None:
    with torch.no_grad():
        for parameter in decoder_of(llm.model).layers[layer].parameters():
            parameter.add_(1.0)


def test_only_the_first_l_layers_and_no_final_norm_take_part() -> None:
    llm = toy.llm(layers=3)
    compressor, segments = trained(llm, layers=2), segments_of(llm, 20, 8)
    before = torch.cat(compressor.compress(segments, [4, 4]))
    perturbed(llm, 2)
    with torch.no_grad():
        decoder_of(llm.model).norm.weight.add_(1.0)
    assert torch.equal(torch.cat(compressor.compress(segments, [4, 4])), before)
    # The tensors are shared: a change in a layer that it does use is seen.
    perturbed(llm, 1)
    assert not torch.allclose(torch.cat(compressor.compress(segments, [4, 4])), before, atol=1e-3)


def test_all_layers_are_the_default() -> None:
    llm = toy.llm(layers=3)
    segments = segments_of(llm, 20)
    every, three = (trained(llm, layers=layers).compress(segments, [4])[0] for layers in (None, 3))
    assert torch.equal(every, three)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"layers": 3}, "at most 2"),
        ({"lora_rank": 2, "lora_modules": ("nothing_proj",)}, "nothing_proj"),
        ({"lora_rank": 2}, "lora_modules empty"),
    ],
)
def test_settings_that_do_not_fit_the_llm_are_refused(llm: TargetLLM, setting: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        Compressor(llm, CompressorConfig(**setting), information=information(llm))


# Training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_lora_and_head_and_no_base_tensor(dtype: torch.dtype) -> None:
    llm = toy.llm()
    llm.model.to(dtype)
    compressor = trained(llm)
    compressor.head.requires_grad_(True)
    concepts = compressor.concepts_with_grad(segments_of(llm, 20, 7), [5, 3])
    assert concepts.shape == (2, 5, llm.hidden_size)
    concepts.pow(2).sum().backward()
    for name, parameter in compressor.decoder.named_parameters():
        if ".lora_" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
            # Rounded to the compute dtype, small steps would be lost and the fingerprint would depend on it.
            assert parameter.dtype == torch.float32
        else:
            assert parameter.grad is None, name
            assert not parameter.requires_grad, name
    assert compressor.head.weight.grad is not None
    assert all(parameter.grad is None for parameter in llm.model.parameters())


def test_concepts_with_grad_are_those_of_compress(llm: TargetLLM) -> None:
    compressor, segments = trained(llm), segments_of(llm, 20, 7)
    with_grad = compressor.concepts_with_grad(segments, [5, 3])
    for row, k, concepts in zip(with_grad, (5, 3), compressor.compress(segments, [5, 3]), strict=True):
        torch.testing.assert_close(row[:k].detach(), concepts, atol=1e-5, rtol=1e-5)


def test_compressing_leaves_inference_mode_off_for_its_caller(llm: TargetLLM, compressor: Compressor) -> None:
    stream = compressor.compress_stream([([50, 51], 1)] * 3)
    next(stream)
    assert not torch.is_inference_mode_enabled()


def test_other_weights_make_other_concepts_at_once(llm: TargetLLM) -> None:
    compressor, segments = trained(llm), segments_of(llm, 20)
    [before] = compressor.compress(segments, [5])
    randomise(compressor, seed=7)
    assert not torch.allclose(compressor.compress(segments, [5])[0], before, atol=1e-3)


@pytest.mark.parametrize(("architecture", "factor"), [("llama", 1.0), ("gemma3", 32**0.5)])
def test_the_rms_of_embeddings_is_taken_after_their_scale(architecture: str, factor: float) -> None:
    llm = toy.llm(architecture)
    plain = llm.embedding.weight.pow(2).mean().sqrt()
    assert embedding_rms(llm) == pytest.approx(float(plain) * factor, rel=1e-3)
