"""The benchmark of queries at the same time, on a toy model; no speed is asserted."""

from __future__ import annotations

from pathlib import Path

import benchmarks
import loft_corpus
import toy


def test_queries_at_the_same_time(tmp_path: Path, toy_folder: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "0.md").write_text(toy.TEXT * 3, encoding="utf-8")
    options = ["--llm", toy_folder, "--texts", tmp_path / "texts", "--repeats", 1, "--top-k", 1, "--tokens", 5]
    record, told = loft_corpus.run("batching", tmp_path / "o.json", *options, "--concurrent", 1, 3, "--sequential", 2)
    assert "3 together as concepts" in told and "2 one by one as text" in told
    text, concepts = record["modes"]["text"], record["modes"]["concepts"]
    assert text["prompt_positions"] == concepts["prompt_positions"]  # at rate 1
    for found in (text, concepts):
        assert found["sequential"]["queries"] == 2 and set(found["concurrent"]) == {"1", "3"}
        for row in found["concurrent"].values():
            assert row["seconds"] > 0 and row["of_sequential"] > 0
        assert found["concurrent"]["1"]["rows_per_step"] == 1 <= found["concurrent"]["3"]["rows_per_step"] <= 3
    lines = benchmarks.page("batching").tables(record)
    assert lines[0] == "## Queries at the same time" and len([line for line in lines if line.startswith("| ")]) == 7
