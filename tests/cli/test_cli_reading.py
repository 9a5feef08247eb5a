"""Budgets, read policies and `--explain` of `query`, and `calibrate`, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import toy
from tests.cli.test_cli import QUESTION, refused, run
from toy_embedder import save_sentence_transformer

SHORT = ("--max-new-tokens", 4)


@pytest.fixture(scope="module")
def storage(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    docs, embedder = folder / "docs", save_sentence_transformer(folder / "embedder", toy.TEXT)
    docs.mkdir()
    for number, part in enumerate(toy.TEXT.split("\n\n")):
        (docs / f"{number}.md").write_text(f"# Part {number}\n\n{part}", encoding="utf-8")
    run("ingest", docs, "--storage", folder / "storage", "--llm", toy_folder, "--embedder", embedder)
    return folder / "storage"


def asked(storage: Path, *options: object) -> dict:
    return json.loads(run("query", QUESTION, "--storage", storage, "--json", *SHORT, *options).stdout)


def test_budgets_are_kept(storage: Path) -> None:
    whole = asked(storage)
    assert whole["read_policy"] is None and whole["sources"][0]["parts"] is None
    for flag, name in (("--position-budget", "position_budget"), ("--prefill-budget", "prefill_budget")):
        found = asked(storage, flag, 60)
        assert found["read_policy"]["name"] == "budgeted"
        assert found["read_policy"]["taken"][name] <= found["read_policy"]["budget"][name] == 60
        assert found["prompt_positions"] < whole["prompt_positions"]
        assert len(found["sources"]) + len(found["read_policy"]["left_out"]) == len(whole["sources"])
    half = asked(storage, "--rate", 2)
    assert all(s["n_concepts"] < s["n_tokens"] for s in half["sources"]) and half["store"]["misses"]
    assert asked(storage, "--rate", 2, "--missing", "text")["prefill_cost"] == 1.0
    assert asked(storage, "--rate", 2, "--missing", "auto")["bypassed"] in (0, len(half["sources"]))


def test_explain_tells_each_passage_in_plain_words(storage: Path) -> None:
    options = ("--storage", storage, "--explain", *SHORT)
    plain = run("query", QUESTION, *options).stdout
    assert "all passages are read in the same way" in plain and "of the prefill" in plain
    told = run("query", QUESTION, *options, "--prefill-budget", 50).stdout
    assert "read policy budgeted: prefill_budget" in told and "of 50" in told
    assert "says " in told and "The lighthouse on Gull Rock was built" in told and "left out" in told
    assert "concepts valued by a table of rates (no losses are fitted to this compressor)" in told
    assert "concepts at rate 1, worth 1.00" in told
    fixed = run("query", QUESTION, *options, "--prefill-budget", 60, "--read-policy", "fixed").stdout
    assert "does not fit the budget beside the passages before it" in fixed


def test_relevance_by_states_is_told(storage: Path) -> None:
    budget = ("--prefill-budget", 50)
    assert asked(storage, *budget)["read_policy"]["relevance"] == {"signal": "bm25"}
    for name in ("maxsim", "bm25+maxsim"):
        found = asked(storage, *budget, "--relevance", name)["read_policy"]
        told = found["relevance"]
        assert told["signal"] == name and told["question_tokens"] > 3 and told["question_s"] > 0
        assert told["by_words"] == {} and found["taken"]["prefill_budget"] <= 50
    told_in_words = run(
        "query", QUESTION, "--storage", storage, *budget, "--relevance", "maxsim", "--rate", 3, "--explain", *SHORT
    ).stdout
    assert "sentences judged by maxsim: the question's" in told_in_words
    assert "by its words: Part 0 (its concepts are not stored)" in told_in_words


def test_a_relevance_cutoff_leaves_out_what_is_far_behind(storage: Path) -> None:
    budget = ("--prefill-budget", 500)
    whole, cut = (asked(storage, *budget, *more)["read_policy"] for more in ((), ("--relevance-cutoff", 1)))
    assert not whole["left_out"] and cut["taken"]["prefill_budget"] < whole["taken"]["prefill_budget"]
    told = run("query", QUESTION, "--storage", storage, *budget, "--relevance-cutoff", 1, "--explain", *SHORT).stdout
    assert "too far behind the likeliest" in told
    beyond = ("--storage", storage, *budget, "--relevance-cutoff", 2)
    assert "--relevance-cutoff" in run("query", QUESTION, *beyond, code=2).stderr


def test_a_time_wants_a_calibration_and_then_is_kept(storage: Path) -> None:
    said = refused("query", QUESTION, "--storage", storage, "--ttft-budget", 9)
    assert "nobody has measured how fast this machine reads" in said and "compllm-rag calibrate" in said
    lines = run("calibrate", "--storage", storage, "--seconds", 0.2).stdout
    assert "tokens of passages as text take" in lines and "deep concepts" in lines and "in line" in lines
    found = asked(storage, "--ttft-budget", 9)
    assert found["read_policy"]["taken"]["ttft_budget_s"] <= 9 and not found["read_policy"]["left_out"]
    assert "ttft_budget_s of at least" in refused("query", QUESTION, "--storage", storage, "--ttft-budget", 1e-6)


def test_a_calibration_without_a_storage(toy_folder: Path) -> None:
    for codec, halves in (("deep", True), ("input", False)):
        words = ("calibrate", "--llm", toy_folder, "--codec", codec, "--seconds", 0.2, "--json")
        found = json.loads(run(*words).stdout)
        assert (found["upper"] is not None) == halves and found["whole"]["linear"] >= 0
    assert "exclude each other" in refused("calibrate", "--llm", toy_folder, "--storage", "s")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--position-budget", 3), "position_budget of at least"),
        (("--prefill-budget", 0.25), "it is no share"),
        (("--read-policy", "clever"), "unknown read policy: got clever, expected fixed, budgeted"),
        (("--read-policy", "budgeted"), "nothing to spend"),
        (("--relevance", "maxsim"), "nothing to spend"),
        (("--relevance-cutoff", 0.5), "nothing to spend"),
        (("--relevance", "colbert"), "unknown relevance: got colbert, expected bm25, maxsim, bm25+maxsim"),
        (("--relevance", "maxsim", "--read-policy", "fixed"), "relevance belongs to the budgeted read policy"),
        (("--missing", "guess"), "expected recompress, text, error, auto"),
        (("--rate", 2, "--mode", "text"), "text has no compression rate"),
        (("--rate", 0.1), "at least 1"),
        (("--rate", 999), "out of reach"),
    ],
)
def test_what_makes_no_sense_is_one_line(storage: Path, options: tuple[object, ...], said: str) -> None:
    assert said in refused("query", QUESTION, "--storage", storage, *options)
