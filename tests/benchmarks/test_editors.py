"""The simulation of many editors on a toy model: that nothing is lost is no matter of speed, so it is asserted."""

from __future__ import annotations

from pathlib import Path

import toy
from benchmarks.ingest.edits import synthetic
from benchmarks.live.editors import SharedText, schedule, tables
from loft_corpus import run
from toy_embedder import save_sentence_transformer


def test_the_seed_says_who_edits_what_and_when() -> None:
    edits = schedule(20, 3, 6, 5.0, seed=1)
    assert edits == schedule(20, 3, 6, 5.0, seed=1) != schedule(20, 3, 6, 5.0, seed=2)
    assert len(edits) == len({edit.text for edit in edits}) == 60
    assert [edit.at_s for edit in edits] == sorted(edit.at_s for edit in edits)
    assert {edit.kind for edit in edits} == {"replace", "insert", "delete"}
    text = SharedText.of(synthetic(5))
    assert str(text) == "Nobody has written here yet.\n\n" + synthetic(5)
    for edit in edits:
        text.apply(edit)
    hot = [edit.text for edit in edits if edit.paragraph == 0]
    assert text.paragraphs[0] == [hot[-1]]
    assert text.version == 60


def test_the_benchmark(tmp_path: Path, toy_folder: Path) -> None:
    embedder = save_sentence_transformer(tmp_path / "embedder", toy.TEXT)
    words = ["--llm", toy_folder, "--embedder", embedder, "--editors", 100, "--edits", 2, "--seconds", 0.5]
    record, _ = run("editors", tmp_path / "o.json", *words, "--paragraphs", 20, "--limit", 150)
    assert record["edits"] == record["edits_answered"] == 150
    assert record["uploads_not_whole"] == record["sentences_lost"] == 0
    assert record["sentences_retrieved"] == record["sentences"] > 100
    assert record["text_is_as_replayed"] and record["last_writer_wins"] and record["all_concepts_made"]
    assert 1 < record["uploads"] < 150 and record["edits_per_upload_most"] > 1
    assert 0 < record["chunks_embedded_per_edit"] < record["chunks_uploaded_per_edit"] <= record["chunks"]
    assert record["units_compressed_per_edit"] > 0
    assert 0 < record["answerable_s"]["median"] <= record["answerable_s"]["most"]
    assert "| sentences lost | 0 |" in tables(record)
