"""Curves of seconds, calibration, and where it is kept."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import toy
from compllm_rag.config import Narrowing
from compllm_rag.errors import NotCalibratedError, UnsupportedFormatError
from compllm_rag.generation import calibration
from compllm_rag.generation.calibration import Machine, calibrate, needed_costs, save_costs, saved_costs
from compllm_rag.generation.costs import CostModel, Curve, counted_prefill
from compllm_rag.models.halves import Halves

LENGTHS = (32, 64, 128)


def test_a_curve_is_found_again() -> None:
    true = Curve(0.02, 0.001, 2e-6)
    lengths = [32, 128, 256, 512, 1024]
    found = Curve.fitted(lengths, [true(n) for n in lengths])
    assert (found.base, found.linear, found.quadratic) == pytest.approx((0.02, 0.001, 2e-6))
    assert true(0) == 0.0
    assert Curve.fitted([100], [0.5])(200) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(5))
def test_a_curve_of_noise_never_falls(seed: int) -> None:
    lengths = [32, 128, 256, 512]
    noise = np.random.default_rng(seed).uniform(0.5, 1.5, len(lengths))
    found = Curve.fitted(lengths, [0.001 * n * factor for n, factor in zip(lengths, noise, strict=True)])
    assert min(found.base, found.linear, found.quadratic) >= 0
    assert [found(n) for n in range(1, 600, 50)] == sorted(found(n) for n in range(1, 600, 50))


def test_seconds_of_a_prompt_go_by_its_halves() -> None:
    lower, upper, whole = Curve(0, 1, 0), Curve(0, 10, 0), Curve(0, 100, 0)
    deep = CostModel("l", "i", 2, 4, "float32", "cpu", 1, whole, lower, upper, 0.5, 100)
    assert deep.prefill_s(3, 4) == 3 + 70 and deep.prefill_s(3, 0) == 300 and deep.compress_s(6) == 3
    shallow = dataclasses.replace(deep, lower=None, upper=None)
    assert shallow.prefill_s(3, 4) == 700
    assert counted_prefill(10, 8, entry_layer=15, depth=30) == 14
    assert counted_prefill(10, 8, entry_layer=0, depth=30) == 18
    # 20 concepts in layers 15 to 24, 2 of them in the last 6 as well.
    narrowed = counted_prefill(10, 20, entry_layer=15, depth=30, narrowing=Narrowing.parse("24:0.1"))
    assert narrowed == pytest.approx(10 + (20 * 9 + 2 * 6) / 30)
    assert counted_prefill(10, 20, entry_layer=15, depth=30, narrowing=Narrowing.parse("24:0")) == 16


def test_calibration_measures_whole_and_halves() -> None:
    llm, said, made = toy.llm(layers=4), [], []
    found = calibrate(llm, Halves(llm, 2), made.append, seconds=0.1, lengths=LENGTHS,
                      progress=lambda message, share: said.append(share))  # fmt: skip
    assert found.lower is not None and found.upper is not None
    for curve in (found.whole, found.lower, found.upper):
        assert 0 < curve(64) < 5
    assert found.compress_s_per_token > 0 and len(made[0]) == 200
    assert (found.entry_layer, found.depth, found.threads) == (2, 4, torch.get_num_threads())
    assert said == sorted(said) and 0 < said[0] <= said[-1] <= 1
    assert calibrate(llm, None, made.append, seconds=0.1, lengths=LENGTHS).lower is None


def test_it_is_kept_for_this_llm_dtype_and_threads_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = toy.llm(layers=4)
    with pytest.raises(NotCalibratedError, match="no calibration of .* float32 on cpu with"):
        needed_costs(llm, 2)
    found = calibrate(llm, Halves(llm, 2), len, seconds=0.05, lengths=LENGTHS)
    file = save_costs(found)
    assert file.is_relative_to(os.environ["COMPLLM_CACHE"])
    assert needed_costs(llm, 2) == found == saved_costs(llm, 2)
    assert save_costs(found) == file and [p.name for p in file.parent.iterdir()] == [file.name]
    assert saved_costs(llm, 1) is None and saved_costs(toy.llm(seed=1, layers=4), 2) is None
    assert saved_costs(llm, 2, tmp_path) is None
    monkeypatch.setattr(calibration.torch, "get_num_threads", lambda: 77)
    assert saved_costs(llm, 2) is None and Machine.of(llm, 2).threads == 77


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format_version": 2}', "version", "curve"])
def test_a_damaged_file_is_told(damage: str) -> None:
    llm = toy.llm(layers=4)
    file = save_costs(calibrate(llm, None, len, seconds=0.05, lengths=LENGTHS))
    held = json.loads(file.read_text())
    if damage == "version":
        damage = json.dumps(held | {"format_version": 9})
    elif damage == "curve":
        damage = json.dumps(held | {"whole": None})
    file.write_text(damage)
    with pytest.raises(UnsupportedFormatError, match="compllm-rag calibrate"):
        saved_costs(llm, 0)
