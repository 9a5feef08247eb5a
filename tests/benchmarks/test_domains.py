"""Kinds of text: passages and continuations, and the benchmark on toy texts."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

import toy
from benchmarks.quality import domains_page as page
from benchmarks.quality.domain_texts import DOMAINS, pieces, questions_of, texts_of
from compllm_rag.compression.compressor import Compressor
from compllm_rag.errors import ConfigurationError, DataFileError
from compllm_rag.training.material import Material
from loft_corpus import run

TEXT = " ".join(toy.TEXT.split())


@pytest.fixture(scope="module")
def compressor() -> Compressor:
    return Compressor(toy.llm())


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
    return path


def documentation(tmp_path: Path, compressor: Compressor) -> tuple[Path, list[str]]:
    """A file that is trained on, and the names of its texts that are held out."""
    path = write(tmp_path / DOMAINS["code"].file, [{"id": str(i), "text": f"{i} {TEXT}"} for i in range(120)])
    trained_on = set(Material([], [path], compressor.segmenter).texts)
    return path, [str(i) for i in range(120) if f"{i} {TEXT}" not in trained_on]


def test_a_passage_and_what_follows_it_join_to_the_text(tmp_path: Path, compressor: Compressor) -> None:
    path = write(tmp_path / "t.jsonl.gz", [{"id": "short", "context": "Too short."}, {"id": "a", "context": TEXT}])
    (piece,) = pieces(compressor, path, 1, context=60, length=10)
    assert piece.id == "a" and len(piece.rest) == 10
    ids = [token for segment in compressor.segmenter.split(piece.passage) for token in segment]
    assert 30 <= len(ids) <= 60
    assert compressor.llm.tokenizer.decode([*ids, *piece.rest]).strip()[:40] in TEXT
    assert pieces(compressor, path, 1, context=60, length=10) == [piece]


def test_texts_are_taken_once_before_any_is_taken_twice(tmp_path: Path, compressor: Compressor) -> None:
    path = write(tmp_path / "t.jsonl.gz", [{"id": str(i), "context": f"{i} {TEXT} " * 4} for i in range(3)])
    found = pieces(compressor, path, 5, context=40, length=8)
    assert len({piece.id for piece in found[:3]}) == 3 == len({piece.id for piece in found})
    assert len({piece.passage for piece in found}) == 5
    assert len(pieces(compressor, path, 10_000, context=40, length=8)) < 10_000


def test_texts_that_were_trained_on_are_not_taken(tmp_path: Path, compressor: Compressor) -> None:
    path, held_out = documentation(tmp_path, compressor)
    kept = [name for name, _ in texts_of(path, compressor)]
    assert 0 < len(kept) < 20 and kept == held_out
    for domain in DOMAINS.values():
        assert domain.held_out and domain.file.startswith("eval/") != ("one in 40" in domain.held_out)


def test_questions_are_of_passages_that_fit(tmp_path: Path, compressor: Compressor) -> None:
    qas = [{"id": str(i), "question": f"Who {i}?", "answers": ["Ada"]} for i in range(3)]
    rows = [{"id": str(n), "context": f"{n} {TEXT[: 60 * n]}", "qas": qas} for n in range(1, 9)]
    path = write(tmp_path / "q.jsonl.gz", rows)
    found = questions_of(path, 4, compressor, 100)
    assert 0 < len(found) <= 4 and len({q.passages[0].text for q in found}) == len(found)
    assert all(len(compressor.segmenter.tokenize(q.passages[0].text).ids) <= 100 for q in found)
    assert found == questions_of(path, 4, compressor, 100)


def test_it_runs_resumes_and_has_its_section(tmp_path: Path, toy_folder: Path, compressor: Compressor) -> None:
    qas = [{"id": "q", "question": "Who?", "answers": ["Ada"]}]
    write(tmp_path / DOMAINS["squad"].file, [{"context": f"{n} {TEXT[:400]}", "qas": qas} for n in range(3)])
    documentation(tmp_path, compressor)
    out = tmp_path / "domains.json"
    words = ["--llm", toy_folder, "--data-dir", tmp_path, "--context", 60, "--length", 8, "--codec", "input"]
    words += ["--rates", 2, "--limit", 2, "--domains", "squad"]
    assert "squad: 2 passages of 2 texts" in run("domains", out, *words)[1]
    record, again = run("domains", out, *words, "code")
    assert "squad: done before" in again and "code: 2 passages of 2 texts" in again
    squad, code = record["domains"]["squad"], record["domains"]["code"]
    assert squad["answers"]["n"] == 3 and code["answers"] is None
    assert "SQuAD train" in squad["in_training_mix"] and "holds out" in code["held_out"]
    for rows in (squad["rows"], squad["answers"]["rows"], code["rows"]):
        assert [row["mode"] for row in rows] == ["text", "concepts", "pruned", "none"]
        assert rows[0]["positions"] > rows[1]["positions"] == rows[2]["positions"] > rows[3]["positions"]
        # An untrained compressor is pruning to its anchors.
        assert abs(rows[1]["to_pruned"]["difference"]) < 1e-3 and rows[2]["to_pruned"] is None
        for row in rows:
            assert math.isclose(row["perplexity"], math.exp(row["nll"]))
            assert row["perplexity_interval"][0] <= row["perplexity"] <= row["perplexity_interval"][1]
    made = "\n".join(page.tables(record))
    assert "| text | – |" in made and "for the gold answers of questions" in made
    assert f"| {squad['answers']['rows'][3]['nll']:.2f} [" in made and "2 texts: copying and continuing" in made
    assert len(page.plot(record).axes) == 2
    with pytest.raises(ConfigurationError, match=r"domains.records.jsonl is of another run: got length 8"):
        run("domains", out, *words, "--length", 9)
    with pytest.raises(DataFileError, match="no text is long enough"):
        run("domains", tmp_path / "long.json", *words[:4], "--context", 900, "--length", 900, "--domains", "squad")
