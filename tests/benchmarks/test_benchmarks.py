"""Every benchmark runs on a toy model within seconds and writes what its report needs; no speed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import toy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(3):
        text = "\n\n".join(f"{paragraph} This is copy {number}." for paragraph in toy.TEXT.split("\n\n"))
        (folder / f"{number}.md").write_text(text, encoding="utf-8")
    return folder


def run(name: str, out: Path, *options: str) -> dict:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(out), "--repeats", "1", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(out.read_text())
    record = json.loads(done.stdout)
    assert record["command"] == " ".join([f"python -m benchmarks.{name} --repeats 1", *options])
    assert record["environment"]["versions"]["torch"]
    return record


def test_ingest(tmp_path: Path, toy_folder: Path, texts: Path) -> None:
    record = run(
        "ingest", tmp_path / "o.json", "--llm", str(toy_folder), "--texts", str(texts), "--sizes", "300", "600"
    )
    assert list(record["sizes"]) == ["300", "600"]
    for size, row in record["sizes"].items():
        assert row["source_tokens"] <= int(size) + 300
        assert row["ensure_over_bare"]["median"] > 0
    assert record["sizes"]["600"]["segments"] > record["sizes"]["300"]["segments"]


def test_query(tmp_path: Path, toy_folder: Path, texts: Path) -> None:
    record = run(
        "query", tmp_path / "o.json", "--llm", str(toy_folder), "--texts", str(texts), "--lengths", "300", "700"
    )
    for context in record["contexts"].values():
        text, two, four = (context[k] for k in ("text", "concepts at rate 2", "concepts at rate 4"))
        assert text["prompt_positions"] > two["prompt_positions"] > four["prompt_positions"]
        assert text["ttft_over_text"]["median"] == 1
        for row in (text, two, four):
            assert row["ttft_s"] >= row["prefill_s"] > 0


def test_startup(tmp_path: Path) -> None:
    record = run("startup", tmp_path / "o.json")
    assert set(record["median_s"]) == {"empty process", "import compllm_rag", "compllm-rag --help"}
