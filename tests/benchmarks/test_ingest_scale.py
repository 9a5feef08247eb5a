"""Growing a storage: slices, linearity, and the benchmark on a toy model."""

from __future__ import annotations

from pathlib import Path

import pytest

import toy
import toy_embedder
from benchmarks.ingest import ingest_scale_page as page
from benchmarks.ingest.ingest_scale import documents, linearity, slices
from benchmarks.ingest.sweeps import variant
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.config import CompressorConfig
from loft_corpus import run


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
        {"tokens": t, "rss_bytes": rss, "faiss_bytes": index, "fresh_tokens_per_s": fresh}
        | {"tokens_per_s": 100, "seconds": 0.1}
        for t, rss, index, fresh in ((10, 100, 5, 100), (20, 500, 10, None), (30, 520, 15, None), (40, 540, 20, 110))
    ]
    found = linearity(rows)
    assert found["memory_growth_bytes"] == 30 and found["memory_growth_tokens"] == 20
    assert found["time_over_fresh_first"] == 1 and found["time_over_fresh_last"] == pytest.approx(1.1)
    # 0.01 s a token all along, over 1/100 s and then over the median of 1/100 and 1/110 s.
    assert found["time_over_small_ingests"] == {"10": pytest.approx(1), "40": pytest.approx(2 / (1 + 100 / 110))}


def test_variants_keep_the_shipped_lora() -> None:
    config = CompressorConfig(layers=1, lora_rank=2, lora_alpha=4, lora_modules=("q_proj",))
    made = variant(Compressor(toy.llm(), config), layers=None, segment_length=10)
    assert made.config.layers is None and made.segmenter.segment_length == 10
    assert any(name.startswith("lora.") for name in made.state())


def test_it_runs_resumes_and_has_its_section(tmp_path: Path, toy_folder: Path) -> None:
    embedder = toy_embedder.save_sentence_transformer(tmp_path / "e", toy.TEXT)
    out = tmp_path / "ingest_scale.json"
    words = ["--llm", toy_folder, "--embedder", embedder, "--texts", folder_of_texts(tmp_path)]
    words += ["--total", 900, "--slice", 300, "--every", 2, "--layers", 1, 0, "--segments", 10, 20]
    words += ["--batches", 64, 128, "--sweep-tokens", 100, "--repeats", 1]
    record, _ = run("ingest_scale", out, *words)
    growth = record["growth"]
    rows = growth["rows"]
    assert [row["fresh_tokens_per_s"] is not None for row in rows] == [True, False, True]
    assert all(row["compressed"] > row["reused"] for row in rows)
    for row in rows:
        assert row["embed_s"] > 0 and row["compress_s"] > 0 and row["embed_s"] + row["compress_s"] < row["seconds"]
        assert row["peak_rss_bytes"] > 0
    assert rows[0]["faiss_bytes"] < rows[-1]["faiss_bytes"]
    assert len(growth["time_over_small_ingests"]) == 2
    # Concepts of 32 values in fp16 at rate 2.
    assert growth["bytes_per_token"]["concepts"] == pytest.approx(32 * 2 / 2, rel=0.15)
    assert growth["adapter_bytes"] > 0
    assert growth["bytes_per_token"]["disk"] > growth["bytes_per_token"]["concepts"]
    assert list(record["layers"]["rows"]) == ["1", "all"] and list(record["batches"]["rows"]) == ["64", "128"]
    assert list(record["segments"]["rows"]) == ["10", "20"] and record["texts"] == "texts given, reworded"
    made = "\n".join(page.tables(record))
    assert "| | all |" in made.replace("|  |", "| |") and "the FAISS index not counted" in made
    assert len(page.plot(record).axes) == 2
    again, told = run("ingest_scale", out, *words)
    assert told.count("done before") == 4 and again["growth"] == growth
