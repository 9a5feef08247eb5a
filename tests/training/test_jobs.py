"""The ingestion job, run as people run it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import processes
import toy
from toy_embedder import save_sentence_transformer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def embedder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sentence_transformer(tmp_path_factory.mktemp("toy-embedder"), toy.TEXT)


def test_the_job_is_taken_up_after_a_ctrl_c(tmp_path: Path, toy_folder: Path, embedder_folder: Path) -> None:
    # Two batches and more, so that there is something between the first log line and the end to interrupt.
    with (tmp_path / "rows.jsonl").open("w") as rows:
        for i in range(1000):
            text = f"Keeper {i} wrote: {toy.TEXT[: 300 + i % 400]} That was in {1871 + i}."
            rows.write(json.dumps({"id": f"r{i}", "title": f"Row {i}", "text": text}) + "\n")
    log = tmp_path / "log.jsonl"
    command = [sys.executable, str(ROOT / "pipelines" / "ingest.py"), str(tmp_path / "rows.jsonl")]
    command += ["--storage", str(tmp_path / "s"), "--llm", str(toy_folder), "--embedder", str(embedder_folder)]
    command += ["--log", str(log)]
    first = subprocess.Popen(
        processes.hearing_interrupts(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not log.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    out, errors = first.communicate(timeout=240)
    assert first.returncode == 130, (out, errors)
    assert "run the same command again" in errors
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["documents"] == 1000
    assert report["segments_reused"] > 0
    assert json.loads(log.read_text().splitlines()[-1])["documents"] == 1000


def test_the_job_says_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "pipelines" / "ingest.py"), str(tmp_path / "no"), "--storage", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
