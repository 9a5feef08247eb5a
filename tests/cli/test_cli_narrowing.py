"""`--narrow` of `query`, `chat` and `eval`, as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import toy
from compllm_rag.cli.main import app
from compllm_rag.config import Narrowing
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.prompt import PromptPlan
from tests.cli.test_cli import QUESTION, refused, run
from toy_embedder import save_sentence_transformer

SHORT = ("--max-new-tokens", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy LLM of four layers, entry layer 2, and a storage."""
    made = tmp_path_factory.mktemp("made")
    docs, embedder = made / "docs", save_sentence_transformer(made / "embedder", toy.TEXT)
    docs.mkdir()
    for number, part in enumerate(toy.TEXT.split("\n\n")):
        (docs / f"{number}.md").write_text(f"# Part {number}\n\n{part}", encoding="utf-8")
    llm = toy.save(made / "llm", layers=4)
    run("ingest", docs, "--storage", made / "storage", "--llm", llm, "--embedder", embedder)
    return made


def asked(folder: Path, *options: object) -> dict:
    return json.loads(run("query", QUESTION, "--storage", folder / "storage", "--json", *SHORT, *options).stdout)


def test_a_narrowed_prompt_costs_less_and_says_so(folder: Path) -> None:
    whole, tenth, half = asked(folder), asked(folder, "--narrow", "auto"), asked(folder, "--narrow", "3:0.5")
    assert whole["narrowing"] is None
    concepts = sum(source["n_concepts"] for source in whole["sources"])
    assert tenth["narrowing"] == {"layer": 3, "share": 0.1, "by": "attention", "concepts": round(0.1 * concepts)}
    assert half["narrowing"] == {"layer": 3, "share": 0.5, "by": "attention", "concepts": round(0.5 * concepts)}
    assert whole["prompt_positions"] == tenth["prompt_positions"]
    assert tenth["prefill_cost"] < half["prefill_cost"] < whole["prefill_cost"]
    assert tenth["kv_bytes"] < half["kv_bytes"] < whole["kv_bytes"]
    told = run("query", QUESTION, "--storage", folder / "storage", "--explain", "--narrow", "3:0.5", *SHORT).stdout
    assert f"from layer 3 on {round(0.5 * concepts)} of the concepts are read" in " ".join(told.split())
    budget = asked(folder, "--narrow", "auto", "--position-budget", 60)
    concepts = sum(source["n_concepts"] for source in budget["sources"])
    assert budget["narrowing"]["concepts"] == min(concepts, max(1, round(0.1 * concepts)))
    assert budget["read_policy"]["taken"]["position_budget"] <= 60


def test_a_prefill_budget_reckons_with_it(folder: Path) -> None:
    """What a narrowed prompt takes less buys more of the passages."""
    whole = asked(folder, "--prefill-budget", 90)
    narrowed = asked(folder, "--prefill-budget", 90, "--narrow", "3:0.1")
    read = [sum(source["n_concepts"] for source in one["sources"]) for one in (whole, narrowed)]
    assert read[0] < read[1]
    assert all(one["read_policy"]["taken"]["prefill_budget"] <= 90 for one in (whole, narrowed))


def test_all_of_the_concepts_change_no_answer(folder: Path) -> None:
    whole, all_of_them = asked(folder), asked(folder, "--narrow", "3:1")
    assert all_of_them["answer"] == whole["answer"]
    assert all_of_them["prefill_cost"] == whole["prefill_cost"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--narrow", "half"), "narrowing is not understood"),
        (("--narrow", "3:-1"), "greater than or equal to 0"),
        (("--narrow", "2"), "cannot be narrowed at this layer"),
        (("--narrow", "4"), "cannot be narrowed at this layer"),
        (("--narrow", "auto", "--mode", "text"), "mode text"),
        (("--narrow", "auto", "--ttft-budget", "60"), "ttft_budget_s"),
    ],
)
def test_what_cannot_be_narrowed_is_refused(folder: Path, options: tuple[str, ...], said: str) -> None:
    assert said in refused("query", QUESTION, "--storage", folder / "storage", *options)


def test_chat_narrows_each_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[PromptPlan] = []
    stream = LocalGenerator.stream
    monkeypatch.setattr(
        LocalGenerator, "stream", lambda self, plan, *a: (plans.append(plan), stream(self, plan, *a))[1]
    )
    words = ["chat", "--storage", str(folder / "storage"), "--narrow", "3:0.25", "--max-new-tokens", "4"]
    made = CliRunner().invoke(app, words, input=f"{QUESTION}\nAnd when?\n")
    assert made.exit_code == 0, made.output
    assert [plan.narrowing for plan in plans if plan.deep] == [Narrowing(layer=3, share=0.25)] * 2
    words[4] = "9"
    made = CliRunner().invoke(app, words, input="Who?\n")
    assert made.exit_code == 2 and "cannot be narrowed at this layer" in made.stderr


def test_eval_tells_what_narrowed_concepts_cost(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"context": part, "question": "Who?", "answers": ["Ada Marsh"]} for part in toy.TEXT.split("\n\n")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = (
        "--data",
        data,
        "--llm",
        folder / "llm",
        "--reader",
        "none",
        "--compressor",
        "none",
        "--rate",
        1,
        "--json",
    )
    whole = json.loads(run("eval", *common).stdout)
    half = json.loads(run("eval", *common, "--narrow", "3:0.5").stdout)
    assert (whole["narrowing"], half["narrowing"]) == (None, "3:0.5")
    assert (whole["prefill_cost"], half["prefill_cost"]) == (0.5, 0.375)
    assert half["nll"] != whole["nll"]
    assert "nothing that can be narrowed" in refused("eval", *common, "--mode", "pruned", "--narrow", "3:0.5")
