"""Several chunks: which passages stand beside those that answer, and the benchmark on a toy model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

import toy
from benchmarks.quality.chunks import among, asked, main, questions_of, tables
from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.questions import Question, SourcePassage
from loft_corpus import run


def _others(n: int) -> list[SourcePassage]:
    return [SourcePassage(f"T{i}", f"Text number {i}.") for i in range(n)]


def test_gold_passages_stand_among_others_in_an_order_that_stays() -> None:
    gold, own = SourcePassage("G", "Ada built it."), SourcePassage("D", "Tom slept.", supporting=False)
    question = Question("q", (gold, own), "Who?", ("Ada",))
    others = [*_others(9), SourcePassage("A", "It was ADA Marsh."), gold]
    four = among(question, others, 4)
    assert four is not None and four == among(question, others, 4)
    texts = [p.text for p in four.passages]
    assert len(set(texts)) == 4 and {gold.text, own.text} < set(texts), "its own distractors first"
    assert [p.supporting for p in four.passages].count(True) == 1
    eight = among(question, others, 8)
    assert eight is not None and not any("ADA" in p.text for p in eight.passages), "no stranger holds the answer"
    one = among(question, others, 1)
    assert one is not None and one.passages == (gold,)
    places = {among(Question(f"q{i}", (gold,), "Who?", ("Ada",)), others, 8).passages.index(gold) for i in range(40)}
    assert len(places) > 5, "the gold passage stands anywhere"
    assert among(Question("two", (gold, SourcePassage("H", "Hop.")), "Who?", ("Ada",)), others, 1) is None
    with pytest.raises(ConfigurationError, match="too few passages"):
        among(question, others[:3], 8)


def test_needles_are_among_needles_of_other_texts() -> None:
    found = asked("needle", None, [1, 4], 40)
    assert len(found[1]) == len(found[4]) == len(questions_of("needle", None)) == 40
    for question in found[4]:
        assert sum(question.answers[0].lower() in p.text.lower() for p in question.passages) == 1


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "eval").mkdir()
    single = [
        {
            "id": str(i),
            "context": f"{toy.TEXT[i * 50 : i * 50 + 120]} {i}",
            "question": f"What {i}?",
            "answers": [f"x{i}"],
        }
        for i in range(12)
    ]
    hops = [
        {
            "id": f"h{i}",
            "question": f"Which {i}?",
            "answers": [f"y{i}"],
            "documents": [
                {"title": f"D{i}.{j}", "text": f"{toy.TEXT[j * 30 : j * 30 + 60]} {i}.{j}", "is_supporting": j < 2}
                for j in range(3)
            ],
        }
        for i in range(6)
    ]
    for name, rows in (("squad_dev", single), ("hotpotqa_dev", hops)):
        with gzip.open(tmp_path / "eval" / f"{name}.jsonl.gz", "wt") as file:
            file.write("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def test_it_runs_resumes_and_has_its_section(data: Path, toy_folder: Path, tmp_path: Path, capsys) -> None:
    words = ["--llm", toy_folder, "--data-dir", data, "--limit", 2, "--rates", 2, "--batch-size", 4]
    record, _ = run("chunks", tmp_path / "o.json", *words, "--counts", 1, 4, "--kinds", "single", "two-hop")
    assert {kind: list(found["counts"]) for kind, found in record["kinds"].items()} == {
        "single": ["1", "4"],
        "two-hop": ["4"],
    }
    for found in record["kinds"].values():
        for results in found["counts"].values():
            assert [(r["mode"], r["rate"], r["n"]) for r in results] == [
                ("text", None, 2), ("concepts", 2.0, 2), ("none", None, 2),
            ]  # fmt: skip
            assert results[0]["positions"] > results[1]["positions"] > results[2]["positions"]
    _, told = run("chunks", tmp_path / "o.json", *words, "--counts", 1, 4, "--kinds", "single", "two-hop")
    assert told.count("done before") == 3
    page = "\n".join(tables(record))
    assert "### two passages answer (HotpotQA dev), 2 questions" in page and "| 4 | text |" in page
    with pytest.raises(SystemExit):
        main(["--kinds", "single"])
    assert "--data-dir is needed" in capsys.readouterr().err
