"""Rates that follow the text: what a chooser's passages cost, and the benchmark on toy questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import toy
from benchmarks.rates import rates_page as page
from benchmarks.rates.bodies import ChosenBodies, priced
from benchmarks.rates.rates import claim
from compllm_rag.compression.loading import untrained_deep
from compllm_rag.compression.rate_policies.choosing import RateChooser
from compllm_rag.compression.rate_policies.guard import ExactGuard
from compllm_rag.compression.rate_policies.losses import InformationLosses
from compllm_rag.compression.rate_policies.measures import TextMeasures
from compllm_rag.compression.rate_policies.policies import PricedRate
from compllm_rag.compression.rates import FixedRate
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
        return claim(rows)

    assert told(2.6, 49.8)["holds"] and told(2.6, 50.5)["holds"]
    assert not told(2.4, 49.8)["holds"] and not told(2.6, 40.0)["holds"]
    assert told(2.6, 40.0)["f1_lost_percent"] == pytest.approx(20)


def test_it_runs_resumes_and_has_its_section(tmp_path: Path, toy_folder: Path) -> None:
    qas = [{"id": "q", "question": "Who?", "answers": ["Ada"]}]
    rows = [{"id": str(n), "context": f"{n} {TEXT[:300]}", "qas": [{**qas[0], "id": f"q{n}"}]} for n in range(3)]
    write(tmp_path / "eval/squad_dev.jsonl.gz", [*rows, {"id": "t", "context": TABLE, "qas": qas}])
    out = tmp_path / "rates.json"
    words = ["--llm", toy_folder, "--data-dir", tmp_path, "--sets", "squad_dev", "--rates", 1, 2, "--shares", 0.5]
    words += ["--max-new-tokens", 2, "--limit", 4]
    record, said = run("rates", out, *words)
    assert "squad_dev: 4 questions" in said
    made = record["sets"]["squad_dev"]["rows"]
    assert list(made) == [
        "text", "none", "fixed 1", "fixed 2", "information", "information, article's bands", "budget 0.5",
        "fixed 2 with guard",
    ]  # fmt: skip
    assert made["text"]["prefill_cost"] == 1.0 and made["none"]["prefill_cost"] is None
    assert made["fixed 1"]["prefill_cost"] == 0.5 > made["fixed 2"]["prefill_cost"] > 0.2
    assert made["budget 0.5"]["prefill_cost"] <= 0.25
    assert made["fixed 2 with guard"]["passages_as_text"] == 1
    assert made["fixed 2 with guard"]["prefill_cost"] > made["fixed 2"]["prefill_cost"]
    assert 1.5 <= made["information, article's bands"]["achieved_rate"] <= 4
    assert "fixed 2: done before" in run("rates", out, *words)[1]
    section = "\n".join(page.tables(record))
    assert "| fixed 2 | " in section and "no row `learned`" in section and "The claim" in section
    assert len(page.plot(record).axes) == 2
