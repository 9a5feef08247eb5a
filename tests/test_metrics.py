"""Metrics add up whatever the threads do, and come out as Prometheus reads them."""

from __future__ import annotations

import logging
import math
import re
import subprocess
import sys
import threading

import pytest
import torch
from prometheus_client.core import GaugeMetricFamily

import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.config import CompressorConfig
from compllm_rag.library import ConceptLibrary
from compllm_rag.metrics import PREFIX, Metrics, RateSpread, Work, exposition, gauge
from compllm_rag.store import DiskStore, MemoryStore
from tests.processes import join
from trained import trained

PARAGRAPHS = toy.TEXT.strip().split("\n\n")
_SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)')


def parsed(text: str) -> dict[str, dict[str, float]]:
    """Samples by name and labels, every line checked against the text format."""
    found: dict[str, dict[str, float]] = {}
    family, kind, helped = "", "", False
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family, helped = line.split()[2], True
            assert family not in found
            continue
        if line.startswith("# TYPE "):
            assert helped
            assert line.split()[2] == family
            kind = line.split()[3]
            assert (kind == "counter") == family.endswith("_total"), family
            continue
        match = _SAMPLE.fullmatch(line)
        assert match, line
        suffix = match[1].removeprefix(family)
        assert suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",)), line
        found.setdefault(match[1], {})[match[2] or ""] = float(match[3])
    return found


@pytest.fixture
def library(llm, tmp_path) -> ConceptLibrary:
    return ConceptLibrary(trained(llm), DiskStore(tmp_path / "s", hidden_size=32), metrics=Metrics(sample_every=4))


def test_what_a_library_counts(library: ConceptLibrary) -> None:
    report = library.ensure(PARAGRAPHS)
    library.store.flush()
    library.fetch(PARAGRAPHS[0])
    library.fetch("Nobody has seen this sentence before.", missing="text")
    passages = [library.passage(text) for text in PARAGRAPHS]
    found = library.metrics.snapshot()
    new = len(library.passage("Nobody has seen this sentence before.").keys)
    assert (found["hits"], found["misses"]) == (len(passages[0].keys), new)
    assert found["hit_share"] == len(passages[0].keys) / (len(passages[0].keys) + new)
    assert found["segments_compressed"] == report.compressed
    assert found["segments_reused"] == report.reused
    assert found["bytes_written"] == library.store.stats().payload_bytes
    assert found["bytes_read"] > sum(passages[0].n_concepts) * 32 * 2  # and what was sampled
    assert found["compress_seconds"] > 0
    assert found["reconstruction_samples"] == math.ceil(report.compressed / 4)
    assert 0 < found["reconstruction_loss"] < 1e-3  # fp16 keeps eleven bits
    assert 0 < found["anchor_cosine"] <= 1
    assert found["chunks"] == len(PARAGRAPHS)
    rates = [p.achieved_rate for p in passages]
    assert found["achieved_rate_mean"] == pytest.approx(sum(rates) / len(rates), abs=0.005)
    assert found["achieved_rate_p10"] <= found["achieved_rate_p50"] <= found["achieved_rate_p90"]
    library.store.close()


def test_an_untrained_compressor_is_its_anchors(llm) -> None:
    library = ConceptLibrary(Compressor(llm), MemoryStore(32))
    library.ensure(PARAGRAPHS)
    assert library.metrics.snapshot()["anchor_cosine"] == pytest.approx(1, abs=1e-5)
    library = ConceptLibrary(Compressor(llm, CompressorConfig(queries="eos")), MemoryStore(32))
    with torch.no_grad():
        library.compressor.head.weight.fill_(0.01)
    library.ensure(PARAGRAPHS)
    found = library.metrics.snapshot()
    assert found["anchor_cosine"] is None
    assert found["reconstruction_samples"] > 0


def test_a_slow_batch_is_a_warning_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics(compress_limit_s=0.5)
    with caplog.at_level(logging.WARNING, "compllm_rag.metrics"):
        metrics.compressed(10, 4.0)
        assert not caplog.records
        metrics.compressed(10, 6.0)
        metrics.compressed(10, 6.0)
    assert [r.message for r in caplog.records] == [
        "compressing takes 0.6 s per segment (10 segments in 6 s), more than the limit of 0.5 s"
    ]
    assert metrics.snapshot()["segments_beyond_limit"] == 20
    caplog.clear()
    Metrics(compress_limit_s=None).compressed(1, 1e9)
    assert not caplog.records


