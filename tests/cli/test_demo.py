"""The demo, on toy models and a toy corpus; and the sample corpus that ships."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import toy
from compllm_rag.cli import demo
from toy_embedder import save_sentence_transformer


def test_demo_shows_and_writes_everything(tmp_path: Path, toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sample" / "articles").mkdir(parents=True)
    (tmp_path / "sample" / "articles" / "rock.md").write_text(f"# Gull Rock\n\n{toy.TEXT}", encoding="utf-8")
    rows = [
        {"id": "1", "question": "Who built the lighthouse?", "answers": ["Ada Marsh"], "title": "Gull Rock"},
        {"id": "2", "question": "When did Marsh die?", "answers": ["1871"], "title": "Gull Rock"},
    ]
    (tmp_path / "sample" / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(demo, "sample_corpus", lambda: tmp_path / "sample")
    embedder = save_sentence_transformer(tmp_path / "embedder", toy.TEXT)
    screen = Console(file=io.StringIO(), width=120)
    demo.run_demo(
        json_file=tmp_path / "out.json",
        rate=2.0,
        codec=None,
        top_k=2,
        limit=None,
        llm=str(toy_folder),
        embedder=str(embedder),
        storage=None,
        offline=True,
        console=screen,
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["ingest"]["segments_compressed"] > 0
    assert found["second_ingest"]["segments_compressed"] == 0
    assert found["second_ingest"]["segments_reused"] == found["ingest"]["segments"]
    assert [q["id"] for q in found["questions"]] == ["1", "2"]
    for question in found["questions"]:
        text, concepts = question["answers_by_mode"]["text"], question["answers_by_mode"]["concepts"]
        assert [s["node_id"] for s in text["sources"]] == [s["node_id"] for s in concepts["sources"]]
        assert concepts["prompt_positions"] < text["prompt_positions"]
        assert concepts["store"]["misses"] == 0
    assert 0 < found["summary"]["concepts_over_text"]["prompt_positions"] < 1
    shown = screen.file.getvalue()
    for word in ("Ingested once", "achieved rate", "Who built the lighthouse?", "gold", "Means over 2 questions", "F1"):
        assert word in shown


def test_the_sample_corpus() -> None:
    articles = sorted((demo.sample_corpus() / "articles").glob("*.md"))
    assert len(articles) >= 12
    assert sum(path.stat().st_size for path in demo.sample_corpus().rglob("*") if path.is_file()) <= 150_000
    text = {path.read_text(encoding="utf-8").splitlines()[0][2:]: path.read_text(encoding="utf-8") for path in articles}
    questions = demo.sample_questions()
    assert len(questions) == 20
    for row in questions:
        assert all(answer in text[row["title"]] for answer in row["answers"])
    credits = (demo.sample_corpus() / "ATTRIBUTION.md").read_text()
    assert "CC BY-SA 4.0" in credits
    assert all(title in credits for title in text)
