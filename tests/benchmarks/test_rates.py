"""Rates that follow the text: what a chooser's passages cost, and the benchmark on toy questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import toy
from benchmarks.rates import kinds
from benchmarks.rates import rates_page as page
from benchmarks.rates.bodies import ChosenBodies, priced
from benchmarks.rates.rates import claim, main, probes_of
from compllm_rag.compression.loading import untrained_deep
from compllm_rag.compression.rate_policies.choosing import RateChooser
from compllm_rag.compression.rate_policies.guard import ExactGuard
from compllm_rag.compression.rate_policies.losses import InformationLosses, LossPredictor
from compllm_rag.compression.rate_policies.measures import FEATURES, TextMeasures
from compllm_rag.compression.rate_policies.policies import PricedRate
from compllm_rag.compression.rates import FixedRate
from compllm_rag.errors import DataFileError
from compllm_rag.evaluation.bodies import Segmented
from compllm_rag.prompt import ConceptSpan, TextSpan
from loft_corpus import run, write

TEXT = " ".join(toy.TEXT.split())
TABLE = " ".join(f"{i * 7919},{i * 104729}" for i in range(12))


def test_passages_cost_what_was_chosen_for_them() -> None:
    compressor = untrained_deep(toy.llm(layers=4))
    segmented, measures = Segmented(compressor), TextMeasures(lambda: compressor)
    bodies = ChosenBodies(compressor, RateChooser(FixedRate(2, 240), (), ExactGuard(measures)), segmented)
    bodies.prepare([TEXT, TABLE])
    [concepts], [text] = bodies.spans(TEXT, 3), bodies.spans(TABLE, 4)
    assert isinstance(concepts, ConceptSpan) and isinstance(text, TextSpan)
    assert (concepts.passage, text.passage, len(concepts)) == (3, 4, bodies.size(TEXT))
    assert bodies.cost(TEXT) == pytest.approx(bodies.size(TEXT) / 2)
    assert bodies.cost(TABLE) == bodies.size(TABLE) == segmented.n_tokens(TABLE)
    policy = PricedRate(InformationLosses(measures))
    assert priced(policy, segmented, [TEXT, TEXT], 0.5) > 0
    shared = ChosenBodies(compressor, RateChooser(policy), segmented)
    assert shared.size(TEXT) <= 0.5 * segmented.n_tokens(TEXT)


def test_the_claim_is_both_rate_and_loss() -> None:
    def told(rate: float, f1: float) -> dict[str, Any]:
        rows = {
            "text": {"f1": 50.0},
            "information, article's bands": {"achieved_rate": rate, "f1": f1, "recovered": 90},
        }
        return claim(rows) or {}

    assert told(2.6, 49.8)["holds"] and told(2.6, 50.5)["holds"]
    assert not told(2.4, 49.8)["holds"] and not told(2.6, 40.0)["holds"]
    assert told(2.6, 40.0)["f1_lost_percent"] == pytest.approx(20)
    assert claim({"text": {"f1": 50.0}}) is None


@pytest.fixture
def data(tmp_path: Path) -> Path:
    qas = [{"id": "q", "question": "Who?", "answers": ["Ada"]}]
    rows = [{"id": str(n), "context": f"{n} {TEXT[:300]}", "qas": [{**qas[0], "id": f"q{n}"}]} for n in range(3)]
    write(tmp_path / "eval/squad_dev.jsonl.gz", [*rows, {"id": "t", "context": TABLE, "qas": qas}])
    return tmp_path


def test_it_runs_resumes_and_has_its_section(data: Path, toy_folder: Path) -> None:
    out = data / "rates.json"
    words = ["--llm", toy_folder, "--data-dir", data, "--sets", "squad_dev", "--rates", 1, 2, "--shares", 0.5]
    words += ["--max-new-tokens", 2, "--limit", 4, "--probes", "code", "--probe-limit", 3, "--chunk-limit", 5]
    record, said = run("rates", out, *words)
    assert "squad_dev: 4 questions" in said and "probes, code: 3 questions" in said
    made = record["sets"]["squad_dev"]["rows"]
    assert list(made) == [
        "text", "none", "fixed 1", "fixed 2", "information", "information, article's bands", "budget 0.5",
        "fixed 2 with guard", "BM25 sentences, as fixed 2", "random 2", "BM25 sentences, as fixed 4", "random 4",
    ]  # fmt: skip
    assert (made["text"]["prefill_cost"], made["text"]["passage_positions"]) == (1.0, 1.0)
    assert made["none"]["prefill_cost"] is made["none"]["passage_positions"] is None
    assert made["fixed 1"]["prefill_cost"] == 0.5 > made["fixed 2"]["prefill_cost"] > 0.2
    assert made["budget 0.5"]["prefill_cost"] <= 0.25
    assert made["fixed 2 with guard"]["passages_as_text"] == 1
    assert made["fixed 2 with guard"]["prefill_cost"] > made["fixed 2"]["prefill_cost"]
    assert 1.5 <= made["information, article's bands"]["achieved_rate"] <= 4
    for name in ("fixed 1", "fixed 2", "information", "budget 0.5", "random 2", "random 4"):
        row = made[name]
        assert row["passage_positions"] == pytest.approx(2 * row["prefill_cost"]) == 1 / row["achieved_rate"], name
    assert made["random 2"]["prefill_cost"] == made["fixed 2"]["prefill_cost"] > made["random 4"]["prefill_cost"]
    for rate in (2, 4):
        words_read = made[f"BM25 sentences, as fixed {rate}"]
        assert words_read["passage_positions"] == words_read["prefill_cost"] <= made[f"random {rate}"]["prefill_cost"]
    assert [(each["row"], each["rival"]) for each in record["sets"]["squad_dev"]["over_rivals"]] == [
        ("fixed 2", "random 2"), ("fixed 2", "BM25 sentences, as fixed 2"),
    ]  # fmt: skip
    again, log = run("rates", out, *words)
    assert again == record and log.count("done before") == 2 * len(made)
    section = "\n".join(page.tables(record))
    assert "| fixed 2 | random 2 | " in section and "No row `learned`" in section and "The claim" in section
    assert "| rates | code, n = 3 |" in section and "| probes: code | 5 | " in section and "(rates.png)" in section
    assert len(page.plot(record).axes) == 3


def test_a_journal_of_rows_with_less_in_them_is_gone_on_with(data: Path, toy_folder: Path) -> None:
    """Costs and positions come from the records of questions, so that rows are found that were kept without them."""
    out = data / "rates.json"
    words = ["--llm", toy_folder, "--data-dir", data, "--sets", "squad_dev", "--rates", 2, "--max-new-tokens", 2]
    words += ["--probes", "--chunk-limit", 0]
    record, _ = run("rates", out, *words, "--rows", "fixed")
    assert list(record["sets"]["squad_dev"]["rows"]) == ["text", "none", "fixed 2"]
    assert record["probes"] == {} and record["kinds"] is record["sets"]["squad_dev"]["claim"] is None
    section = "\n".join(page.tables(record))
    assert not [word for word in ("The claim", "By kind", "rival |") if word in section]
    journal = out.with_suffix(".records.jsonl")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines[1:]:
        line["result"] |= {"cost": 0.1, "passages_as_text": 0}  # as it was kept once, and a cost that is not true
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more, log = run("rates", out, *words, "--rows", "fixed", "random")
    assert log.count("done before") == 3
    rows = more["sets"]["squad_dev"]["rows"]
    assert {name: rows[name] for name in rows if "random" not in name} == record["sets"]["squad_dev"]["rows"]


def test_rows_that_there_cannot_be_are_refused_by_name(
    data: Path, toy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--llm", toy_folder, "--data-dir", data, "--sets", "squad_dev", "--limit", 2, "--max-new-tokens", 2]
    words += ["--probes", "--chunk-limit", 0, "--rates", 2, "--shares", 0.5]
    refused = {
        "--rows learned: the compressor has no learned losses": ["--rows", "fixed", "learned"],
        "--probe-limit: at least 1": ["--probe-limit", 0],
        "--rows random: only deep concepts": ["--rows", "random", "--codec", "input"],
    }
    for said, further in refused.items():
        with pytest.raises(SystemExit):
            main(list(map(str, [*words, *further])))
        assert said in capsys.readouterr().err
    record, _ = run("rates", data / "input.json", *words, "--codec", "input")
    made = record["sets"]["squad_dev"]["rows"]
    assert "BM25 sentences, as fixed 4" in made and not [label for label in made if label.startswith("random")]
    assert "No row `random`" in "\n".join(page.tables(record))
    with pytest.raises(DataFileError, match="no such set"):
        run("rates", data / "no.json", *words, "--sets", "nowhere")


def test_kinds_of_text_and_what_is_chosen_for_them(data: Path) -> None:
    write(data / "text/novels.jsonl.gz", [{"id": "n", "text": toy.TEXT * 3}, {"id": "empty", "text": " "}])
    compressor = untrained_deep(toy.llm(layers=4))
    found = kinds.measured(compressor, data, ["code"], 5)
    assert found["loss"] == "share of information"
    made = found["kinds"]
    assert list(made) == [
        "novels", "source code (this package)", "logs, made by rule", "tables, made by rule", "probes: code",
    ]  # fmt: skip
    assert {each["n"] for each in made.values()} == {5}
    assert made["novels"]["left_as_text"] == 0 and made["tables, made by rule"]["left_as_text"] == 1
    assert made["logs, made by rule"]["left_as_text"] == 1
    for each in made.values():
        ours, theirs = each["policies"]["information"], each["policies"]["information, article's bands"]
        # Somewhat below the lowest band: the number of concepts is rounded up.
        assert 1 <= ours["achieved_rate"] <= 4 and 1.4 <= theirs["achieved_rate"] <= 4
        assert 0 <= ours["predicted_loss"] < 1 and ours["left_as_text"] is None
        assert (ours["achieved_rate"] < theirs["achieved_rate"]) <= (ours["predicted_loss"] < theirs["predicted_loss"])


def test_learned_losses_have_a_policy_and_a_guard_by_kind(data: Path) -> None:
    compressor = untrained_deep(toy.llm(layers=4))
    flat = (0.0,) * len(FEATURES)
    compressor.losses = LossPredictor(
        mean=flat,
        scale=(1.0,) * len(FEATURES),
        rates=(1.0, 2.0, 4.0),
        weights=(flat,) * 3,
        offsets=(0.0, 0.1, 0.9),
        units=1,
    )
    found = kinds.measured(compressor, data, [], 4)
    assert found["loss"] == "nats per token"
    for each in found["kinds"].values():
        row = each["policies"]["learned 0.1"]
        assert row["achieved_rate"] == pytest.approx(2, abs=0.1) and row["left_as_text"] == 0
        assert row["predicted_loss"] == pytest.approx(0.1, abs=0.01)
    lines = page.tables({"kinds": found, "sets": {}, "probes": {}, "unavailable": {}, **told()})
    assert any(line.startswith("| tables, made by rule | 4 | 100 | ") and "0 % left" in line for line in lines)
    assert not [line for line in lines if "rates.png" in line]


def told() -> dict[str, Any]:
    """Of a record what says where it was measured."""
    where = {"gpu": None, "cpu": "c", "torch_threads": 1, "cores": 1, "commit": "0" * 40, "versions": {"torch": "2"}}
    return {"llm": "toy", "dtype": "float32", "limit": 1, "command": "compllm-rag bench rates", "environment": where}


def test_probes_are_those_of_their_kind() -> None:
    asked = probes_of("numbers")
    assert len(asked) == 36 and {question.id.split("-")[0] for question in asked} == {"numbers"}


def test_what_is_made_by_rule_is_always_the_same() -> None:
    assert kinds.log(1) == kinds.log(1) != kinds.log(2)
    assert kinds.number_table(1) == kinds.number_table(1) != kinds.number_table(2)
