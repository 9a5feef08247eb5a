"""Narrowing: held-out rows among distractors, each rate whole and narrowed, a line for each way."""

from __future__ import annotations

from pathlib import Path

import pytest

import toy
from benchmarks.quality import quality, quality_page
from benchmarks.quality.narrowing import crowded_questions, plot, tables
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.config import CompressorConfig, Narrowing
from compllm_rag.errors import ConfigurationError
from compllm_rag.training.material import is_held_out
from loft_corpus import run
from training_samples import write_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.save(tmp_path_factory.mktemp("llm"), layers=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("data"), rows=120)


def test_only_held_out_rows_are_asked_among_distractors(world: Path) -> None:
    segmenter = Segmenter(toy.tokenizer(), 20)
    found = crowded_questions(world, segmenter, 50, 10_000)
    assert found == crowded_questions(world, segmenter, 50, 10_000)
    assert any(len(question.passages) > 1 for question in found)
    for question in found:
        assert any(is_held_out(p.title or p.text) for p in question.passages)
        assert len(set(question.passages)) == len(question.passages) <= 6
    short = crowded_questions(world, segmenter, 50, 200)
    assert all(sum(len(segmenter.tokenize(p.text).ids) for p in q.passages) <= 200 for q in short)
    with pytest.raises(ConfigurationError, match="no held-out row"):
        crowded_questions(world, segmenter, 50, 1)


def test_it_runs_resumes_and_has_its_plot(world: Path, folder: Path, tmp_path: Path) -> None:
    words = [
        "--llm", folder, "--reader", "none", "--compressor", "none", "--data-dir", world, "--limit", 2,
        "--rates", 1, 2, "--narrow", "3:0.5", "3:0.1",
    ]  # fmt: skip
    record, _ = run("narrowing", tmp_path / "o.json", *words)
    rows = {(row["rate"], row["narrowing"]): row for row in record["rows"]}
    assert len(rows) == 6 and len({row["nll"] for row in rows.values()}) > 3
    assert rows[1.0, None]["prefill_cost"] == pytest.approx(0.5)
    assert rows[1.0, "3:0.5"]["prefill_cost"] == pytest.approx(0.375)
    assert rows[2.0, "3:0.1"]["prefill_cost"] == pytest.approx(0.275 / 2, abs=0.01)
    _, told = run("narrowing", tmp_path / "o.json", *words)
    assert told.count("done before") == 2 + 6
    for row in record["rows"]:  # random weights gain nothing from text: give them something to draw
        row["recovered"], row["interval"] = 50.0, [40.0, 60.0]
    page = "\n".join(tables(record))
    assert "| 1.00 | 3:0.5 | 0.38 |" in page and "| 1.00 | – | 0.50 |" in page and "(narrowing.png)" in page
    assert [t.get_text() for t in plot(record).axes[0].get_legend().get_texts()] == [
        "all concepts", "narrowed 3:0.5", "narrowed 3:0.1",
    ]  # fmt: skip


def test_quality_narrows_beside_the_whole(folder: Path, tmp_path: Path) -> None:
    words = [
        "--llm",
        folder,
        "--reader",
        "none",
        "--compressor",
        "none",
        "--rates",
        1,
        "--sets",
        "probes",
        "--limit",
        2,
    ]
    made, _ = run("quality", tmp_path / "q.json", *words, "--rivals", "--narrow", "3:0.5", "--out", tmp_path / "q")
    results = made["probes"]["results"]
    assert [(r["mode"], r["narrowing"]) for r in results] == [
        ("text", None), ("concepts", None), ("concepts", "3:0.5"), ("none", None),
    ]  # fmt: skip
    assert [r["prefill_cost"] for r in results] == [1.0, 0.5, 0.375, None]
    page = "\n".join(quality_page.tables(made))
    assert "concepts, narrowed 3:0.5" in page


def test_quality_narrows_at_some_of_the_rates(capsys: pytest.CaptureFixture[str]) -> None:
    config, way = CompressorConfig(entry_layer=2), Narrowing.parse("3:0.5")
    made = quality.settings(config, [1.0, 2.0], [], [way], [1.0])
    assert [(s.mode, s.rate) for s in made if s.narrowing] == [("concepts", 1.0)]
    assert [s.rate for s in quality.settings(config, [1.0, 2.0], [], [way]) if s.narrowing] == [1.0, 2.0]
    for wrong in (["--narrow-rates", "1"], ["--narrow", "3:0.5", "--narrow-rates", "3"]):
        with pytest.raises(SystemExit):
            quality.main(["--rates", "1", "2", *wrong])
        assert "--narrow-rates must be some of --rates" in capsys.readouterr().err


def test_the_plot_of_quality_has_a_line_for_each_way() -> None:
    def row(mode: str, cost: float, way: str | None = None) -> dict:
        shares = {"recovered": 90.0, "intervals": {"recovered": [85.0, 95.0]}}
        return {"mode": mode, "prefill_cost": cost, "narrowing": way, **shares}

    record = {
        "title": "SQuAD", "compressor": {"entry_layer": 2}, "results": [
            row("concepts", 0.5), row("concepts", 0.3, "3:0.1"), row("concepts", 0.2, "3:0"), row("pruned", 0.5),
        ],
    }  # fmt: skip
    [panel] = quality_page.plot({"squad": record}).axes
    assert [t.get_text() for t in panel.get_legend().get_texts()] == [
        "concepts", "concepts, narrowed 3:0.1", "concepts, narrowed 3:0", "pruned",
    ]  # fmt: skip
