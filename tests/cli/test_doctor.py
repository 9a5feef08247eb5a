"""`doctor` looks at all parts of a machine, and its advice follows what it found."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from compllm_rag import Compressor
from compllm_rag.cli import doctor
from compllm_rag.cli.main import app
from compllm_rag.storage.compaction import compact_storage
from tests.faults.fault_samples import create, documents

GOLDEN = Path(__file__).parents[1] / "golden" / "v1" / "made"


def run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["doctor", *map(str, words)])
    assert done.exit_code == code, done.output
    return done.stdout


def test_every_part_has_findings_and_one_line_of_advice(tmp_path: Path) -> None:
    storage = shutil.copytree(GOLDEN, tmp_path / "s")
    found = json.loads(run("--storage", storage, "--json"))
    assert list(found) == ["versions", "device", "threads", "dtypes", "model cache", "storage"]
    assert all(set(part) == {"found", "good", "advice"} and "\n" not in part["advice"] for part in found.values())
    assert found["versions"]["found"]["torch"] == torch.__version__
    assert found["storage"]["found"]["documents"] == 2
    assert found["storage"]["good"]
    lines = run("--storage", storage).splitlines()
    assert len(lines) == 2 * len(found)
    assert {line[:4] for line in lines[::2]} <= {"ok  ", "LOOK"}


def test_a_damaged_storage_is_exit_1_and_says_what_to_do(tmp_path: Path) -> None:
    storage = shutil.copytree(GOLDEN, tmp_path / "s")
    next((storage / "concepts" / "packs").iterdir()).write_bytes(b"")
    assert f"compllm-rag repair {storage}" in run("--storage", storage, code=1)
    assert "there is no storage here" in run("--storage", tmp_path / "none", code=1)


@pytest.mark.parametrize(("used", "cores", "good"), [(1, 8, False), (4, 8, True), (8, 8, True), (16, 8, False)])
def test_threads_are_compared_with_cores(used: int, cores: int, good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: used)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    found = doctor._threads()
    assert found.good is good
    assert ("OMP_NUM_THREADS=" in found.advice) is not good


@pytest.mark.parametrize(
    ("float32", "bfloat16", "advice"), [(4.0, 1.0, "--dtype bfloat16"), (1.0, 1.0, "float32, the")]
)
def test_the_faster_dtype_is_advised(
    float32: float, bfloat16: float, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compllm_rag.models.checkpoints.default_device", lambda: "cpu")
    monkeypatch.setattr(doctor, "_product_s", lambda dtype, device: float32 if dtype == torch.float32 else 1.0)
    found = doctor._dtypes()
    assert advice in found.advice
    assert found.found["bfloat16_speedup"] == float32


def test_a_machine_that_lacks_something_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_PACKAGES", ("torch", "no-such-package"))
    assert "no-such-package" in doctor._versions().advice
    monkeypatch.setattr("compllm_rag.models.checkpoints.default_device", lambda: "cpu")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "CUDA build" in doctor._device().advice
    monkeypatch.setenv("COMPLLM_CACHE", str(tmp_path / "cache"))
    assert "models fetch" in doctor._cache().advice
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(10))
    assert not doctor._cache().good


def test_a_storage_whose_text_is_mostly_gone_is_to_be_compacted(tmp_path: Path, compressor: Compressor) -> None:
    """Records of deleted documents lie in packs as all others do, until a compaction."""
    with create(tmp_path / "s", compressor) as index:
        index.ingest(documents(4))
        assert "Sound" in doctor._storage(tmp_path / "s").advice
        for document in documents(4)[1:]:
            index.delete_ref_doc(document.id_)
    found = doctor._storage(tmp_path / "s")
    assert found.good and f"compllm-rag compact {tmp_path / 's'}" in found.advice
    compact_storage(tmp_path / "s")
    assert "Sound" in doctor._storage(tmp_path / "s").advice
