"""The benchmark of pins on a toy model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality.pins import VARIANTS, tables
from compllm_rag.errors import ConfigurationError
from loft_corpus import run


def test_it_runs_resumes_and_has_its_section(toy_folder: Path, tmp_path: Path) -> None:
    words = ["--llm", toy_folder, "--limit", 6, "--rates", 2]
    record, _ = run("pins", tmp_path / "o.json", *words)
    rows = record["sets"]["probes"]["rows"]
    assert [row["read"] for row in rows] == ["text", *VARIANTS, "random places", "nothing"]
    assert len({row["nll"] for row in rows}) > 4 and rows[0]["kinds"]
    _, told = run("pins", tmp_path / "o.json", *words)
    assert told.count("done before") == len(rows)
    page = "\n".join(tables(record))
    assert "| digits, dates, names |" in page and "### probes, 6 questions" in page
    with pytest.raises(ConfigurationError, match="nothing is dropped at rate 1"):
        run("pins", tmp_path / "p.json", "--llm", toy_folder, "--rates", 1)
