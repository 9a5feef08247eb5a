"""Reuse: streams, the prefix cache, costs, and the benchmark on a toy model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import toy
from benchmarks.reuse import reuse_page as page
from benchmarks.reuse.costs import Costs, fit, load_cache
from benchmarks.reuse.reuse import PREFIXES, first_below, simulate, systems_of
from benchmarks.reuse.streams import (
    PrefixCache,
    Sizes,
    conversation_stream,
    own_tokens,
    positions,
    sizes_of,
    zipf_stream,
)
from compllm_rag.compression.compressor import Compressor
from compllm_rag.errors import ConfigurationError
from loft_corpus import run

N = 30
SIZES = Sizes(text=(200,) * N, concepts=(103,) * N, head=40, marker=6, question=20)
COSTS = Costs((0.0, 1e-3, 1e-7), 1e-3, 1e-3, 1e-2, 1e-2, 46_000, 1152)


def test_streams_are_seeded_and_draw_some_passages_more_often() -> None:
    first, again = (list(itertools.islice(zipf_stream(N, 3, 1.0, 7), 200)) for _ in range(2))
    assert first == again
    drawn = [p for prompt in first for _, p in prompt if p >= 0]
    assert len(drawn) == 600 and len(set(drawn)) > 20
    counts = sorted((drawn.count(p) for p in set(drawn)), reverse=True)
    assert counts[0] > 5 * counts[-1]
    assert all(len({p for _, p in prompt if p >= 0}) == 3 for prompt in first), "no passage twice in a prompt"


def test_a_turn_goes_on_where_the_last_one_ended() -> None:
    one, two, three, other = itertools.islice(conversation_stream(N, 2, 1.0, 0, 3), 4)
    assert two[: len(one)] == one and three[: len(two)] == two
    assert other[: len(one)] != one and sum(p >= 0 for _, p in three) == 4


def test_positions_shrink_for_passages_but_not_for_what_stands_around_them() -> None:
    prompt = [("head", -1), ("p1", 1), ("q0", -1)]
    assert positions(prompt, SIZES, SIZES.text) == [("head", 40), ("p1", 206), ("q0", 20)]
    assert positions(prompt, SIZES, SIZES.concepts)[1] == ("p1", 109)


def test_sizes_are_those_of_the_default_prompt() -> None:
    compressor = Compressor(toy.llm())
    sizes = sizes_of(compressor, [toy.TEXT], 2.0)
    n = len(compressor.segmenter.tokenize(toy.TEXT).ids)
    assert sizes.text == (n,) and n / 2 <= sizes.concepts[0] < 0.6 * n
    assert min(sizes.head, sizes.marker, sizes.question) > 0


def test_the_prefix_cache_wants_the_same_beginning() -> None:
    cache = PrefixCache()
    assert cache.hit([("head", 40), ("a", 100), ("q", 20)]) == 0
    assert cache.hit([("head", 40), ("b", 100), ("a", 100)]) == 32, "the head, in whole blocks of 16"
    assert cache.hit([("head", 40), ("a", 100), ("r", 20)]) == 128
    assert cache.hit([("a", 100)]) == 0
    assert cache.positions == 160 + 200 + 20 + 100, "each position once"


def test_costs_of_a_known_prefix_are_not_paid_again() -> None:
    assert COSTS.read(1000) == pytest.approx(1.1)
    assert COSTS.read(1000, 600) == pytest.approx(COSTS.read(1000) - COSTS.read(600))


def test_the_fit_gives_back_the_curve() -> None:
    lengths = [64, 256, 1024]
    found = fit(lengths, [0.01 + 1e-3 * n + 1e-7 * n * n for n in lengths])
    assert found == pytest.approx((0.01, 1e-3, 1e-7), rel=1e-6)


def test_what_a_query_costs_in_each_system() -> None:
    prompt = [("head", -1), ("p1", 1), ("p2", 2), ("q0", -1)]
    systems = systems_of(SIZES, COSTS)
    for system in systems.values():
        system.ask(prompt, SIZES, COSTS)
    spent = {name: system.spent[1] - system.spent[0] for name, system in systems.items()}
    text, short = 40 + 2 * 206 + 20, 40 + 2 * 109 + 20
    assert spent["text"] == pytest.approx(COSTS.read(text)) == pytest.approx(spent[PREFIXES])
    assert spent["concepts"] == pytest.approx(COSTS.read(short) + 2 * COSTS.fetch)
    assert spent["concepts, lazy"] == pytest.approx(spent["concepts"] + 400 * COSTS.compress)
    assert spent["chunk KV"] == pytest.approx(COSTS.read(text, 400) + 2 * COSTS.kv_load)
    assert systems["chunk KV"].prefilled == text - 400
    again = [*prompt[:-1], ("q1", -1)]
    for name in ("concepts, prefix cache", "chunk KV, prefix cache", "concepts, lazy"):
        systems[name].ask(again, SIZES, COSTS)
    assert systems["concepts, lazy"].spent[2] - systems["concepts, lazy"].spent[1] == pytest.approx(spent["concepts"])
    # 258 positions are known, 256 of them in whole blocks: the second passage ends beyond and is fetched again.
    cost = COSTS.read(short, 256) + COSTS.fetch
    assert systems["concepts, prefix cache"].spent[2] - systems["concepts, prefix cache"].spent[1] == pytest.approx(
        cost
    )
    assert systems["chunk KV, prefix cache"].prefilled <= systems["chunk KV"].prefilled + 20


def test_deep_concepts_pass_the_upper_layers_alone() -> None:
    costs = replace(COSTS, lower=(0.0, 4e-4, 1e-7), upper=(0.0, 6e-4, 1e-7), share=0.6)
    prompt = [("head", -1), ("p1", 1), ("p2", 2), ("q0", -1)]
    systems = systems_of(SIZES, costs)
    for name in ("concepts", "concepts, prefix cache"):
        systems[name].ask(prompt, SIZES, costs)
    tokens, slots = 40 + 2 * 6 + 20, 40 + 2 * 109 + 20
    assert own_tokens(prompt, SIZES, positions(prompt, SIZES, SIZES.concepts), slots) == pytest.approx(tokens)
    reading = 4e-4 * tokens + 1e-7 * tokens**2 + 6e-4 * slots + 1e-7 * slots**2
    assert costs.read_deep(tokens, slots) == pytest.approx(reading)
    assert systems["concepts"].spent[1] - systems["concepts"].spent[0] == pytest.approx(reading + 2 * costs.fetch)
    kept = systems["concepts, prefix cache"].cached_bytes(SIZES, costs)
    assert kept == pytest.approx(costs.kv_bytes * (tokens + 0.6 * (slots - tokens)))
    known = costs.read_deep(tokens, slots, tokens / 2, 139)
    assert 0 < known < reading
    with pytest.raises(ConfigurationError, match="no costs of two halves"):
        COSTS.read_deep(1, 2)


def test_breaking_even_is_for_good() -> None:
    assert first_below([5.0, 6.0, 7.0, 8.0], [0.0, 3.0, 6.0, 9.0]) == 3
    assert first_below([0.0, 1.0], [0.0, 1.0]) is None
    assert first_below([1.0, 1.5, 5.0, 5.5], [0.0, 2.0, 4.0, 6.0]) == 3


def test_a_joined_cache_holds_what_the_files_hold(tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    parts = [torch.randn(1, 2, n, 4).half() for n in (3, 5)]
    for path, part in zip(paths, parts, strict=True):
        save_file({"k0": part}, path)
    joined = load_cache(paths, torch.float32, torch.device("cpu"))["k0"]
    assert joined.dtype == torch.float32 and torch.equal(joined, torch.cat(parts, 2).float())


def test_concepts_pay_off_and_prefix_caching_helps_conversations_most() -> None:
    found = {
        name: simulate(stream, SIZES, COSTS, 300)
        for name, stream in (
            ("zipf", zipf_stream(N, 3, 1.0, 0)),
            ("conversations", conversation_stream(N, 3, 1.0, 0, 4)),
        )
    }
    for stream in found.values():
        systems = stream["systems"]
        assert systems["concepts"]["per_query_s"] < systems["text"]["per_query_s"]
        assert systems["concepts"]["breaks_even_with_text"] > 1 and 90 < stream["reused"] < 100
        assert systems["text"]["breaks_even_with_text"] is None
        once, often = (systems["concepts"]["amortised_s"][q] for q in ("1", "300"))
        assert once > often
        assert systems["concepts, lazy"]["amortised_s"]["1"] < once
        assert systems["chunk KV"]["kept_bytes"] == 200 * N * COSTS.kv_bytes
        assert systems["concepts"]["kept_bytes"] == 103 * N * COSTS.concept_bytes
        assert systems[PREFIXES]["kept_bytes"] > 0 == systems["text"]["kept_bytes"]
    share = {
        name: s["systems"][PREFIXES]["positions_per_query"] / s["systems"]["text"]["positions_per_query"]
        for name, s in found.items()
    }
    assert share["conversations"] < share["zipf"]


@pytest.mark.parametrize("codec", ["deep", "input"])
def test_it_runs_keeps_its_costs_and_has_its_section(codec: str, toy_folder: Path, tmp_path: Path) -> None:
    out, deep = tmp_path / "reuse.json", codec == "deep"
    words = [
        "--llm",
        toy_folder,
        *([] if deep else ["--codec", codec]),
        "--repeats",
        1,
        "--lengths",
        16,
        64,
        128,
        "--queries",
    ]
    for queries in (20, 30):
        record, told = run("reuse", out, *words, queries)
        assert ("round 1 of 1" in told) == (queries == 20)
    assert record["passages"] > 50 and set(record["streams"]) == {"zipf", "conversations"} and record["queries"] == 30
    assert record["costs"]["kv_bytes"] == 2 * 2 * 2 * 8 * 2, "layers, keys and values, heads, width, fp16"
    assert record["costs"]["concept_bytes"] == (66 if deep else 64)
    assert 0.5 <= record["concepts"] / record["source_tokens"] < 0.6
    assert (record["costs"]["upper"] is not None) == deep and record["costs"]["share"] == (0.5 if deep else 1)
    assert min(record["costs"][name] for name in ("compress", "fetch", "kv_load", "kv_store")) > 0
    made = "\n".join(page.tables(record))
    assert ("## Reuse of deep concepts" in made) == ("(reuse_deep.png)" in made) == deep
    assert "### Conversations" in made and "| chunk KV, prefix cache |" in made
    assert len(page.plot(record).axes) == 2
