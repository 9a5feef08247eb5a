"""The demo, on toy models and a toy corpus; and the sample corpus that ships."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import toy
from compllm_rag.cli import demo
from compllm_rag.errors import ConfigurationError
from toy_embedder import save_sentence_transformer


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with layers enough to be narrowed."""
    return toy.save(tmp_path_factory.mktemp("toy-of-four"), layers=4)


def test_demo_shows_and_writes_everything(tmp_path: Path, deeper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        llm=str(deeper),
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
        narrowed = question["answers_by_mode"]["narrowed"]
        assert narrowed["narrowing"] and narrowed["prompt_positions"] == concepts["prompt_positions"]
        assert narrowed["prefill_cost"] < concepts["prefill_cost"] < text["prefill_cost"]
    summary = found["summary"]
    assert 0 < summary["concepts_over_text"]["prompt_positions"] < 1
    assert 0 < summary["narrowed_over_text"]["kv_bytes"] < summary["concepts_over_text"]["kv_bytes"] < 1
    shown = screen.file.getvalue()
    assert "narrowed" in shown and "share of text's" in shown
    for word in ("Ingested once", "achieved rate", "Who built the lighthouse?", "gold", "Means over 2 questions", "F1"):
        assert word in shown


@pytest.mark.parametrize(("layers", "narrow", "codec"), [(4, "none", None), (4, None, "input"), (2, None, None)])
def test_only_two_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int, narrow: str | None, codec: str | None
) -> None:
    """Where narrowing is not wanted, or nobody asked for it and these concepts cannot be narrowed."""
    llm = toy.save(tmp_path / "llm", layers=layers)
    shown = run_small(tmp_path, llm, monkeypatch, narrow=narrow, codec=codec)
    assert [set(row["answers_by_mode"]) for row in shown["questions"]] == [{"text", "concepts"}]
    assert "narrowed_over_text" not in shown["summary"]


@pytest.mark.parametrize(
    ("narrow", "codec", "said"), [("auto", "input", "deep concepts"), ("1:0.5", None, "at this layer")]
)
def test_narrowing_that_cannot_be_is_refused(
    tmp_path: Path, deeper: Path, monkeypatch: pytest.MonkeyPatch, narrow: str, codec: str | None, said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        run_small(tmp_path, deeper, monkeypatch, narrow=narrow, codec=codec)
    with pytest.raises(ConfigurationError):
        run_small(tmp_path / "again", deeper, monkeypatch, narrow="wide", codec=codec)


def run_small(tmp_path: Path, llm: Path, monkeypatch: pytest.MonkeyPatch, **options) -> dict:
    """One question over one toy article."""
    (tmp_path / "sample" / "articles").mkdir(parents=True, exist_ok=True)
    (tmp_path / "sample" / "articles" / "rock.md").write_text(f"# Gull Rock\n\n{toy.TEXT}", encoding="utf-8")
    row = {"id": "1", "question": "Who built the lighthouse?", "answers": ["Ada Marsh"], "title": "Gull Rock"}
    (tmp_path / "sample" / "questions.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr(demo, "sample_corpus", lambda: tmp_path / "sample")
    embedder = save_sentence_transformer(tmp_path / "embedder", toy.TEXT)
    fixed = {"json_file": None, "top_k": 2, "limit": None, "storage": None, "offline": True, "rate": 2.0}
    screen = Console(file=io.StringIO(), width=120)
    return demo.run_demo(llm=str(llm), embedder=str(embedder), console=screen, **fixed, **options)


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
