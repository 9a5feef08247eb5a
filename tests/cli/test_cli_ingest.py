"""`ingest` as people meet it: folders with accidents in them, disks that are away, standard input."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import toy
from compllm_rag.cli.main import app
from compllm_rag.cli.progress import ProgressShow
from compllm_rag.config import RateOptions
from compllm_rag.llamaindex.corpus import IngestReport
from compllm_rag.storage.manifest import read_manifest
from compllm_rag.storage.stats import storage_stats
from toy_embedder import save_sentence_transformer


@pytest.fixture(scope="module")
def models(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    embedder = save_sentence_transformer(tmp_path_factory.mktemp("toy-embedder"), toy.TEXT)
    return ("--llm", str(toy_folder), "--embedder", str(embedder))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's, with a document in `docs`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs" / "team").mkdir(parents=True)
    (tmp_path / "docs" / "ferry.md").write_text("# Ferry\n\nThe ferry to Orsa leaves at nine.")
    (tmp_path / "docs" / "team" / "rota.txt").write_text("Anna is on duty.")
    return tmp_path


def run(*words: object, code: int = 0, stdin: bytes | None = None):
    result = CliRunner().invoke(app, [str(w) for w in words], input=stdin)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    assert "Traceback" not in result.output
    return result


def documents(storage: str = "s") -> int:
    return int(storage_stats(Path(storage))["documents"])


def test_accidents_are_named_at_the_end(here: Path, models: tuple[str, ...]) -> None:
    (here / "docs" / ".#b.md").symlink_to("me@host.1")
    (here / "docs" / "bad.jsonl").write_text('{"id": 1, "text": null}')
    (here / "docs" / "latin.txt").write_bytes(b"Caf\xe9 opens at ten.")
    (here / "docs" / "a.png").write_bytes(b"")
    (here / "docs" / ".git").mkdir()
    done = run("ingest", "docs", "--storage", "s", *models)
    assert documents() == 3
    assert "3 documents (3 new or changed)" in done.stdout
    assert "2 files could not be read" in done.stdout
    assert done.stderr.splitlines()[-4:] == [
        "note: docs/latin.txt: byte 3 is not UTF-8; read as Windows-1252",
        "left out: docs/.#b.md: a link to nothing",
        "left out: docs/bad.jsonl:1: text is null; make it a string",
        "left out as no part of the corpus: 1 a hidden folder, 1 .png; --verbose names them",
    ]
    assert "left out: docs/a.png: kind of file" in run("ingest", "docs", "--storage", "s", "--verbose").stderr
    told = json.loads(run("ingest", "docs", "--storage", "s", "--json").stdout)
    assert {one["path"]: one["kind"] for one in told["skipped"]} == {
        "docs/.#b.md": "special", "docs/.git": "excluded", "docs/a.png": "unknown", "docs/bad.jsonl:1": "broken",
    }  # fmt: skip
    assert [note["path"] for note in told["notes"]] == ["docs/latin.txt"]
    strict = run("ingest", "docs", "--storage", "s", "--strict", "--json", code=2)
    assert json.loads(strict.stdout)["documents"] == 3
    assert strict.stderr.startswith("error: 2 files could not be read")
    (here / "docs" / ".#b.md").unlink()
    (here / "docs" / "bad.jsonl").unlink()
    run("ingest", "docs", "--storage", "s", "--strict")


@pytest.mark.skipif(sys.platform != "linux", reason="rights as Linux has them")
def test_prune_and_a_folder_that_cannot_be_listed(here: Path, models: tuple[str, ...]) -> None:
    run("ingest", "docs", "--storage", "s", *models)
    drop = []
    if os.getuid() == 0:  # who reads everything
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv")
        drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    (here / "docs" / "team").chmod(0)
    try:
        command = [*drop, sys.executable, "-m", "compllm_rag.cli", "ingest", "docs", "--storage", "s", "--prune"]
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        (here / "docs" / "team").chmod(0o755)
    assert done.returncode == 2
    assert "left out: docs/team: permission denied" in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")][0].startswith(
        "error: nothing was pruned: not everything could be looked at: got docs/team: permission denied"
    )
    assert documents() == 2
    shutil.rmtree(here / "docs" / "team")
    assert "1 deleted" in run("ingest", "docs", "--storage", "s", "--prune").stdout


def test_same_names_in_other_folders(here: Path, models: tuple[str, ...]) -> None:
    shutil.copytree("docs", "other")
    (here / "other" / "ferry.md").write_text("# Ferry\n\nAnother one.")
    run("ingest", "docs", "--storage", "s", *models)
    told = run("ingest", "other", "--storage", "s").stderr
    assert "ferry.md is the id of" in told
    assert "this one is other/ferry.md" in told
    assert documents() == 4
    (here / "docs").rename("moved")
    assert "2 of them moved" in run("ingest", "moved", "--storage", "s").stdout
    assert documents() == 4


def test_the_storage_in_the_corpus(here: Path, models: tuple[str, ...]) -> None:
    for storage in (".", "docs/s"):
        for _ in range(2):
            run("ingest", ".", "--storage", storage, *models)
        assert documents(storage) == 2
        assert read_manifest(Path(storage))


def test_standard_input(here: Path, models: tuple[str, ...]) -> None:
    def put(text: str, *words: object, code: int = 0):
        return run("ingest", "-", "--storage", "s", *words, *models, stdin=text.encode(), code=code)

    put("A note.", "--id", "note", "--title", "My note")
    put("A note that changed.", "--id", "note")
    assert documents() == 1
    put("Another.")
    put("And another.")
    put("And another.")
    assert documents() == 3
    put('{"id": "a", "text": "line"}\n{"id": "b"}\n{"id": "c", "text": "line three"}\n', "--jsonl")
    assert documents() == 5
    both = run("ingest", "-", "docs", "--storage", "s", "--json", stdin=b"And another.")
    assert json.loads(both.stdout)["documents"] == 3
    assert documents() == 7
    told = put("Of standard input.", "--id", "ferry.md").stderr
    assert "this one is stdin#ferry.md" in told
    for text, words, said in [
        ("", (), "nothing to ingest"),
        ("x", ("--jsonl", "--id", "y"), "ids and titles of their own"),
        ("x", ("--id", " "), "an id cannot be empty"),
    ]:
        assert said in put(text, *words, code=2).stderr
    assert "option for standard input" in run("ingest", "docs", "--storage", "s", "--title", "x", code=2).stderr


def test_progress_has_a_total_on_a_terminal_and_is_silent_elsewhere() -> None:
    report = IngestReport(documents=3, source_tokens=70)
    for terminal in (True, False):
        out = io.StringIO()
        with ProgressShow(console=Console(file=out, force_terminal=terminal, width=160)) as show:
            show.ingested(report, 0.25)
            show.ingested(IngestReport(documents=5, source_tokens=90), 0.5)
            assert show._live is None or show._live.tasks[0].percentage == 50
        assert ("3 documents, 70 tokens" in out.getvalue()) is terminal
        assert ("to go:" in out.getvalue()) is terminal


def test_rates_by_the_text_and_side_by_side(here: Path, models: tuple[str, ...]) -> None:
    rows = "\n".join(f"{i},2024-03-{i:02d},{i * 7919 % 1000}" for i in range(10, 28))
    (here / "docs" / "prices.csv").write_text(f"sku,day,price\n{rows}")
    run("ingest", "docs", "--storage", "s", "--rate", "auto", "--also-rate", "3", "--guard", "exact", *models)
    told = run("stats", "--storage", "s")
    assert "rate                    information" in told.stdout and "also_rates              3.000" in told.stdout
    assert "chunks stay text (guard)" in told.stderr
    found = json.loads(run("stats", "--storage", "s", "--json").stdout)
    assert found["chunks_as_text"]["guard"] >= 1 and sum(found["chunks_by_rate"].values()) == 2
    asked = json.loads(run("query", "What was the price?", "--storage", "s", "--top-k", "9", "--json").stdout)
    assert {source["why"] for source in asked["sources"]} == {None, "kept as text by the guard"}
    guard, *_ = [source["guard"] for source in asked["sources"] if source["guard"]]
    told = run("query", "What was the price?", "--storage", "s", "--top-k", "9").stdout
    assert (guard["by"], guard["limit"]) == ("exact", 0.25) and guard["expected"] > 0.25
    assert f"kept as text by the guard: share of its signs to give back exactly {guard['expected']:.2f}, limit" in told
    explained = run("query", "What was the price?", "--storage", "s", "--top-k", "9", "--explain").stdout
    assert f"exactly {guard['expected']:.2f}, limit 0.25)" in explained
    again = run("ingest", "docs", "--storage", "s", "--rate", "auto", "--also-rate", "3", "--guard", "exact", *models)
    assert "0 new or changed" in again.stdout


def test_options_of_rate_policies(here: Path, models: tuple[str, ...]) -> None:
    flags = ("--rate", "information", "--rate-bands", "1,1.25,2,3", "--rate-window", "20", "--guard", "exact")
    whole = (*flags, "--rate-measure", "unigram", "--guard-limit", "0.9")
    run("ingest", "docs", "--storage", "s", *whole, *models)
    made = read_manifest(here / "s").ingest
    assert made.rate_options == RateOptions(bands=(1, 1.25, 2, 3), window=20)
    assert (made.rate, made.guard, made.guard_limit) == ("information", "exact", 0.9)
    for same in (whole, flags, ("--rate-window", "20"), ()):  # what is not named is the storage's own
        assert "0 new or changed" in run("ingest", "docs", "--storage", "s", *same).stdout
    for words, said in {
        ("--rate-window", "40"): "another rate option window: got 40, expected 20",
        ("--rate-bands", "1,1.5,3,4"): "another rate option bands",
        ("--guard-limit", "0.2"): "another guard limit",
        ("--most-loss", "0.1"): "option most_loss of rate policies would be without effect",
    }.items():
        assert said in run("ingest", "docs", "--storage", "s", *words, code=2).stderr


def test_options_that_nothing_would_heed_are_one_line(here: Path, models: tuple[str, ...]) -> None:
    for words, said in {
        ("--rate-window", "20"): "window of rate policies would be without effect",
        ("--rate", "2", "--rate-bands", "1,1.5,3,4"): "got bands (--rate-bands), and rate 2, expected rate information",
        ("--rate", "information", "--most-loss", "0.2"): "got most_loss (--most-loss), and rate information",
        ("--rate", "auto", "--most-loss", "0.2"): "and rate information, expected rate learned",
        ("--rate", "learned", "--rate-measure", "unigram"): "expected rate information",
        ("--budget", "900", "--rate-window", "20"): "and rate budget",
        ("--guard-limit", "0.3"): "limit without a guard",
        (
            "--rate",
            "information",
            "--rate-bands",
            "1,2,3",
        ): "--rate-bands cannot be read: got 1,2,3, expected four rates",
        ("--rate", "information", "--rate-bands", "4,3,2,1"): "rise from dense to thin",
        ("--rate", "information", "--rate-bands", "thin"): "--rate-bands cannot be read",
        ("--rate", "information", "--rate-measure", "guess"): "setting measure makes no sense",
    }.items():
        done = run("ingest", "docs", "--storage", "s", *words, *models, code=2)
        assert said in done.stderr and done.stderr.startswith("error: ") and not (here / "s").exists(), words
    run("ingest", "docs", "--storage", "s", "--rate", "2", *models)
    assert "and rate 2" in run("ingest", "docs", "--storage", "s", "--rate-window", "40", code=2).stderr


def test_rates_and_budgets_that_make_no_sense_are_one_line(here: Path, models: tuple[str, ...]) -> None:
    for words, said in {
        ("--rate", "fast"): "auto, information, learned, budget",
        ("--also-rate", "2"): "--also-rate needs --rate",
        ("--rate", "2", "--budget", "40MB"): "chooses the rates itself",
        ("--budget", "many"): "40MB",
        ("--guard", "yes"): "off, exact, loss",
        ("--rate", "learned"): "train rates",
    }.items():
        done = run("ingest", "docs", "--storage", "s", *words, *models, code=2)
        assert said in done.stderr and done.stderr.startswith("error: ") and not (here / "s").exists()
    done = run("ingest", "docs", "--storage", "t", "--budget", "3", *models, code=2)
    assert "nothing fits this budget: got 3 positions, expected at least" in done.stderr
    fits = done.stderr.split("at least ")[1].split()[0]
    run("ingest", "docs", "--storage", "t", "--budget", fits, *models)
    assert json.loads(run("stats", "--storage", "t", "--json").stdout)["concepts"] == int(fits)
