"""Units as long as chunks: what a compressor with other units shares with the one it comes from, and what not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.late_interaction import LateInteraction, interaction_of
from compllm_rag.compression.loading import load_compressor, with_room_for_chunks, with_unit_length
from compllm_rag.compression.segmentation import Segmenter, chunk_texts, unit_length_for, units_of
from compllm_rag.config import LONGEST_UNIT
from compllm_rag.errors import ConfigurationError
from compllm_rag.models.llm import TargetLLM
from tests.llamaindex.test_index import documents
from trained import rising_losses, trained_deep

LONG = " ".join(document.text for document in documents(4)) * 3


@pytest.fixture(scope="module")
def model() -> TargetLLM:
    return toy.llm(layers=4)


@pytest.fixture(scope="module")
def short(model: TargetLLM) -> DeepCompressor:
    return trained_deep(model, unit_length=60)


@pytest.mark.parametrize("size", [20, 33, 50, 97, 200, 333, 800, 1024])
def test_a_chunk_of_any_size_is_one_unit(model: TargetLLM, size: int) -> None:
    segmenter = Segmenter(model.tokenizer, 20)
    length = unit_length_for(size)
    tokenized = segmenter.tokenize(LONG * 4)
    chunks = [text for text, _, _ in chunk_texts(tokenized, size)]
    assert len(chunks) > 1
    assert [len(units_of(segmenter.tokenize(text), length)) for text in chunks] == [1] * len(chunks)
    assert unit_length_for(200) == 240, "the default of either"


def test_short_texts_have_the_same_concepts_and_long_ones_lose_no_unit(short: DeepCompressor) -> None:
    longer = with_unit_length(short, 600)
    assert (longer.config.unit_length, short.config.unit_length) == (600, 60)
    assert longer.fingerprint != short.fingerprint
    assert with_unit_length(longer, 60).fingerprint == short.fingerprint
    one = short.spec.units(LONG)[0]
    assert torch.equal(longer.compress([one], [7])[0], short.compress([one], [7])[0])
    whole, cut = longer.spec.units(LONG), short.spec.units(LONG)
    assert len(whole) < len(cut)
    assert [t for unit in whole for t in unit] == [t for unit in cut for t in unit]
    states = longer.compress(whole[:1], [len(whole[0])])[0]  # (n_tokens, hidden_size + 1)
    n = len(cut[0])
    torch.testing.assert_close(
        states[:n], short.compress([cut[0]], [n])[0], atol=1e-4, rtol=0, msg="nothing stands before the first unit"
    )
    second = short.compress([cut[1]], [len(cut[1])])[0]
    assert not torch.allclose(states[n : n + len(second), :-1], second[:, :-1], atol=1e-2), "it sees what is before it"


def test_what_was_learned_beside_goes_along(model: TargetLLM, tmp_path: Path) -> None:
    made = trained_deep(model, unit_length=60)
    made.losses, made.interaction = rising_losses(made), LateInteraction(made.hidden_size, 4)
    made.interaction.compressor = made.fingerprint
    longer = with_unit_length(made, 120)
    loaded = load_compressor(longer.save_pretrained(tmp_path / "longer"), model)
    assert loaded.fingerprint == longer.fingerprint
    assert loaded.losses is not None
    assert (loaded.losses.compressor, loaded.losses.offsets) == (longer.fingerprint, made.losses.offsets)
    found = interaction_of(loaded.interaction, longer.fingerprint, made.hidden_size)
    assert isinstance(found, LateInteraction)
    assert found.identity == made.interaction.identity
    assert made.interaction.compressor == made.losses.compressor == made.fingerprint, "the one it comes from stays"


def test_room_is_made_only_where_a_chunk_needs_it(short: DeepCompressor, model: TargetLLM) -> None:
    assert with_room_for_chunks(short, 50) is short
    assert with_room_for_chunks(short, 51).config.unit_length == unit_length_for(51)
    assert with_room_for_chunks(trained_deep(toy.llm(layers=4, window=4096)), 9000).config.unit_length == LONGEST_UNIT
    narrow = trained_deep(toy.llm(layers=4, window=300))
    assert with_room_for_chunks(narrow, 9000).config.unit_length == 300 - len(narrow.config.opening)
    segments = Compressor(model)
    assert with_room_for_chunks(segments, 9000) is segments


def test_lengths_that_cannot_be_are_refused(short: DeepCompressor, model: TargetLLM) -> None:
    for wrong in (0, short.config.segment_length - 1, LONGEST_UNIT + 1):
        with pytest.raises(ConfigurationError, match="unit_length|greater|less"):
            with_unit_length(short, wrong)
    narrow = trained_deep(toy.llm(layers=4, window=300))
    with pytest.raises(ConfigurationError, match=r"does not read units as long.*got 400.*window of 300"):
        with_unit_length(narrow, 400)
    with pytest.raises(ConfigurationError, match="units are of deep concepts"):
        with_unit_length(Compressor(model), 400)
