"""Learned late interaction: its arithmetic, its file, and what lies beside a compressor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import toy
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.late_interaction import RELEVANCE_FILE, LateInteraction, interaction_of
from compllm_rag.compression.loading import load_compressor, shipped_adapter
from compllm_rag.config import DEFAULT_LLM
from compllm_rag.errors import UnsupportedFormatError
from trained import trained_deep

WIDTH = 8


def made(hidden_size: int = 12, seed: int = 0) -> LateInteraction:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = LateInteraction(hidden_size, WIDTH)
    return out.requires_grad_(False).eval()


def states(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(seed))


def test_sentences_are_scored_by_their_nearest_states() -> None:
    one, question, passages = made(), states(3, 1), [states(5, 2), states(4, 3)]
    bounds, words = [[(0, 2), (2, 5)], [(0, 4)]], [1.0, 0.5, 0.0]
    found = one(question, passages, bounds, words).numpy()

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def projected(layer: torch.nn.Linear, x: torch.Tensor) -> np.ndarray:
        return x.numpy() @ layer.weight.numpy().T + layer.bias.numpy()

    left = unit(projected(one.question, question))
    weight = np.exp(projected(one.attention, question)[:, 0])
    weight /= weight.sum()
    scores = []
    for own, rows in zip(passages, bounds, strict=True):
        near = left @ unit(projected(one.passage, own)).T
        row = np.array([float(one.sharpness) * weight @ near[:, a:b].max(1) for a, b in rows])
        scores += list(row + float(one.whole) * np.log(np.exp(row).sum()))
    np.testing.assert_allclose(found, np.array(scores) + float(one.words) * np.array(words), rtol=1e-4)


def test_a_sentence_of_which_nothing_is_kept_is_as_far_as_can_be() -> None:
    one = made()
    found = one(states(3, 1), [states(4, 2), states(0, 4)], [[(0, 4), (4, 4)], []], [0.0, 0.0])
    assert found.shape == (2,) and found[0] > found[1]
    assert float(found[0] - found[1]) <= 2 * float(one.sharpness) and one(states(2, 1), [], [], []).shape == (0,)


def test_what_was_learned_has_a_name() -> None:
    assert made().identity == made().identity != made(seed=1).identity


def test_states_are_standardised_by_a_sample() -> None:
    one, loud = made(), torch.ones(12)
    loud[3] = 500.0
    plain, away = [states(40, 5), states(60, 6)], 30 * torch.ones(12)
    one.standardise(*plain)
    expected = one(plain[0], [plain[1]], [[(0, 30), (30, 60)]], [0, 0])
    one.standardise(*(each * loud + away for each in plain))
    found = one(plain[0] * loud + away, [plain[1] * loud + away], [[(0, 30), (30, 60)]], [0, 0])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def compressor(**settings: Any) -> DeepCompressor:
    return trained_deep(toy.llm(layers=4), **settings)


def test_it_lies_beside_its_compressor_and_changes_no_concept(tmp_path: Path) -> None:
    own = compressor()
    before, other = own.fingerprint, trained_deep(toy.llm(layers=4), seed=9)
    own.save_pretrained(tmp_path / "none")
    assert load_compressor(tmp_path / "none", own.llm).interaction is None
    assert not (tmp_path / "none" / RELEVANCE_FILE).exists()
    own.interaction = made(own.hidden_size)
    own.interaction.compressor, own.interaction.questions = before, 7
    own.save_pretrained(tmp_path / "some")
    again = load_compressor(tmp_path / "some", own.llm)
    assert again.fingerprint == before == own.refresh_fingerprint()
    found = interaction_of(again.interaction, before, own.hidden_size)
    assert isinstance(found, LateInteraction) and found.questions == 7 and found.compressor == before
    for name, tensor in own.interaction.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor)
    assert interaction_of(None, before, own.hidden_size) == "no relevance is learned for this compressor"
    assert "another one" in str(interaction_of(found, other.fingerprint, own.hidden_size))
    assert "another one" in str(interaction_of(found, before, own.hidden_size + 1))
    other.save_pretrained(tmp_path / "some")
    assert not (tmp_path / "some" / RELEVANCE_FILE).exists(), "that of another compressor does not stay"


@pytest.mark.parametrize("harm", ["cut off", "other format", "tensor missing", "no number", "another shape"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, harm: str) -> None:
    one = made()
    one.save(tmp_path)
    path = tmp_path / RELEVANCE_FILE
    assert LateInteraction.load(tmp_path) is not None
    state, named = load_file(path), {"format_version": "1", "compressor": "", "questions": "0"}
    if harm == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    elif harm == "other format":
        save_file(state, path, {**named, "format_version": "2"})
    elif harm == "tensor missing":
        save_file({name: tensor for name, tensor in state.items() if name != "sharpness"}, path, named)
    elif harm == "no number":
        state["passage.weight"][0, 0] = torch.nan
        save_file(state, path, named)
    else:
        save_file({**state, "passage_mean": torch.zeros(5)}, path, named)
    with pytest.raises(UnsupportedFormatError, match="train relevance"):
        LateInteraction.load(tmp_path)
    shutil.rmtree(tmp_path)
    assert LateInteraction.load(tmp_path) is None


def test_it_comes_with_a_compressor_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, asked = compressor(), list[str]()
    own.interaction = made(own.hidden_size)
    own.interaction.compressor = own.fingerprint
    folder = own.save_pretrained(tmp_path / "own")

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = DeepCompressor.from_pretrained("org/name", own.llm, revision="0" * 40)
    assert set(asked) == {"config.json", "compressor.safetensors", "rates.json", RELEVANCE_FILE}
    assert found.interaction is not None and found.interaction.compressor == own.fingerprint


def test_what_ships_was_learned_for_what_ships() -> None:
    folder = Path(str(shipped_adapter(DEFAULT_LLM, "deep")))
    found, config = LateInteraction.load(folder), json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert found is not None and found.compressor == config["fingerprint"] and found.questions > 1000
    assert isinstance(interaction_of(found, config["fingerprint"], found.hidden_size), LateInteraction)
