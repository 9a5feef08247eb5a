"""Deep concepts: the LLM's own states at the tokens that are kept, whatever stands beside a unit."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import toy
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import untrained_deep
from compllm_rag.config import CompressorConfig
from compllm_rag.errors import ConfigurationError, DeviceMemoryError, UnsupportedModelError
from compllm_rag.models.llm import TargetLLM
from trained import information, trained_deep

UNITS = [list(range(5, 45)), [100, 7, 100, 7, 100, 9, 8], [60], list(range(380, 300, -1)), [3, 2, 1, 0, 3]]
FULL, THIRD = [len(unit) for unit in UNITS], [max(1, len(unit) // 3) for unit in UNITS]


@functools.cache
def llm_of(architecture: str) -> TargetLLM:
    return toy.llm(architecture, layers=4)


@functools.cache
def deep_of(architecture: str, trained: bool = True) -> DeepCompressor:
    llm = llm_of(architecture)
    return trained_deep(llm) if trained else untrained_deep(llm, information=information(llm))


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-4 * float(other.abs().max()), rtol=0)


@torch.inference_mode()
def own_states(llm: TargetLLM, opening: tuple[int, ...], unit: list[int], layer: int) -> torch.Tensor:
    """What the whole LLM has in front of a layer at each token of a unit, (n_tokens, hidden_size)."""
    ids = torch.tensor([[*opening, *unit]])
    return llm.model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0, len(opening) :]


@pytest.mark.parametrize("ks", [FULL, THIRD], ids=["rate 1", "rate 3"])
@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_concepts_are_the_same_alone_batched_padded_and_beside_others(architecture: str, ks: list[int]) -> None:
    compressor = deep_of(architecture)
    alone = [compressor.compress([unit], [k])[0] for unit, k in zip(UNITS, ks, strict=True)]
    together = compressor.compress(UNITS, ks)
    turned = compressor.compress(UNITS[::-1], ks[::-1])[::-1]
    twice = compressor.compress(UNITS + UNITS, ks + ks)[len(UNITS) :]
    for made in (together, turned, twice):
        for one, other, k in zip(made, alone, ks, strict=True):
            assert one.shape == (k, 33)
            assert one.dtype == torch.float32
            assert torch.equal(one[:, -1], other[:, -1])
            assert close(one[:, :-1], other[:, :-1])


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_at_rate_1_they_are_the_llms_own_states_behind_the_opening(architecture: str, layer: int) -> None:
    llm = llm_of(architecture)
    compressor = untrained_deep(llm, layer, information=information(llm))
    assert compressor.config.opening
    for unit, made in zip(UNITS, compressor.compress(UNITS, FULL), strict=True):
        assert made[:, -1].tolist() == list(range(len(unit)))
        assert close(made[:, :-1], own_states(llm, compressor.config.opening, unit, layer))


def test_what_is_not_kept_leaves_the_rest_alone() -> None:
    compressor = deep_of("llama")
    places = compressor.kept_places(UNITS, THIRD)
    full = compressor.compress(UNITS, FULL)
    for made, kept, whole, k in zip(compressor.compress(UNITS, THIRD), places, full, THIRD, strict=True):
        assert made[:, -1].tolist() == kept
        assert len(kept) == k
        assert all(a < b for a, b in zip(kept, kept[1:], strict=False))
        assert close(made[:, :-1], whole[kept, :-1])


def test_places_may_be_given() -> None:
    compressor = deep_of("llama")
    given = [[0, 39], [6], [0], [1, 2, 79], [4]]
    full = compressor.compress(UNITS, FULL)
    made = compressor.compress(UNITS, list(map(len, given)), places=given)
    for rows, whole, places in zip(made, full, given, strict=True):
        assert rows[:, -1].tolist() == places
        assert close(rows[:, :-1], whole[places, :-1])


def best(scores: list[float], k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


@torch.inference_mode()
def plain_surprisal(llm: TargetLLM, opening: list[int], unit: list[int]) -> list[float]:
    """Token by token, each by a forward of its own; nothing foretells the first of a text."""
    found = []
    for i, token in enumerate(unit):
        before = [*opening, *unit[:i]]
        if not before:
            found.append(0.0)
            continue
        logits = llm.model(input_ids=torch.tensor([before])).logits[0, -1]
        found.append(-float(logits.log_softmax(-1)[token]))
    return found


@pytest.mark.parametrize("opening", [(), (2, 50, 60)])
def test_information_and_surprisal_are_those_of_a_plain_computation(opening: tuple[int, ...]) -> None:
    llm = llm_of("llama")
    table = information(llm)
    compressor = untrained_deep(llm, information=table, opening=opening)
    ks = [k + 2 if k + 2 < n else k for k, n in zip(THIRD, FULL, strict=True)]
    kept = compressor.kept_places(UNITS, ks)
    for unit, k, places in zip(UNITS, ks, kept, strict=True):
        surprisal = plain_surprisal(llm, list(opening), unit)
        scores = [float(table[token]) + 0.5 * s for token, s in zip(unit, surprisal, strict=True)]
        assert places == best(scores, k)
    assert kept == [compressor.kept_places([unit], [k])[0] for unit, k in zip(UNITS, ks, strict=True)]


def test_information_alone_takes_the_rarest_tokens_and_the_earlier_of_equals() -> None:
    llm = llm_of("llama")
    compressor = untrained_deep(llm, information=information(llm), selector="information")
    for unit, k, places in zip(UNITS, THIRD, compressor.kept_places(UNITS, THIRD), strict=True):
        assert places == best([float(information(llm)[token]) for token in unit], k)
    assert compressor.kept_places([[7, 7, 7, 7]], [2]) == [[0, 1]]


def test_chance_is_the_same_each_time_and_depends_on_the_unit_alone() -> None:
    llm = llm_of("llama")
    chosen = [untrained_deep(llm, information=information(llm, seed), selector="random") for seed in (0, 1)]
    first = chosen[0].kept_places(UNITS, THIRD)
    assert first == chosen[0].kept_places(UNITS, THIRD) == chosen[1].kept_places(UNITS, THIRD)
    assert chosen[0].kept_places(UNITS[3:4], THIRD[3:4]) == first[3:4]
    assert first != untrained_deep(llm, selector="information").kept_places(UNITS, THIRD)
    other = [*UNITS[3][:-1], 77]
    assert chosen[0].kept_places([other], THIRD[3:4]) != first[3:4]


def test_a_few_more_places_are_those_of_before_and_others() -> None:
    compressor = deep_of("llama")
    for k in range(1, 40):
        [fewer], [more] = (compressor.kept_places(UNITS[:1], [n]) for n in (k, k + 1))
        assert set(fewer) < set(more)


def test_the_llm_itself_does_not_notice() -> None:
    llm = toy.llm(layers=4)
    ids = torch.tensor([UNITS[0]])
    with torch.inference_mode():
        before = llm.model(input_ids=ids).logits
        trained_deep(llm).compress(UNITS, THIRD)
        assert torch.equal(llm.model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("unit", "k"), [([], 0), ([], 1), ([5, 6], 0), ([5, 6], 3), ([5, 6], -1), (list(range(241)), 1)]
)
def test_units_that_cannot_be_compressed_are_refused(unit: list[int], k: int) -> None:
    compressor = deep_of("llama")
    with pytest.raises(ConfigurationError, match="unit cannot be compressed.*Next step"):
        compressor.compress([[5, 6, 7], unit], [1, k])


@pytest.mark.parametrize("places", [[-1, 0], [0, 3], [1, 0], [1, 1], [1], [0, 1, 2], []])
def test_places_that_a_unit_does_not_have_are_refused(places: list[int]) -> None:
    with pytest.raises(ConfigurationError, match="at places in order"):
        deep_of("llama").compress([[5, 6, 7]], [2], places=[places])


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_entry_layers_that_the_llm_does_not_have_are_refused(layer: int) -> None:
    with pytest.raises(ConfigurationError, match="layer"):
        untrained_deep(llm_of("llama"), layer)


def test_entry_layer_0_belongs_to_the_other_compressor() -> None:
    with pytest.raises(ConfigurationError, match="use Compressor"):
        untrained_deep(llm_of("llama"), 0)
    with pytest.raises(ConfigurationError, match="use Compressor"):
        DeepCompressor(llm_of("llama"), CompressorConfig())


@pytest.mark.parametrize("change", [{"unit_length": 10}, {"unit_length": 3000}, {"selector": "best"}, {"opening": 5}])
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        untrained_deep(llm_of("llama"), **change)


def test_a_model_that_cannot_be_cut_in_two_is_refused() -> None:
    llm = toy.llm(layers=4)
    llm.model.config.num_kv_shared_layers = 2
    with pytest.raises(UnsupportedModelError, match="cut in two.*entry layer 0"):
        untrained_deep(llm)


def test_half_the_layers_are_the_default() -> None:
    assert [untrained_deep(toy.llm(layers=n)).config.entry_layer for n in (2, 4, 5)] == [1, 2, 2]


@pytest.mark.parametrize("ks", [FULL, THIRD], ids=["all kept", "a third kept"])
def test_batches_are_halved_until_they_fit(monkeypatch: pytest.MonkeyPatch, ks: list[int]) -> None:
    compressor = trained_deep(llm_of("llama"))
    wanted, forward, sizes = compressor.compress(UNITS, ks), compressor._forward, []

    def small(units: Any, kept: Any) -> Any:
        sizes.append(len(units))
        if len(units) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(units, kept)

    monkeypatch.setattr(compressor, "_forward", small)
    for one, other in zip(compressor.compress(UNITS, ks), wanted, strict=True):
        assert torch.equal(one[:, -1], other[:, -1])
        assert close(one, other)
    assert sizes[0] > 2


@pytest.mark.parametrize("part", ["decoder", "scores"])
def test_a_unit_that_does_not_fit_the_memory_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    llm = toy.llm(layers=4)
    compressor = untrained_deep(llm, information=information(llm))

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compressor.decoder if part == "decoder" else llm.model, "forward", full)
    with pytest.raises(DeviceMemoryError, match="no memory is left"):
        compressor.compress(UNITS[:1], [3])


def live_states(compressor: DeepCompressor, unit: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return compressor.states_with_grad([unit])[0]


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_the_lora_that_writes_is_merged_and_says_the_same(architecture: str) -> None:
    compressor = trained_deep(toy.llm(architecture, layers=4))
    before = {name: tensor.clone() for name, tensor in compressor.llm.model.state_dict().items()}
    [rows] = compressor.compress(UNITS[:1], FULL[:1])
    assert close(rows[:, :-1], live_states(compressor, UNITS[0]))
    bare = untrained_deep(compressor.llm, information=information(compressor.llm))
    assert not close(rows[:, :-1], live_states(bare, UNITS[0])), "the LoRA does something"
    assert all(torch.equal(tensor, before[name]) for name, tensor in compressor.llm.model.state_dict().items())
    assert any(".lora_" in name for name, _ in compressor.decoder.named_parameters()), "what is trained stays"


def test_changed_weights_are_merged_anew() -> None:
    compressor = trained_deep(llm_of("llama"))
    compressor.compress(UNITS[:1], FULL[:1])
    with torch.no_grad():
        for name, parameter in compressor.decoder.named_parameters():
            if ".lora_B" in name:
                parameter.mul_(-2)
    compressor.refresh_fingerprint()
    [rows] = compressor.compress(UNITS[:1], FULL[:1])
    assert close(rows[:, :-1], live_states(compressor, UNITS[0]))


def test_where_memory_is_short_the_lora_stays_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = trained_deep(llm_of("llama")).compress(UNITS, THIRD)

    def full(tree: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("compllm_rag.compression.deep.merged_tree", full)
    compressor = trained_deep(llm_of("llama"))
    for _ in range(2):
        assert all(close(a, b) for a, b in zip(compressor.compress(UNITS, THIRD), wanted, strict=True))
    assert sum("no memory to merge" in record.message for record in caplog.records) == 1

    def broken(tree: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("compllm_rag.compression.deep.merged_tree", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        trained_deep(llm_of("llama")).compress(UNITS, THIRD)
