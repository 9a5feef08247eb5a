"""Pins: which words they find, what they do to what is kept, and that without them everything is as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import load_compressor, pinned, untrained_deep
from compllm_rag.compression.pins import Pins, raised
from compllm_rag.config import CompressorConfig, Pin
from compllm_rag.errors import ConfigurationError
from compllm_rag.fingerprint import tagged_digest, tensor_digest
from compllm_rag.models.llm import TargetLLM
from trained import information, trained_deep

TEXT = "The rock is 42 metres tall. On March 3 the keeper Ada Marsh rowed out; it may rain. "
TEXT += "He wrote to NASA about getName."


@pytest.fixture(scope="module")
def model() -> TargetLLM:
    return toy.llm(layers=4)


def _ids(llm: TargetLLM, text: str) -> list[int]:
    return list(llm.tokenizer(text, add_special_tokens=False)["input_ids"])


def _found(llm: TargetLLM, text: str, *kinds: Pin) -> str:
    ids = _ids(llm, text)
    kept = Pins(llm.tokenizer, llm.embedding.weight.shape[0], kinds).of(ids)
    assert kept.shape == (len(ids),)
    return " ".join(llm.tokenizer.decode([t for t, k in zip(ids, kept.tolist(), strict=True) if k]).split())


def test_words_are_found_whole(model: TargetLLM) -> None:
    assert _found(model, TEXT, "digits") == "42 3"
    assert _found(model, TEXT, "dates") == "March 3"
    assert _found(model, TEXT, "names") == "On March Ada Marsh NASA getName", "a capital before a capital"
    assert _found(model, TEXT, "dates", "digits", "names") == "42 On March 3 Ada Marsh NASA getName"
    assert _found(model, "il pleut sur la ville.", "dates", "digits", "names") == ""


def test_letters_beyond_ascii_are_no_capitals_by_their_bytes(model: TargetLLM) -> None:
    assert _found(model, "dans une école près de Évreux", "names") == "Évreux"


def test_the_first_word_of_a_sentence_is_a_name_only_before_another(model: TargetLLM) -> None:
    assert _found(model, 'It rained. "Gulls nest here." Tom Marsh slept.', "names") == "Tom Marsh"


def test_raised_scores_keep_their_order_and_leave_half_to_others() -> None:
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    pins = torch.tensor([False, True, False, True, False, True])
    assert raised(scores, pins, 4).argsort(descending=True)[:4].tolist() == [3, 1, 0, 2], "two of four, the best ones"
    assert raised(scores, pins, 2).argsort(descending=True)[:2].tolist() == [3, 0]
    assert torch.equal(raised(scores, torch.zeros(6, dtype=torch.bool), 4), scores)


def test_pinned_tokens_are_kept_and_everything_else_is_by_score(model: TargetLLM) -> None:
    plain = trained_deep(model)
    made = pinned(plain, ["names", "digits"])
    ids = _ids(model, TEXT)
    want = {i for i, p in enumerate(Pins(model.tokenizer, 400, made.config.pins).of(ids).tolist()) if p}
    k = max(len(ids) // 2, 2 * len(want) if 2 * len(want) < len(ids) else 0)
    [before], [after] = plain.kept_places([ids], [k]), made.kept_places([ids], [k])
    assert len(after) == k and before != after
    assert len(want & set(after)) >= min(len(want), k // 2) > len(want & set(before)) - len(want)
    assert made.kept_places([ids], [len(ids)]) == [list(range(len(ids)))]
    # The states are those of the plain compressor at the places that are kept.
    [states], [whole] = made.compress([ids], [k]), plain.compress([ids], [len(ids)])
    assert torch.allclose(states[:, :-1], whole[after][:, :-1], atol=1e-5)


def test_without_pins_fingerprint_config_and_places_are_those_of_before(model: TargetLLM) -> None:
    made = trained_deep(model)
    fields = made.config.model_dump()
    assert "pins" not in fields and '"pins"' not in made.config.model_dump_json()
    # As releases without the setting computed it.
    before = tagged_digest(
        "compllm-rag/deep-compressor",
        target=model.identity,
        weights=tensor_digest({k: v.cpu().numpy() for k, v in made.state().items()}),
        config=made.config.model_dump_json(exclude={"format_version", "pins"}),
    )
    assert made.fingerprint == before == pinned(made, []).fingerprint
    assert pinned(made, ["digits"]).fingerprint != before
    assert pinned(made, ["digits", "dates"]).fingerprint == pinned(made, ["dates", "digits", "dates"]).fingerprint


def test_a_pinned_compressor_is_saved_and_loaded(model: TargetLLM, tmp_path: Path) -> None:
    made = pinned(untrained_deep(model, information=information(model)), ["digits"])
    loaded = load_compressor(made.save_pretrained(tmp_path / "pinned"), model)
    assert isinstance(loaded, DeepCompressor) and loaded.config.pins == ("digits",)
    ids = _ids(model, TEXT)
    assert loaded.fingerprint == made.fingerprint and loaded.kept_places([ids], [9]) == made.kept_places([ids], [9])


def test_pins_of_other_concepts_are_refused(model: TargetLLM) -> None:
    with pytest.raises(ConfigurationError, match="pins are of deep concepts"):
        pinned(Compressor(model), ["digits"])
    with pytest.raises(ValueError, match="pins are of deep concepts"):
        CompressorConfig(pins=("digits",))
    with pytest.raises(ValueError, match="alphabetical order"):
        CompressorConfig(entry_layer=1, pins=("names", "digits"))
    with pytest.raises(ConfigurationError, match=r"pins.0 makes no sense"):
        pinned(untrained_deep(model, information=information(model)), ["verbs"])  # type: ignore[list-item]
