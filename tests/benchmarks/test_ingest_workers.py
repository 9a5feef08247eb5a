"""What more text would take, reckoned from a record; `tests/pipelines` runs the job itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.ingest.ingest_workers import corpus, plan, tables

RUN = {"source_tokens": 1000, "chunks": 5, "parts": 2, "workers": 1, "plan_s": 1.0, "encode_s": 9.0, "merge_s": 0.5}
RUN |= {"driver_cpu_s": 0.1, "workers_s": 4.0, "workers_cpu_s": 2.0}
RUN |= {"concepts_bytes": 64_000, "text_and_vectors_bytes": 20_000}
RECORD = {
    "command": "compllm-rag bench ingest_workers",
    "environment": {
        "commit": "0" * 40, "gpu": None, "cpu": "C", "torch_threads": 1, "cores": 2, "versions": {"torch": "2"},
    },
    "width": 33,
    "text_bytes": 4000,
    "prices": {"core_hour": 0.5, "terabyte_month": 10.0},
    "runs": {"1": RUN, "2": RUN | {"workers": 2, "workers_s": 5.0}},
    "throughput_of_two_over_one": 1.6,
}  # fmt: skip


def test_a_plan_goes_by_what_was_measured() -> None:
    made = plan(RECORD, 4e12)
    assert made["tokens"] == pytest.approx(1e12)
    assert made["core_hours"] == pytest.approx(1e12 * 0.002 / 3600)
    assert made["price"] == pytest.approx(made["core_hours"] / 2)
    assert made["workers_per_driver"] == pytest.approx(20)
    assert made["concepts_bytes"]["fp16"] == {1: 66e12, 2: 33e12, 4: 16.5e12}
    assert made["text_and_vectors_bytes"] == pytest.approx(20e12)
    page = "\n".join(tables(RECORD))
    assert "two workers did 1.60 times" in page and "about 20 such workers" in page
    assert "250 billion tokens at 4.00 bytes" in page


def test_the_corpus_is_as_long_as_asked(tmp_path: Path) -> None:
    size = corpus(tmp_path, ["A lamp. " * 30, "A boat. " * 10], 2500, 1000)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 5 and size == sum(path.stat().st_size for path in files) >= 2500
