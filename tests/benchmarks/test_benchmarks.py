"""Every benchmark runs on a toy model within seconds and writes what its report needs; no speed is asserted."""

from __future__ import annotations

import gzip
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks
import loft_corpus
import toy
from benchmarks import cells, report
from benchmarks.cells import measured
from compllm_rag.errors import ConfigurationError
from training_samples import write_world

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(3):
        text = "\n\n".join(f"{paragraph} This is copy {number}." for paragraph in toy.TEXT.split("\n\n"))
        (folder / f"{number}.md").write_text(text, encoding="utf-8")
    return folder


def run(name: str, out: Path, *options: object) -> dict:
    words = list(map(str, options))
    record, _ = loft_corpus.run(name, out, *words)
    assert record["command"] == shlex.join(["compllm-rag", "bench", name, *words])
    assert record["environment"]["versions"]["torch"]
    assert "|---|" in "\n".join(benchmarks.page(name).tables(record))
    return record


@pytest.mark.parametrize("codec", ["deep", "input"])
def test_ingest(codec: str, tmp_path: Path, toy_folder: Path, texts: Path) -> None:
    words = ["--llm", toy_folder, "--texts", texts, "--sizes", 300, 600, "--repeats", 1]
    record = run("ingest", tmp_path / "o.json", *words, *([] if codec == "deep" else ["--codec", codec]))
    assert (record["entry_layer"], record["rate"]) == ((1, 1.0) if codec == "deep" else (0, 2.0))
    assert list(record["sizes"]) == ["300", "600"]
    for size, row in record["sizes"].items():
        assert row["source_tokens"] <= int(size) + 300
        assert row["ensure_over_bare"]["median"] > 0
    assert record["sizes"]["600"]["segments"] > record["sizes"]["300"]["segments"]


@pytest.mark.parametrize("codec", ["deep", "input"])
def test_query(codec: str, tmp_path: Path, toy_folder: Path, texts: Path) -> None:
    words = ["--llm", toy_folder, "--texts", texts, "--lengths", 300, 700, "--repeats", 1]
    record = run("query", tmp_path / "o.json", *words, *([] if codec == "deep" else ["--codec", codec]))
    assert record["codec"] == codec
    for context in record["contexts"].values():
        text, two, four = (context[k] for k in ("text", "concepts at rate 2", "concepts at rate 4"))
        assert text["prompt_positions"] > two["prompt_positions"] > four["prompt_positions"]
        assert text["ttft_over_text"]["median"] == 1
        for row in (text, two, four):
            assert row["ttft_s"] >= row["prefill_s"] > 0


def test_startup(tmp_path: Path) -> None:
    record = run("startup", tmp_path / "o.json", "--repeats", 1)
    assert set(record["median_s"]) == {"empty process", "import compllm_rag", "compllm-rag --help"}


def test_store_read(tmp_path: Path) -> None:
    sizes = ["--concepts", "300", "--width", "65", "--small-width", "33", "--small-chunks", "12", "--repeats", "1"]
    record = run("store_read", tmp_path / "o.json", *sizes)
    assert record["bytes"] == 2 * 65 * record["concepts"] and 300 <= record["concepts"] < 420
    for state in ("warm", "cold"):
        assert set(record[state]) > {"flat file", "store", "diskcache alone", "one file per chunk", "store, int4"}
        assert record[state]["flat file"]["speed_over_flat"]["median"] == 1
    assert record["ten_chunks"]["int8"]["warm"]["median_ms"] > 0


