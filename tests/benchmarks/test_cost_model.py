"""The arithmetic of deep concepts: against counts by hand, a real forward's caches, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import toy
from benchmarks.shapes import config_of
from benchmarks.ttft.cost_model import beside_measured, main, own_tokens, shape_rows, stored_bytes, tables
from benchmarks.ttft.flops import LayerShape, deep_kv_bytes, deep_prefill, kv_bytes, layers_of, prefill, weight_bytes
from compllm_rag.compression.loading import untrained_deep
from compllm_rag.generation.halves import SplitForward, States, Tokens
from loft_corpus import run

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_two_layers_by_hand() -> None:
    layers = [LayerShape(weights=6, attention=2, kv=2, window=None)] * 2
    # 2 tokens below: 2 * 6 * 2 + 4 * 2 * 2; 2 tokens and 2 concepts above: 2 * 6 * 4 + 4 * 2 * 8.
    assert deep_prefill(layers, 1, 2, 2) == 24 + 16 + 48 + 64
    assert deep_prefill(layers, 0, 2, 2) == prefill(layers, 4), "at the input embeddings all layers see concepts"
    assert deep_kv_bytes(layers, 1, 2, 2) == 2 * 2 * (2 + 4)


def test_half_the_layers_and_every_second_token_are_a_quarter_of_the_linear_work() -> None:
    [row] = [r for r in shape_rows(config_of("smollm2-135m"), 15, [250], [2.0]) if r["rate"]]
    assert 0.25 < row["of_text"] < 0.42, "the prompt's own tokens go through all layers"
    long = [r for r in shape_rows(config_of("qwen3-4b"), 18, [131072], [1.0, 2.0, 4.0]) if r["rate"]]
    assert [round(r["of_text"], 2) for r in long] == [0.5, 0.15, 0.05], "attention falls with the square of the rate"
    assert [round(r["kv_of_text"], 2) for r in long] == [0.51, 0.27, 0.15]


def test_layers_with_a_window_hold_no_more_than_it() -> None:
    layers = layers_of(config_of("gemma3-4b"))
    full = sum(layer.window is None for layer in layers[17:])
    grown = deep_kv_bytes(layers, 17, 0, 64_000) - deep_kv_bytes(layers, 17, 0, 32_000)
    assert grown == full * layers[0].kv * 2 * 32_000
    assert deep_kv_bytes(layers, 17, 100, 100) == kv_bytes(layers[:17], 100) + kv_bytes(layers[17:], 200)


def test_bytes_of_weights_and_caches_are_those_of_a_model() -> None:
    llm = toy.llm(layers=4)
    norms = sum(p.numel() for name, p in llm.model.named_parameters() if "norm" in name)
    assert weight_bytes(llm.model.config, 1) == sum(p.numel() for p in llm.model.parameters()) - norms
    halves = untrained_deep(llm, 1).halves
    forward = SplitForward(halves, [[Tokens([5, 6, 7]), States(torch.randn(9, llm.hidden_size)), Tokens([8])]])
    forward.prefill()
    held = sum(t.numel() for cache in forward.caches for layer in cache.layers for t in (layer.keys, layer.values))
    assert deep_kv_bytes(layers_of(llm.model.config), 1, 4, 9, width=1) == held


def test_stored_bytes_are_those_of_the_encodings() -> None:
    found = stored_bytes(576, [1.0, 2.0])
    assert found["fp16"] == {"1": 2 * 577, "2": 577}
    assert found["int8"]["1"] == 2 + 16 + 4 + 576 and found["int4"]["2"] < found["int8"]["2"] / 1.7


def test_the_arithmetic_is_near_what_was_measured() -> None:
    """From 1,000 tokens on within 0.06 of text's prefill; below, where matrices are small, within 0.12."""
    measured = json.loads((RESULTS / "ttft_deep.json").read_text())
    rows = beside_measured(layers_of(config_of("smollm2-135m")), measured)
    assert len(rows) >= 9
    for row in rows:
        tolerance = 0.06 if row["source_tokens"] >= 1000 else 0.12
        assert row["measured"] == pytest.approx(row["arithmetic"], abs=tolerance), row
        # A count that forgot the halves or the attention would be off by more than the tolerance.
    long = [row for row in rows if row["source_tokens"] >= 4000]
    assert [round(row["arithmetic"], 1) for row in long[:3]] == [0.5, 0.2, 0.1]


def test_the_committed_prompts_are_as_long_as_the_model_takes_them_to_be() -> None:
    for found in json.loads((RESULTS / "ttft_deep.json").read_text())["lengths"].values():
        own = found["rows"][0]["positions"] - found["source_tokens"]
        assert own_tokens(found["source_tokens"]) == pytest.approx(own, abs=20)


def test_it_runs_and_has_its_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shapes", "tiny", "gemma3-4b", "--lengths", 1000, "--measured", RESULTS / "ttft_deep.json"]
    record, _ = run("cost_model", tmp_path / "o.json", *words)
    page = "\n".join(tables(record))
    assert "### gemma3-4b: concepts enter at layer 17 of 34, 29 with a window of 1,024" in page
    assert f"| 1,000 | {record['shapes']['tiny']['rows'][0]['flops'] / 1e12:.2f} |" in page
    assert "| by arithmetic | measured |" in page
    with pytest.raises(SystemExit):
        main(["--shapes", "tiny", "--entry-layer", "3"])
    assert "tiny has layers 0 to 2" in capsys.readouterr().err
