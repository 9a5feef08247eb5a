"""Ingestion by workers of a real Ray cluster of two nodes on this machine, one of whose workers is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import processes
import toy
from compllm_rag.llamaindex.documents import load_documents
from compllm_rag.llamaindex.index import ConceptIndex
from tests.llamaindex.sharding.sharding_samples import assert_same, write_corpus
from toy_embedder import save_sentence_transformer

ROOT = Path(__file__).parents[2]
JOB = [sys.executable, str(ROOT / "pipelines" / "ingest_ray.py")]
LIMIT_S = float(os.environ.get("COMPLLM_RAY_TEST_S", "300"))  # more of them for a machine that is busy


def installed() -> None:
    """Where Ray is not installed the test is skipped, and fails in CI, which installs it."""
    if importlib.util.find_spec("ray") is None:
        message = "Ray is not installed (pip install 'compllm-rag[ray]')"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster of two nodes with a CPU each."""
    installed()
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "600")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # what else runs on the machine is none of its business
    monkeypatch.setenv("RAY_worker_niceness", "0")  # as urgent as the test that waits for them
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        monkeypatch.setenv("RAY_TMPDIR", scratch)
        (Path(scratch) / "ray").mkdir()
        cluster = Cluster()
        try:
            for node in range(2):
                # Ports that are named are not waited for: Ray's helpers may take longer to start than it has patience.
                names = "metrics_agent_port metrics_export_port dashboard_agent_listen_port runtime_env_agent_port"
                options = dict(zip(names.split(), free_ports(4), strict=True))
                if not node:
                    options["include_dashboard"] = False
                cluster.add_node(wait=False, num_cpus=1, object_store_memory=100 * 2**20, **options)
            cluster.wait_for_nodes(timeout=LIMIT_S)
            yield cluster.address
        finally:
            cluster.shutdown()


def free_ports(n: int) -> list[int]:
    held = [socket.socket() for _ in range(n)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def test_a_worker_is_killed_and_nothing_is_lost_or_there_twice(
    tmp_path: Path, toy_folder: Path, two_nodes: str
) -> None:
    corpus = write_corpus(tmp_path / "corpus", 40)
    embedder = save_sentence_transformer(tmp_path / "embedder", toy.TEXT)
    staging = tmp_path / "staging"
    command = [*JOB, "--data", str(corpus), "--storage", str(tmp_path / "s"), "--staging", str(staging)]
    command += ["--llm", str(toy_folder), "--embedder", str(embedder), "--part-chars", "300"]
    command += ["--workers", "2", "--address", two_nodes]
    with processes.started(command, LIMIT_S) as job:
        shards: list[Path] = []
        while not shards and job.poll() is None:
            time.sleep(0.01)
            shards = list(staging.glob("shards/[!.]*/shard.json"))
        assert shards, processes.errors(job)
        victim = json.loads(shards[0].read_text())["pid"]
        os.kill(victim, signal.SIGKILL)
        made = len(list(staging.glob("shards/[!.]*/shard.json")))
        out = job.stdout.read()
        assert job.wait(LIMIT_S) == 0, processes.errors(job)
        told = processes.errors(job)
    report = json.loads(out)
    assert made < report["parts"] == 42
    assert report["workers"] >= 2  # the other one, or the one that came in its place
    assert report["documents"] == report["documents_changed"] == 42
    assert report["segments_compressed"] + report["segments_reused"] == report["segments"]
    assert "42 documents: 42 parts to ingest, 42 of them to encode" in told
    assert "part 42 of 42: " in told
    assert not staging.exists()
    with ConceptIndex.create(tmp_path / "usual", llm=str(toy_folder), embedder=str(embedder)) as index:
        index.ingest(load_documents([corpus]), within=[corpus])
    assert_same(tmp_path / "s", tmp_path / "usual")


def test_the_job_says_what_is_wrong(tmp_path: Path) -> None:
    def said(*words: str) -> str:
        done = subprocess.run([*JOB, "--storage", str(tmp_path / "s"), *words], capture_output=True, text=True)
        assert done.returncode == 2
        return done.stderr.splitlines()[-1]

    assert said("--data", str(tmp_path / "no")).startswith("error: ")
    assert not (tmp_path / "s").exists()
