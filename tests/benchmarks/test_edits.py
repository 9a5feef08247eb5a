"""The benchmark of edits on a toy model, and what it measures: that is no matter of speed, so it is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

import toy
from benchmarks.ingest.edits import KINDS, REVISIONS, edited, plot, revisions, sentences, synthetic, tables
from loft_corpus import run
from toy_embedder import save_sentence_transformer


@pytest.mark.parametrize("text", [toy.TEXT, synthetic(4), revisions(REVISIONS)[0][1]])
def test_edits_are_of_one_sentence(text: str) -> None:
    parts = sentences(text)
    assert "".join(parts) == text
    for kind, change in zip(KINDS, (1, -1, 0), strict=True):
        for number in range(3):
            made = edited(text, kind, number, 3)
            assert made != text
            assert len(sentences(made)) - len(parts) == change
            assert len(set(parts) - set(sentences(made))) <= 1


def test_the_shipped_history() -> None:
    history = revisions(REVISIONS)
    assert [name for name, _ in history][:2] == ["0.5", "0.6"]
    assert len({text for _, text in history}) == len(history) == 17
    assert all("Quickstart" in text for _, text in history)
    assert REVISIONS.stat().st_size < 150_000


def test_the_benchmark(tmp_path: Path, toy_folder: Path) -> None:
    folder, out = tmp_path / "texts", tmp_path / "o.json"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.md").write_text(synthetic(6, seed=number) + toy.TEXT, encoding="utf-8")
    embedder = save_sentence_transformer(tmp_path / "embedder", toy.TEXT)
    words = ["--llm", toy_folder, "--embedder", embedder, "--texts", folder, "--repeats", "2"]
    record, _ = run("edits", out, *words, "--synthetic", "12", "--revisions", "3")
    assert len(record["texts"]) == 5
    for row in record["texts"].values():
        assert [edit["kind"] for edit in row["edits"]] == [kind for kind in KINDS for _ in range(2)]
        assert row["within"]["segments"] and row["within"]["chunks"], row
        assert row["most_segments"] > 0
    first, *later = record["revisions"]
    assert first["segments_compressed"] > 0
    assert [row["revision"] for row in later] == ["0.6", "0.10.1"]
    for row in later:
        assert 0 < row["share_reused"] <= 1
        assert row["segments_compressed"] < row["segments"]
    assert len(plot(record).axes[0].patches) == 2
    assert f"| synthetic | {record['texts']['synthetic']['source_tokens']:,} |" in "\n".join(tables(record))
