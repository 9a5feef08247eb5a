"""TTFT: the arithmetic, shapes with random weights, the crossover, and the benchmark on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import toy
from benchmarks.memory import Peak
from benchmarks.shapes import SHAPES, config_of, random_llm
from benchmarks.ttft import ttft_deep
from benchmarks.ttft import ttft_page as page
from benchmarks.ttft.flops import LayerShape, crossover, kv_bytes, layers_of, pairs, prefill, speed_up
from benchmarks.ttft.ttft import measured_crossover
from compllm_rag.errors import ConfigurationError
from loft_corpus import run

NEEDED = 131_072


def test_the_bound_for_a_4b_model_at_128k() -> None:
    layers = layers_of(config_of("qwen3-4b"))
    assert len(layers) == 36
    assert speed_up(layers, NEEDED, 2) == pytest.approx(3.45, abs=0.01)
    assert speed_up(layers, NEEDED, 4) == pytest.approx(10.85, abs=0.01)
    assert kv_bytes(layers, NEEDED) == 36 * 2 * 8 * 128 * 2 * NEEDED


def test_windows_bound_pairs_and_caches() -> None:
    layers = layers_of(config_of("gemma3-4b"))
    assert [layer.window for layer in layers].count(None) == 5 and len(layers) == 34
    assert pairs(100, 100) == pairs(100, None) == 5000
    assert pairs(200, 100) == 15_000  # the first half as without a window, then 100 each
    windowed = [LayerShape(0, 1, 8, 100)]
    assert kv_bytes(windowed, 50) == 800 and kv_bytes(windowed, 5000) == 1600


def test_linear_work_and_attention_are_counted_alike_to_a_count_by_hand() -> None:
    # Two positions, width 2: the map's 2 x 3 weights twice, and 2 pairs of 4 FLOPs a value (n^2 / 2 of them).
    assert prefill([LayerShape(weights=6, attention=2, kv=2, window=None)], 2) == 2 * 6 * 2 + 4 * 2 * 2


def test_layers_count_the_weights_that_are_there() -> None:
    model = toy.llm().model
    linears = [m for layer in model.model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(layer.weights for layer in layers_of(model.config)) == sum(m.weight.numel() for m in linears)


def test_the_crossover_by_arithmetic() -> None:
    layers = layers_of(config_of("qwen3-4b"))
    assert crossover(layers, 1, 2, 20) == 0, "one layer costs less than it saves at any length"
    shallow, deep = crossover(layers, 12, 2, 20), crossover(layers, 36, 2, 20)
    assert shallow is not None and deep is not None and shallow < 100 < 10_000 < deep
    assert crossover([LayerShape(100, 0, 2, None)], 1, 2, 20) is None, "without attention it never pays"


def _length(tokens: int, quotient: float) -> dict:
    return {
        "source_tokens": tokens,
        "rows": [{"mode": "cold", "rate": 2.0, "ttft_over_text": {"median": quotient}}],
    }


def test_the_measured_crossover_lies_between_two_lengths() -> None:
    assert measured_crossover({"a": _length(100, 2.0), "b": _length(10_000, 0.5)}, 2.0) == {"tokens": 1000}
    assert measured_crossover({"a": _length(100, 2.0), "b": _length(1000, 1.5)}, 2.0) == {"above": 1000}
    assert measured_crossover({"a": _length(100, 0.9), "b": _length(1000, 0.5)}, 2.0) == {"below": 100}
    assert measured_crossover({"a": _length(100, 0.9)}, 4.0) is None


def test_windows_want_an_attention_that_has_them() -> None:
    with pytest.raises(ConfigurationError, match="layers have a window"):
        random_llm("gemma3-4b", toy.llm().tokenizer, dtype="float32", device="cpu")
    with pytest.raises(ConfigurationError, match="layers have a window"):
        random_llm("gemma3-4b", toy.llm().tokenizer, dtype="float32", device="cpu", attention="eager")


def test_shapes_are_what_their_names_say() -> None:
    weights = {name: sum(layer.weights for layer in layers_of(config_of(name))) for name in SHAPES}
    assert weights["qwen3-4b"] == pytest.approx(3.63e9, rel=0.01)
    assert weights["gemma3-4b"] == pytest.approx(3.21e9, rel=0.02)


def test_the_peak_is_seen() -> None:
    with Peak(torch.device("cpu")) as peak:
        torch.ones(1 << 24).sum()  # 64 MiB
    assert peak.bytes > 32 << 20


@pytest.mark.parametrize("shape", [False, True])
def test_it_runs_resumes_and_has_its_section(shape: bool, toy_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "ttft.json"
    words = ["--llm", toy_folder, "--codec", "input", "--repeats", 1, "--decode", 2, "--rates", 2]
    words += ["--shape", "tiny", "--device", "cpu"] if shape else []
    run("ttft", out, *words, "--lengths", 60, "--memory", "none")
    record, told = run("ttft", out, *words, "--lengths", 60, 120, "--memory", "longest" if shape else "none")
    assert "context of 120" in told and "context of 60" not in told
    text, concepts, cold = record["lengths"]["60"]["rows"]
    assert text["positions"] > concepts["positions"] == cold["positions"]
    assert text["kv_bytes"] > concepts["kv_bytes"] > 0
    # The longest length asked for has its peaks, each from a process of its own.
    assert all(
        row["peak_bytes"] > 0 if shape else row["peak_bytes"] is None for row in record["lengths"]["120"]["rows"]
    )
    assert cold["compress_s"] > 0 and concepts["compress_s"] == 0
    parts = sum(concepts[name] for name in ("fetch_s", "layout_s", "prefill_s"))
    assert concepts["ttft_s"] == pytest.approx(parts, rel=1e-6)
    assert text["thousand_tokens_s"] > text["ttft_s"] and concepts["flop_bound"] > 1
    assert 1 < concepts["flop_bound_positions"] < 4 and concepts["fetch_first_s"] > 0
    assert [row["rate"] for row in record["crossover"]] == [2.0]
    made = "\n".join(page.tables(record))
    assert "| concepts, rate 2 |" in made and "Crossover" in made
    assert ("(ttft_tiny.png)" if shape else "(ttft.png)") in made and len(page.plot(record).axes[0].lines) == 6


def test_without_a_codec_it_measures_deep_concepts(toy_folder: Path, tmp_path: Path) -> None:
    words = ["--llm", toy_folder, "--repeats", 1, "--decode", 2, "--rates", 1, "--lengths", 120]
    record, _ = run("ttft", tmp_path / "o.json", *words)
    text, deep = record["lengths"]["120"]["rows"]
    assert record["entry_layer"] == 1 and deep["ttft_over_bound"]["median"] > 0
    assert text["kv_bytes"] > deep["kv_bytes"] and deep["per_token_s"] > 0
    assert text["peak_bytes"] > 0 and deep["resident_peak_bytes"] > deep["peak_bytes"] > 0
    made = "\n".join(page.tables(record))
    assert "## Time to first token of deep concepts" in made and "| decode ms / token |" in made
    with pytest.raises(ConfigurationError, match="add --codec input"):
        run("ttft", tmp_path / "p.json", "--shape", "tiny")


def test_narrowed_concepts_have_rows_of_their_own(tmp_path: Path) -> None:
    llm = toy.save(tmp_path / "llm", layers=4)
    words = ["--llm", llm, "--lengths", 120, "--rates", 1, "--repeats", 1, "--memory", "longest", "--narrow", "3:0.1"]
    record, _ = run("ttft", tmp_path / "o.json", *words)
    text, whole, narrowed = record["lengths"]["120"]["rows"]
    assert narrowed["narrowing"] == "3:0.1" and narrowed["positions"] == whole["positions"]
    assert text["kv_bytes"] > whole["kv_bytes"] > narrowed["kv_bytes"]
    assert "peak_bytes" in whole and "peak_bytes" not in narrowed and narrowed["ttft_over_bound"] is None
    assert "concepts, rate 1, narrowed 3:0.1" in "\n".join(ttft_deep.tables(record))
