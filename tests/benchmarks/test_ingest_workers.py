"""What more text would take, reckoned from records; `tests/pipelines` runs the job that `ingest_workers` measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.ingest import ingest_plan, ingest_workers
from compllm_rag.errors import ConfigurationError

RUN = {"source_tokens": 1000, "parts": 2, "merge_s": 0.5, "driver_cpu_s": 0.1, "workers_s": 4.0, "workers_cpu_s": 2.0}
RECORD = {
    "command": "compllm-rag bench ingest_workers",
    "environment": {
        "commit": "0" * 40, "gpu": None, "cpu": "C", "torch_threads": 1, "cores": 2, "versions": {"torch": "2"},
    },
    "runs": {"1": RUN, "2": RUN | {"workers_s": 5.0}},
    "throughput_of_two_over_one": 1.6,
}  # fmt: skip


def test_the_page_tells_what_a_second_worker_brings() -> None:
    page = "\n".join(ingest_workers.tables(RECORD))
    assert "two workers did 1.60 times" in page and "about 20 such workers" in page
    assert "workers 2.00 s" in page and "driver 0.100 s" in page


def test_the_corpus_is_as_long_as_asked(tmp_path: Path) -> None:
    size = ingest_workers.corpus(tmp_path, ["A lamp. " * 30, "A boat. " * 10], 2500, 1000)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 5 and size == sum(path.stat().st_size for path in files) >= 2500


def test_a_plan_goes_by_what_was_measured(tmp_path: Path) -> None:
    row = {"slice_tokens": 500, "seconds": 1.1, "embed_s": 0.2, "compress_s": 0.8}
    deep = {"fp16": {"1": 8.0, "2": 4.0, "4": 2.0}}
    records = {
        "ingest_scale": {"growth": {"rows": [row, row], "bytes_per_token": {"disk": 30, "concepts": 20}}},
        "storage_size": {"llms": {ingest_plan.LLM: {"text_per_token": 4.0}}},
        "cost_model": {"shapes": {ingest_plan.SHAPE: {"stored_bytes": deep}}},
    }
    for name, record in records.items():
        environment = {"commit": "1" * 40, "torch_threads": 4}
        text = json.dumps({"command": f"bench {name}", "environment": environment} | record)
        (tmp_path / f"{name}.json").write_text(text)
    words = ["--results", str(tmp_path), "--terabytes", "2", "--machine-hour", "0.5"]
    record = ingest_plan.main(words)
    made = record["plan"]
    assert made["tokens"] == 5e11
    assert made["worker_hours"] == pytest.approx(5e11 * 0.002 / 3600)
    assert made["price"] == pytest.approx(made["worker_hours"] / 2)
    assert made["workers_per_driver"] == pytest.approx(10)
    assert [one["storages"] for one in made["rows"]] == [1, 2, 26, 103]
    assert made["concepts_bytes"]["deep, rate 2"]["fp16"] == 2e12
    page = "\n".join(ingest_plan.tables(record))
    assert "500 billion tokens of 4.00 bytes" in page and "keeps up with 10 such workers" in page
    assert "| deep, rate 2 | fp16 | 2 | 50 |" in page
    with pytest.raises(ConfigurationError):
        ingest_plan.main([*words, "--terabytes", "0"])
    (tmp_path / "cost_model.json").unlink()
    with pytest.raises(ConfigurationError, match="bench cost_model"):
        ingest_plan.main(words)
