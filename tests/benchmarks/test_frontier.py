"""The frontier: held-out rows alone, untrained and trained, a line for each entry layer."""

from __future__ import annotations

from pathlib import Path

import pytest

import toy
from benchmarks.quality.frontier import held_out_questions, plot, tables
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.loading import untrained_deep
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.errors import ConfigurationError
from compllm_rag.models.llm import TargetLLM
from compllm_rag.training.material import is_held_out
from loft_corpus import run
from training_samples import write_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.save(tmp_path_factory.mktemp("llm"), layers=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("data"), rows=120)


def test_only_held_out_rows_are_asked(world: Path) -> None:
    segmenter = Segmenter(toy.tokenizer(), 20)
    found = held_out_questions(world, segmenter, 50, 10_000)
    assert found == held_out_questions(world, segmenter, 50, 10_000)
    assert all(is_held_out(q.passages[0].title or q.passages[0].text) for q in found)
    with pytest.raises(ConfigurationError, match="no held-out row"):
        held_out_questions(world, segmenter, 50, 1)


def test_it_runs_resumes_and_has_its_plot(world: Path, folder: Path, tmp_path: Path) -> None:
    llm = TargetLLM.from_pretrained(folder)
    trained = untrained_deep(llm, 2, selector="random").save_pretrained(tmp_path / "trained")
    words = ["--llm", folder, "--data-dir", world, "--limit", 2, "--layers", 1, 3, "--rates", 1, 2]
    record, _ = run("frontier", tmp_path / "o.json", *words, "--trained", trained)
    rows = {(row["kind"], row["entry_layer"], row["rate"]): row for row in record["rows"]}
    assert len(rows) == 6 and rows["trained", 2, 1.0]["prefill_cost"] == pytest.approx(0.5)
    assert rows["untrained", 1, 1.0]["prefill_cost"] == pytest.approx(0.75)
    assert rows["untrained", 3, 2.0]["prefill_cost"] == pytest.approx(0.125, abs=0.01)
    assert len({row["nll"] for row in rows.values()}) == 6
    _, told = run("frontier", tmp_path / "o.json", *words, "--trained", trained)
    assert told.count("done before") == 2 + 6
    for row in record["rows"]:  # random weights gain nothing from text: give them something to draw
        row["recovered"], row["interval"] = 50.0, [40.0, 60.0]
    page = "\n".join(tables(record))
    assert "| trained | 2 | 1.00 | 0.50 |" in page and "(frontier.png)" in page
    assert [t.get_text() for t in plot(record).axes[0].get_legend().get_texts()] == [
        "L = 1, untrained", "L = 3, untrained", "L = 2, trained",
    ]  # fmt: skip
    shallow = Compressor(llm).save_pretrained(tmp_path / "input")
    with pytest.raises(ConfigurationError, match="frontier is of deep concepts"):
        run("frontier", tmp_path / "p.json", *words, "--trained", shallow)
