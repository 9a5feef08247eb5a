"""Reuse: streams, the prefix cache, costs, and the benchmark on a toy model."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.pages import reuse as page
from benchmarks.reuse import (
    Costs,
    PrefixCache,
    conversation_stream,
    fit,
    positions,
    simulate,
    zipf_stream,
)

ROOT = Path(__file__).parents[2]
TOKENS = [200] * 30
COSTS = Costs((0.0, 1e-3, 1e-7), 1e-3, 1e-3, 1e-2, 1e-2, 46_000, 600)


def test_streams_are_seeded_and_draw_some_passages_more_often() -> None:
    first, again = (list(itertools.islice(zipf_stream(TOKENS, 3, 1.0, 7), 200)) for _ in range(2))
    assert first == again
    drawn = [name for prompt, _ in first for name, n in prompt if n]
    assert len(drawn) == 600 and len(set(drawn)) > 20
    counts = sorted((drawn.count(name) for name in set(drawn)), reverse=True)
    assert counts[0] > 5 * counts[-1]
    assert all(len({name for name, n in prompt if n}) == 3 for prompt, _ in first), "no passage twice in a prompt"


def test_a_turn_goes_on_where_the_last_one_ended() -> None:
    one, two, three, other = (prompt for prompt, _ in itertools.islice(conversation_stream(TOKENS, 2, 1.0, 0, 3), 4))
    assert two[: len(one)] == one and three[: len(two)] == two
    assert other[: len(one)] != one and sum(n > 0 for _, n in three) == 4


def test_positions_shrink_for_passages_alone() -> None:
    prompt = [("head", 0), ("p1", 200), ("q0", 0)]
    assert positions(prompt, 1) == [("head", 40), ("p1", 200), ("q0", 20)]
    assert positions(prompt, 4)[1] == ("p1", 50)


def test_the_prefix_cache_wants_the_same_beginning() -> None:
    cache = PrefixCache()
    assert cache.hit([("head", 40), ("a", 100), ("q", 20)]) == 0
    assert cache.hit([("head", 40), ("b", 100), ("a", 100)]) == 32, "the head, in whole blocks of 16"
    assert cache.hit([("head", 40), ("a", 100), ("r", 20)]) == 128
    assert cache.hit([("a", 100)]) == 0


def test_costs_of_a_known_prefix_are_not_paid_again() -> None:
    assert COSTS.read(1000) == pytest.approx(1.1)
    assert COSTS.read(1000, 600) == pytest.approx(COSTS.read(1000) - COSTS.read(600))


def test_the_fit_gives_back_the_curve() -> None:
    lengths = [64, 256, 1024]
    found = fit(lengths, [0.01 + 1e-3 * n + 1e-7 * n * n for n in lengths])
    assert found == pytest.approx((0.01, 1e-3, 1e-7), rel=1e-6)


def test_concepts_pay_off_and_prefix_caching_helps_conversations_most() -> None:
    found = {
        name: simulate(stream, TOKENS, COSTS, 2.0, 300)
        for name, stream in (
            ("zipf", zipf_stream(TOKENS, 3, 1.0, 0)),
            ("conversations", conversation_stream(TOKENS, 3, 1.0, 0, 4)),
        )
    }
    for stream in found.values():
        systems = stream["systems"]
        assert systems["concepts"]["per_query_s"] < systems["text"]["per_query_s"]
        assert systems["concepts"]["breaks_even_with_text"] > 1 and 90 < stream["reused"] < 100
        assert systems["text"]["breaks_even_with_text"] is None
        once, often = (systems["concepts"]["amortised_s"][q] for q in ("1", "300"))
        assert once > often
    share = {
        name: s["systems"]["text, prefix cache"]["positions_per_query"] / s["systems"]["text"]["positions_per_query"]
        for name, s in found.items()
    }
    assert share["conversations"] < share["zipf"]


def test_it_runs_and_has_its_section(toy_folder: Path, tmp_path: Path) -> None:
    words = ["--llm", toy_folder, "--repeats", 1, "--queries", 20, "--lengths", 16, 64, 128]
    command = [sys.executable, "-m", "benchmarks.reuse", "--json", tmp_path / "reuse.json", *words]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "reuse.json").read_text())
    assert record["passages"] > 50 and set(record["streams"]) == {"zipf", "conversations"}
    assert record["costs"]["kv_bytes"] == 2 * 2 * 2 * 8 * 2, "layers, keys and values, heads, width, fp16"
    assert min(record["costs"][name] for name in ("compress", "fetch", "kv_load", "kv_store")) > 0
    made = page.section(tmp_path, tmp_path)
    assert made is not None and "### Conversations" in made and "| chunk KV |" in made
    assert (tmp_path / "reuse.png").stat().st_size > 1000
