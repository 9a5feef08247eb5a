"""`compllm-rag eval` and `probe`, as a newcomer meets them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import toy
from compllm_rag.cli.main import app
from compllm_rag.models.llm import TargetLLM
from trained import trained_deep

KEYS = (
    "data mode rate narrowing llm seed n em f1 subspan_em accuracy nll recovered agreement positions achieved_rate "
    "prefill_cost intervals paired skipped seconds"
)
PROBE = "mode rate llm seed n positions achieved_rate kinds depths text seconds"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rock.jsonl"
    asked = [
        {"id": "a", "question": "Who built the lighthouse?", "answers": ["Ada Marsh"]},
        {"id": "b", "question": "Is it tall?", "answers": ["yes"], "options": ["yes", "no"]},
        {"id": "c", "question": "", "answers": ["nothing"]},
    ]
    path.write_text(json.dumps({"id": "r", "title": "Gull Rock", "context": toy.TEXT, "qas": asked}))
    return path


def run(*words: object, code: int = 0):
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def refused(*words: object) -> str:
    errors = [line for line in run(*words, code=2).stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize("mode", ["text", "concepts"])
def test_eval_json(data: Path, toy_folder: Path, tmp_path: Path, mode: str) -> None:
    records = tmp_path / "records.jsonl"
    options = ("--llm", toy_folder, "--mode", mode, "--max-new-tokens", 3, "--records", records, "--json")
    found = json.loads(run("eval", "--data", data, *options).stdout)
    assert list(found) == KEYS.split()
    compressed = mode == "concepts"
    assert (found["data"], found["mode"], found["rate"]) == ("rock.jsonl", mode, 1.0 if compressed else None)
    assert (found["achieved_rate"], found["prefill_cost"]) == ((1.0, 0.5) if compressed else (None, 1.0))
    assert (found["n"], found["skipped"]) == (2, {"count": 1, "first": ["c: no question"]})
    assert found["accuracy"] in (0, 100)
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert {line["id"] for line in lines} == {"a", "b"}
    assert {"mode", "rate", "answer", "f1", "em", "nll", "n_tokens"} <= set(lines[0])


def test_eval_goes_on_from_its_journal(data: Path, toy_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    words = ("eval", "--data", data, "--llm", toy_folder, "--no-generate", "--json", "--journal", path)
    first, kept = json.loads(run(*words).stdout), path.read_bytes()
    assert kept.count(b"\n") == 3  # concepts, and text and none beside them
    assert json.loads(run(*words).stdout) == first and path.read_bytes() == kept
    run(*words, "--mode", "text")
    assert path.read_bytes() == kept
    assert "is no finished part of a run" in refused(*words[:-1], data)


def test_eval_without_answers(data: Path, toy_folder: Path) -> None:
    found = json.loads(run("eval", "--data", data, "--llm", toy_folder, "--no-generate", "--json").stdout)
    assert (found["em"], found["f1"], found["agreement"]) == (None, None, None)
    assert found["nll"] > 0


def test_eval_table(data: Path, toy_folder: Path) -> None:
    shown = run("eval", "--data", data, "--llm", toy_folder, "--max-new-tokens", 3, "--rate", 4).stdout
    assert "concepts at rate 4 (achieved 3." in shown
    for word in ("em", "f1", "nll", "agreement", "positions", "left out: 1, such as c: no question"):
        assert f"\n{word}" in shown


def test_probe(toy_folder: Path, tmp_path: Path) -> None:
    options = ("--llm", toy_folder, "--limit", 12, "--max-new-tokens", 2)
    records = tmp_path / "records.jsonl"
    found = json.loads(run("probe", *options, "--json", "--records", records).stdout)
    assert list(found) == PROBE.split()
    assert sum(kind["n"] for kind in found["kinds"].values()) == 12
    assert {json.loads(line)["kind"] for line in records.read_text().splitlines()} == set(found["kinds"])
    shown = run("probe", *options, "--mode", "text").stdout
    assert shown.startswith("text, 12 probes")
    assert all(f"\n{kind}" in shown for kind in found["kinds"])


def test_errors_are_one_line(data: Path, toy_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"context": "x"\n')
    useless = tmp_path / "useless.jsonl"
    useless.write_text('{"id": "u", "context": "x", "question": "y"}\n')
    model = ("--llm", toy_folder)
    assert "cannot be read: got" in refused("eval", "--data", tmp_path / "none.jsonl", *model)
    assert "after line 1 (JSONDecodeError)" in refused("eval", "--data", broken, *model)
    assert "no usable question" in refused("eval", "--data", useless, *model)
    assert "unknown mode: got gist" in refused("eval", "--data", data, "--mode", "gist", *model)
    assert "unknown choice of passages" in refused("eval", "--data", data, "--passages", "few", *model)
    assert "out of reach" in refused("eval", "--data", data, "--rate", 99, *model)
    for command in (("eval", "--data", data), ("probe",)):
        assert "mode text has no compression rate" in refused(*command, "--mode", "text", "--rate", 2, *model)
    compressor = trained_deep(TargetLLM.from_pretrained(str(toy_folder))).save_pretrained(tmp_path / "deep")
    for words in (("--codec", "input"), ("--entry-layer", 3)):
        assert "the compressor has another" in refused(
            "eval", "--data", data, "--compressor", compressor, *words, *model
        )
    assert "records cannot be written" in refused("probe", "--records", tmp_path / "no" / "r.jsonl", *model)
    for command in (("eval", "--data", data), ("probe",)):
        assert "expected a file" in refused(*command, "--records", tmp_path, *model)
    damaged = tmp_path / "damaged.jsonl.gz"
    packed = bytearray(gzip.compress(data.read_bytes() * 200))
    packed[len(packed) // 2 : len(packed) // 2 + 3] = b"\xff\xff\xff"
    damaged.write_bytes(packed)
    assert "cannot be read: got" in refused("eval", "--data", damaged, *model)


def test_results_are_shown_though_their_records_cannot_be_kept(
    toy_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str, **options: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    words = ("--llm", toy_folder, "--reader", "none", "--records", tmp_path / "r.jsonl", "--max-new-tokens", 2)
    for command in (("eval", "--data", data), ("probe", "--limit", 4)):
        done = CliRunner().invoke(app, [str(w) for w in (*command, *words, "--json")])
        assert done.exit_code == 2 and "No space left on device" in done.stderr
        assert "f1" in done.stdout
