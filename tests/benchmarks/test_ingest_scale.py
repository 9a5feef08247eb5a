"""Growing a storage: slices, linearity, and the benchmark on a toy model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import toy
import toy_embedder
from benchmarks.ingest_scale import documents, linearity, slices
from benchmarks.pages import ingest as page
from compllm_rag.segmentation import Segmenter

ROOT = Path(__file__).parents[2]


def folder_of_texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, step in enumerate((1, -1)):
        (folder / f"{number}.md").write_text(" ".join(toy.TEXT.split()[::step]), encoding="utf-8")
    return folder


def test_copies_of_a_text_share_no_long_run_of_words(tmp_path: Path) -> None:
    sources = documents(None, folder_of_texts(tmp_path))
    first, _, second = next(sources), next(sources), next(sources)
    a, b = first.text.split(), second.text.split()
    assert len(a) == len(b) and all(x != y for x, y in zip(a[3::7], b[3::7], strict=True))


def test_slices_take_each_document_once(tmp_path: Path) -> None:
    parts = slices(Segmenter(toy.llm().tokenizer, 20), documents(None, folder_of_texts(tmp_path)), 300, 3)
    names = [document.id_ for part in parts for document in part]
    assert len(parts) == 3 and len(set(names)) == len(names)


def test_growth_of_memory_leaves_out_the_index_and_the_warming_up() -> None:
    rows = [
        {"tokens": t, "rss_bytes": rss, "faiss_bytes": index, "tokens_per_s": 100, "fresh_tokens_per_s": fresh}
        for t, rss, index, fresh in ((10, 100, 5, 100), (20, 500, 10, None), (30, 520, 15, None), (40, 540, 20, 110))
    ]
    found = linearity(rows)
    assert found["memory_growth_bytes"] == 30 and found["memory_growth_tokens"] == 20
    assert found["time_over_fresh_first"] == 1 and found["time_over_fresh_last"] == pytest.approx(1.1)


def test_it_runs_and_has_its_section(tmp_path: Path, toy_folder: Path) -> None:
    embedder = toy_embedder.save_sentence_transformer(tmp_path / "e", toy.TEXT)
    words = ["--llm", toy_folder, "--embedder", embedder, "--texts", folder_of_texts(tmp_path), "--total", 900]
    words += ["--slice", 300, "--every", 2, "--layers", 1, 0, "--batches", 64, 128, "--sweep-tokens", 100]
    command = [sys.executable, "-m", "benchmarks.ingest_scale", "--json", tmp_path / "ingest_scale.json", *words]
    command += ["--repeats", 1]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "ingest_scale.json").read_text())
    assert [row["fresh_tokens_per_s"] is not None for row in record["rows"]] == [True, False, True]
    assert all(row["compressed"] > row["reused"] for row in record["rows"])
    assert record["rows"][0]["faiss_bytes"] < record["rows"][-1]["faiss_bytes"]
    assert list(record["layers"]) == ["1", "all"] and list(record["batches"]) == ["64", "128"]
    made = page.section(tmp_path, tmp_path)
    assert made is not None and "| all |" in made and "the FAISS index not counted" in made
    assert (tmp_path / "ingest.png").stat().st_size > 1000
    assert page.section(tmp_path / "texts", tmp_path) is None
