"""The probes that ship, and their scores kind by kind."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from compllm_rag.compression.compressor import Compressor
from compllm_rag.evaluation.probes import probe_file, run_probes
from compllm_rag.evaluation.questions import read_questions, read_rows
from compllm_rag.evaluation.results import EvalConfig

SCORES = {"n", "em", "f1", "subspan_em", "accuracy", "nll"}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [row for _, row in read_rows(probe_file())]


def test_the_script_makes_what_ships(rows: list[dict]) -> None:
    path = Path(__file__).parents[2] / "pipelines" / "build_probes.py"
    spec = importlib.util.spec_from_file_location("build_probes", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.build() == rows


def test_the_probes_are_sound(rows: list[dict]) -> None:
    counts = Counter(row["kind"] for row in rows)
    assert counts == {k: 36 for k in ("numbers", "dates", "names", "code", "negation", "order")} | {"needle": 40}
    found = read_questions(probe_file())
    assert len(found.questions) == len({q.id for q in found.questions}) == len(rows)
    assert found.skipped == []
    for row in rows:
        if "options" in row:
            assert row["options"][row["answer_index"]] == row["answers"][0]
        else:
            # Said once, so that the answer is a matter of one place.
            assert row["context"].count(row["answers"][0]) == 1
    yes, no = (sum(row["answers"] == [answer] for row in rows) for answer in ("yes", "no"))
    assert yes == no > 0


def test_needles_lie_where_they_should(rows: list[dict]) -> None:
    needles = [row for row in rows if row["kind"] == "needle"]
    assert Counter(row["depth"] for row in needles) == {depth: 8 for depth in (0, 25, 50, 75, 100)}
    for row in needles:
        at = row["context"].index(row["answers"][0]) / len(row["context"])
        assert at == pytest.approx(row["depth"] / 100, abs=0.08)


def test_scores_by_kind_and_depth(compressor: Compressor) -> None:
    found = run_probes(compressor, mode="pruned", rate=4, config=EvalConfig(limit=24, max_new_tokens=2))
    shown = found.to_dict()
    assert (shown["mode"], shown["rate"], shown["n"]) == ("pruned", 4, 24)
    for scores in (shown, shown["text"]):
        assert sum(kind["n"] for kind in scores["kinds"].values()) == 24
        assert all(set(kind) == SCORES for kind in scores["kinds"].values())
        assert sum(depth["n"] for depth in scores["depths"].values()) == scores["kinds"]["needle"]["n"]
    assert shown["kinds"]["negation"]["accuracy"] is not None
    assert shown["kinds"]["numbers"]["accuracy"] is None
    mine = [r for r in found.result.records if r.id.startswith("names-")]
    assert shown["kinds"]["names"]["n"] == len(mine) > 0
    expected = sum(r.nll * r.n_tokens for r in mine) / sum(r.n_tokens for r in mine)
    assert shown["kinds"]["names"]["nll"] == pytest.approx(expected, abs=1e-4)
