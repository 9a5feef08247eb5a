"""`watch` as people meet it: it says what it brought in, and Ctrl-C finishes what it is at."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import toy
from compllm_rag.cli.main import app
from compllm_rag.storage.stats import storage_stats
from tests.processes import errors, hearing_interrupts, said, started
from toy_embedder import save_sentence_transformer


@pytest.fixture(scope="module")
def models(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    embedder = save_sentence_transformer(tmp_path_factory.mktemp("toy-embedder"), toy.TEXT)
    return ("--llm", str(toy_folder), "--embedder", str(embedder))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "ferry.md").write_text("# Ferry\n\nThe ferry to Orsa leaves at nine.")
    (tmp_path / "docs" / ".gitignore").write_text("notes.md\n")
    (tmp_path / "docs" / "notes.md").write_text("Not for everybody.")
    return tmp_path


def run(*words: object, code: int = 0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def test_once(here: Path, models: tuple[str, ...]) -> None:
    first = run("watch", "docs", "--storage", "s", "--once", *models)
    assert first.stdout.startswith(
        "all files: 1 files read, 1 documents new or changed, 0 deleted; 1 of their 1 chunks"
    )
    (here / "docs" / "bad.jsonl").write_text("{")
    again = run("watch", "docs", "--storage", "s", "--once", "--no-gitignore")
    assert again.stdout.startswith("all files: 3 files read, 1 documents new or changed")
    assert "left out: docs/bad.jsonl:1:" in again.stderr
    told = json.loads(run("watch", "docs", "--storage", "s", "--once", "--ignore", "bad*", "--json").stdout)
    assert (told["full"], told["files"], told["documents_deleted"], told["edit_s"]) == (True, 1, 1, None)
    assert storage_stats(Path("s"))["documents"] == 1
    assert "only folders can be watched" in run("watch", "docs/ferry.md", "--storage", "s", "--once", code=2).stderr
    assert "path does not exist" in run("watch", "nowhere", "--storage", "s", code=2).stderr
    (here / "docs" / "ferry.md").unlink()
    (here / "docs" / "bad.jsonl").unlink()
    assert "error: nothing was pruned" in run("watch", "docs", "--storage", "s", "--once", code=2).stderr
    assert storage_stats(Path("s"))["documents"] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
def test_until_interrupted(here: Path, models: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "compllm_rag.cli", "watch", "docs", "--storage", "s", "--json", *models]
    with started(hearing_interrupts(command)) as process:
        assert json.loads(said(process))["full"]
        (here / "docs" / "ferry.md").write_text("# Ferry\n\nThe ferry to Orsa leaves at ten.")
        batch = json.loads(said(process))
        assert (batch["files"], batch["documents_changed"], batch["chunks_added"]) == (1, 1, 1)
        assert 0 < batch["edit_s"] < 200
        second = run("watch", "docs", "--storage", "s", "--once", code=2)
        assert "another watcher keeps this storage up to date" in second.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert "finishing what is being brought in" in errors(process)
    assert storage_stats(Path("s"))["documents"] == 1
    run("watch", "docs", "--storage", "s", "--once")
