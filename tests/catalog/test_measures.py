"""What a storage keeps of its measurements, whoever asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compllm_rag import Compressor
from compllm_rag.cli.main import app
from compllm_rag.storage.stats import storage_stats
from tests.faults.fault_samples import QUESTION, create, documents, execute, load
from tests.test_metrics import parsed


def test_the_storage_keeps_what_processes_measured(tmp_path: Path, compressor: Compressor) -> None:
    path = tmp_path / "s"
    with create(path, compressor) as index:
        first = index.ingest(documents())
        kept = index.stats()["metrics"]
        assert kept["segments_compressed"] == first.segments_compressed == index.metrics.work.segments
        assert kept["compress_seconds"] == index.metrics.work.seconds > 0
        assert 0 < kept["reconstruction_loss"] < 1e-3
        assert kept["chunks_awaiting"] == 0
    assert storage_stats(path)["metrics"] == kept
    with load(path, compressor) as index:
        second = index.ingest(documents(version=1))
        index.upload(documents(8, version=2))
        index.close(drain=True)
    found = storage_stats(path)["metrics"]
    assert found["segments_compressed"] == index.metrics.work.segments + first.segments_compressed
    assert index.metrics.work.segments > second.segments_compressed
    with load(path, compressor) as index:
        rates = [index.library.passage(node.text).achieved_rate for node in index.faiss.iter_nodes()]
        assert found["achieved_rate_mean"] == pytest.approx(sum(rates) / len(rates), abs=0.006)
        assert min(rates) <= found["achieved_rate_p10"] + 0.005
        assert found["achieved_rate_p90"] <= max(rates) + 0.005
        index.as_query_engine().query(QUESTION)
        text = parsed(index.to_prometheus())
        assert text["compllm_fetch_hits_total"]['namespace="default"'] > 0
        assert text["compllm_storage_segments_compressed_total"]['namespace="default"'] == found["segments_compressed"]


def test_rates_are_not_told_where_some_chunks_were_never_counted(tmp_path: Path, compressor: Compressor) -> None:
    path = tmp_path / "s"
    with create(path, compressor) as index:
        index.ingest(documents())
    execute(path / "catalog.db", "DELETE FROM kv WHERE collection = 'compllm/metrics'")
    with load(path, compressor) as index:
        index.ingest(documents(8))
        index.delete_ref_doc("d0")
        found = index.stats()["metrics"]
        assert found["achieved_rate_mean"] is None
        assert found["segments_compressed"] == index.metrics.work.segments


def test_the_command(tmp_path: Path, compressor: Compressor) -> None:
    path = tmp_path / "s"
    with create(path, compressor) as index:
        index.ingest(documents())
    words = ["stats", "--storage", str(path)]
    runner = CliRunner()
    stats = json.loads(runner.invoke(app, [*words, "--json"]).stdout)
    assert list(stats)[-1] == "metrics"
    assert stats["metrics"]["achieved_rate_p50"] > 1
    text = parsed(runner.invoke(app, [*words, "--prometheus"]).stdout)
    assert text["compllm_storage_documents"] == {'namespace="default"': 6}
    assert text["compllm_storage_concept_bytes"] == {'namespace="default"': stats["concept_bytes"]}
    assert "reconstruction_loss" in runner.invoke(app, words).stdout
    both = runner.invoke(app, [*words, "--json", "--prometheus"])
    assert both.exit_code == 2
    assert "exclude each other" in both.stderr