def test_threads_lose_no_count() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(500):
            metrics.fetched(3, 1)
            metrics.ensured(5, 2, [1.5, 2.0])
            metrics.compressed(2, 0.002)
            metrics.sampled(0.5, None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    join(threads)
    found = metrics.snapshot()
    assert (found["hits"], found["misses"], found["segments_reused"]) == (12000, 4000, 12000)
    assert (found["segments_compressed"], found["chunks"], found["reconstruction_samples"]) == (8000, 8000, 4000)
    assert found["reconstruction_loss"] == 0.5


def test_rates_are_those_of_the_chunks_that_are_left() -> None:
    spread = RateSpread()
    assert spread.fields() == dict.fromkeys(spread.fields())
    spread.change([1.0, 1.5, 1.9, 1.95, 2.0])
    spread.change([1.0], -1)
    assert spread.chunks == 4
    assert spread.fields() == {
        "achieved_rate_mean": pytest.approx(1.8375),
        "achieved_rate_p10": 1.5,
        "achieved_rate_p50": 1.9,
        "achieved_rate_p90": 1.95,
    }
    assert RateSpread({200: 1}).fields()["achieved_rate_p90"] == 2.0


def test_prometheus_text(library: ConceptLibrary) -> None:
    assert parsed(library.metrics.to_prometheus())["compllm_fetch_hits_total"] == {"": 0}
    library.ensure(PARAGRAPHS)
    library.fetch(PARAGRAPHS[0])
    found = parsed(library.metrics.to_prometheus({"namespace": 'a "b"\\\n'}))
    labels = 'namespace="a \\"b\\"\\\\\\n"'
    snapshot = library.metrics.snapshot()
    assert found["compllm_fetch_hits_total"] == {labels: snapshot["hits"]}
    assert found["compllm_store_read_bytes_total"] == {labels: snapshot["bytes_read"]}
    buckets = list(found["compllm_compress_segment_seconds_bucket"].values())
    assert buckets == sorted(buckets)
    assert buckets[-1] == found["compllm_compress_segment_seconds_count"][labels] == snapshot["segments_compressed"]
    assert f'le="+Inf",{labels}' in found["compllm_compress_segment_seconds_bucket"]
    assert found["compllm_compress_segment_seconds_sum"][labels] == pytest.approx(snapshot["compress_seconds"])
    assert found["compllm_achieved_rate"][f'{labels},quantile="0.5"'] == snapshot["achieved_rate_p50"]
    library.store.close()


def test_prometheus_numbers() -> None:
    values = [1, 0.5, math.nan, math.inf, -math.inf]
    family = GaugeMetricFamily(f"{PREFIX}x", "A\nb\\c.", labels=["i"])
    for i, value in enumerate(values):
        family.add_metric([str(i)], value)
    assert exposition([family, gauge("y", "Nothing to tell.", None)], {"a": "b"}).splitlines() == [
        "# HELP compllm_x A\\nb\\\\c.",
        "# TYPE compllm_x gauge",
        'compllm_x{a="b",i="0"} 1.0',
        'compllm_x{a="b",i="1"} 0.5',
        'compllm_x{a="b",i="2"} NaN',
        'compllm_x{a="b",i="3"} +Inf',
        'compllm_x{a="b",i="4"} -Inf',
    ]
    assert family.samples[0].labels == {"i": "0"}


def test_libraries_of_one_process_tell_their_own_numbers(llm) -> None:
    one, two = (ConceptLibrary(Compressor(llm), MemoryStore(32)) for _ in range(2))
    one.ensure(PARAGRAPHS)
    name = "compllm_compress_segment_seconds_count"
    first, second = (parsed(x.metrics.to_prometheus({"namespace": n}))[name] for x, n in ((one, "a"), (two, "b")))
    assert first['namespace="a"'] > 0
    assert second == {'namespace="b"': 0}


def test_importing_the_metrics_loads_no_client() -> None:
    code = "import sys, compllm_rag.metrics; sys.exit('prometheus_client' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_work_adds_up() -> None:
    one, two = Work(1, 2.0, 1, 0.5, 1, 0.9), Work(3, 4.0)
    assert one.plus(two) == Work(4, 6.0, 1, 0.5, 1, 0.9)
    assert one.plus(two).plus(one, -1) == two
    assert Work().fields()["reconstruction_loss"] is None