def test_commits(tmp_path: Path) -> None:
    sizes = ["--vectors", "400", "--dim", "8", "--uploads", "12", "--uploads-before", "3", "--seconds", "0.3"]
    record = run("commits", tmp_path / "o.json", *sizes, "--every", "0.05")
    log, file = record["commits"]["log"], record["commits"]["file"]
    assert (log["vector_files_written"], file["vector_files_written"]) == (0, 3)
    assert log["vector_bytes_per_upload"] * 10 < file["vector_bytes_per_upload"]
    for name, found in record["searches"].items():
        assert found["searches"] > 0 and (found["uploads"] > 0) == (not name.startswith("alone"))
        assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["most_ms"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("data"), rows=40)
    (folder / "eval").mkdir()
    rows = [
        {
            "id": str(i),
            "context": toy.TEXT[i * 40 : i * 40 + 200],
            "question": "Who?",
            "answers": ["Ada"],
            "options": ["Ada", "Tom"],
        }
        for i in range(6)
    ]
    for name in ("squad_dev", "race_dev"):
        with gzip.open(folder / "eval" / f"{name}.jsonl.gz", "wt") as file:
            file.write("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.mark.parametrize("codec", ["deep", "input"])
def test_quality_and_its_report(tmp_path: Path, toy_folder: Path, world: Path, codec: str) -> None:
    deep = codec == "deep"
    out = tmp_path / "results" / ("quality_deep" if deep else "quality")
    words = ["--llm", toy_folder, "--data-dir", world, "--out", out, "--codec", codec]
    words += ["--sets", "squad", "race", "probes", "--limit", "5", "--rates", *(["1"] if deep else []), "2", "4"]
    record, _ = loft_corpus.run("quality", tmp_path / "all.json", *words)
    squad = json.loads((out / "squad.json").read_text())
    assert [(r["mode"], r["rate"]) for r in squad["results"]] == [
        ("text", None), *([("concepts", 1.0)] if deep else []), ("concepts", 2.0), ("concepts", 4.0),
        *([("random", 2.0), ("random", 4.0)] if deep else []), ("pruned", 2.0), ("pruned", 4.0), ("none", None),
    ]  # fmt: skip
    if deep:
        costs = {(r["mode"], r["rate"]): r["prefill_cost"] for r in squad["results"]}
        assert (costs["text", None], costs["concepts", 1.0], costs["none", None]) == (1.0, 0.5, None)
        assert costs["concepts", 2.0] == costs["random", 2.0] == pytest.approx(costs["pruned", 2.0] / 2, abs=1e-4)
        assert squad["results"][2]["nll"] != squad["results"][4]["nll"]
    race = json.loads((out / "race.json").read_text())["results"][0]
    assert race["f1"] is None and race["accuracy"] is not None
    again, told = loft_corpus.run("quality", tmp_path / "all.json", *words)
    assert told.count("done before") == 3 and again == record and again["squad"] == squad
    report.main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")])
    page = (tmp_path / "docs/quality.md").read_text()
    title = "Deep concepts" if deep else "Concepts at the input embeddings"
    named = f"{title} of {squad['llm']}" if deep else title  # an LLM other than the default is named
    assert f"## {named}, SQuAD v1.1 dev" in page and f"## {named}, fidelity probes" in page and "5 questions" in page
    assert ("| prefill cost |" in page) == deep
    assert f"| {squad['results'][0]['nll']:.2f} [" in page
    change = squad["results"][1]["paired"]["f1"]
    low, high = change["interval"]
    assert f"| {change['difference']:+.1f} [{low:+.1f}, {high:+.1f}] |" in page
    assert "Δaccuracy" in page and "Not run yet" in (tmp_path / "docs/benchmarks.md").read_text()
    assert (tmp_path / f"docs/{out.name}.png").read_bytes()[:4] == b"\x89PNG"


def test_ttft_of_deep_concepts(tmp_path: Path, toy_folder: Path, texts: Path) -> None:
    options = ["--llm", toy_folder, "--texts", texts, "--lengths", 300, 600, "--rates", 1, 2, "--repeats", 1]
    options += ["--memory", "none"]
    record = run("ttft_deep", tmp_path / "o.json", *options)
    assert (record["entry_layer"], record["depth"]) == (1, 2)
    for found in record["lengths"].values():
        text, one, two = found["rows"]
        assert text["positions"] == one["positions"] > two["positions"]
        assert text["kv_bytes"] > one["kv_bytes"] > two["kv_bytes"]
        assert one["ttft_over_bound"]["median"] > 0 and text["ttft_over_bound"] is None
    assert set(record["ingestion"]["bare_over_compress"]) == {"rate 1", "rate 2"}
    with pytest.raises(ConfigurationError, match="measures deep concepts"):
        loft_corpus.run("ttft_deep", tmp_path / "p.json", *map(str, options), "--codec", "input")


def test_storage_and_its_page(tmp_path: Path, toy_folder: Path, texts: Path, world: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    llm = ["--llm", str(toy_folder)]
    sizes = run("storage_size", results / "storage_size.json", "--texts", texts, "--llms", toy_folder, "--lengths", 50)
    found = sizes["llms"][toy_folder.name]
    assert found["cache"]["per_token"] == {"50": 2 * 2 * 2 * 8 * 2}
    for row in found["rates"].values():
        shares = [row["encodings"][name]["payload_of_fp16"] for name in ("fp16", "int8", "int4")]
        assert shares == [1, 36 / 64, 21 / 64]
    page = tmp_path / "docs" / "storage.md"
    words = ["--results", str(results), "--docs", str(page.parent)]
    report.main(words)
    assert "| fp16 |" in page.read_text() and "recovered" not in page.read_text()
    data = ["--data", str(world / "eval" / "squad_dev.jsonl.gz"), "--limit", "4"]
    deep = run("storage_quality", results / "storage_quality_deep.json", *llm, *data)
    assert [(r["rate"], r["encoding"]) for r in deep["results"]] == [
        (rate, name) for rate in (1, 2) for name in ("fp16", "int8", "int4")
    ]
    # A state of 32 values and its place: 2 bytes each; four outliers of 4 bytes, a unit of 4, and a byte each.
    assert [r["bytes_per_token"] for r in deep["results"][:2]] == [66, 2 + 16 + 4 + 32]
    assert len({r["nll"] for r in deep["results"]}) == 6 and deep["results"][0]["to_fp16"]["f1"]["difference"] == 0
    quality = run("storage_quality", results / "storage_quality.json", *llm, *data, "--codec", "input", "--rates", "2")
    rows = {row["encoding"]: row for row in quality["results"]}
    assert rows["fp16"]["to_fp16"]["f1"] == {"difference": 0, "interval": [0, 0]}
    assert len({row["nll"] for row in rows.values()}) == 3
    report.main(words)
    assert f"| 2 | int4 | {rows['int4']['bytes_per_token']:.0f} | {rows['int4']['nll']:.4f} |" in page.read_text()
    assert "## What fewer bits cost deep concepts" in page.read_text()
    report.main([*words, "--check"])
    page.write_text(page.read_text().replace("fp16", "fp17"))
    with pytest.raises(SystemExit, match=r"storage\.md not as the JSON files give"):
        report.main([*words, "--check"])


def test_committed_pages_are_what_committed_results_give() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_ablations(tmp_path: Path, toy_folder: Path, world: Path) -> None:
    chosen = ["--choices", "as shipped: anchors, KL, 12 layers", "reader trained along", "paper's queries: EOS"]
    options = ["--llm", toy_folder, "--data-dir", world, "--out", tmp_path / "runs", "--steps", "2", "--batch", "2"]
    record = run("ablations", tmp_path / "o.json", *options, "--max-context", 80, "--validation", 2, *chosen)
    pruning, *rows = record["rows"]
    assert pruning["steps"] == 0 and [row["steps"] for row in rows] == [2, 2, 2]
    assert len({row["nll_concepts@2"] for row in rows}) == 3
    again, told = loft_corpus.run(
        "ablations", tmp_path / "o.json", *map(str, options), "--max-context", 80, "--validation", 2, *chosen
    )
    assert again["rows"] == record["rows"] and told.count("done before") == 3
    with pytest.raises(ConfigurationError, match="is of another run: got max_context 80, steps 2"):
        loft_corpus.run("ablations", tmp_path / "o.json", *map(str, options), "--steps", 3)


def test_anchors(tmp_path: Path, toy_folder: Path, world: Path) -> None:
    options = ["--llm", toy_folder, "--data-dir", world, "--groups", "2", "--rates", "2"]
    rows = run("anchors", tmp_path / "o.json", *options)["rows"]
    assert len({row["nll_text"] for row in rows}) == 1 and len({row["nll_pruned@2"] for row in rows}) > 1


def test_a_section_names_weights_that_no_longer_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "ADAPTERS", tmp_path)
    for kind, record in (("deep", {"fingerprint": "abc" * 20}), ("reader", {"r": 4})):
        (tmp_path / "alias" / kind).mkdir(parents=True)
        (tmp_path / "alias" / kind / "config.json").write_text(json.dumps(record))
    record = {"command": "compllm-rag bench x", "environment": {"commit": "1" * 40}, "llm": "alias"}
    now, before = record | {"fingerprint": "abc" * 20}, record | {"fingerprint": "cba" * 20}
    assert measured(now) == measured(record) == "`compllm-rag bench x`, commit 111111111"
    assert measured(before) == f"{measured(now)}, by weights `cbacbacb`, which are not those that ship now"
    assert measured(before | {"llm": "another"}) == measured(now), "nothing ships for it"
