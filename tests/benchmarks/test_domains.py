"""Kinds of text: passages and continuations, and the benchmark on toy texts."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import toy
from benchmarks.domains import pieces
from benchmarks.pages import domains as page
from compllm_rag.compressor import Compressor
from compllm_rag.training.material import is_held_out

ROOT = Path(__file__).parents[2]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))


def test_a_passage_and_what_follows_it_join_to_the_text(tmp_path: Path) -> None:
    compressor = Compressor(toy.llm())
    text = " ".join(toy.TEXT.split())
    write(tmp_path / "t.jsonl.gz", [{"id": "short", "text": "Too short."}, {"id": "a", "text": text}])
    (piece,) = pieces(compressor, tmp_path / "t.jsonl.gz", 5, context=60, length=10)
    assert piece.id == "a" and len(piece.rest) == 10
    ids = [token for segment in compressor.segmenter.split(piece.passage) for token in segment]
    assert 30 <= len(ids) <= 60
    decode = compressor.llm.tokenizer.decode
    assert decode([*ids, *piece.rest]).strip() in text or decode([*ids, *piece.rest]).strip()[:40] in text
    assert pieces(compressor, tmp_path / "t.jsonl.gz", 5, context=60, length=10) == [piece]


def test_it_runs_resumes_and_has_its_section(tmp_path: Path, toy_folder: Path) -> None:
    text = " ".join(toy.TEXT.split())
    write(tmp_path / "eval/squad_dev.jsonl.gz", [{"context": f"{n} {text}", "qas": []} for n in range(3)])
    name = next(name for name in map(str, range(1000)) if is_held_out(f"python_docs.jsonl.gz/{name}"))
    write(tmp_path / "text/python_docs.jsonl.gz", [{"id": "trained on", "text": text}, {"id": name, "text": text}])
    out = tmp_path / "domains.json"
    words = ["--llm", toy_folder, "--data-dir", tmp_path, "--context", 60, "--length", 8, "--rates", 2]
    command = [sys.executable, "-m", "benchmarks.domains", "--json", out, *words, "--domains", "squad"]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True, timeout=300)
    done = subprocess.run(list(map(str, [*command, "code"])), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "squad:" not in done.stderr and "code: 1 passages" in done.stderr
    record = json.loads(out.read_text())
    rows = record["domains"]["squad"]["rows"]
    assert [row["mode"] for row in rows] == ["text", "concepts", "pruned", "none"]
    assert rows[0]["positions"] > rows[1]["positions"] == rows[2]["positions"] > rows[3]["positions"]
    for row in rows:
        assert math.isclose(row["perplexity"], math.exp(row["nll"]))
        assert row["perplexity_interval"][0] <= row["perplexity"] <= row["perplexity_interval"][1]
    made = page.section(tmp_path, tmp_path)
    assert made is not None and "code documentation (Python) *" in made and "| text | – |" in made
    assert (tmp_path / "domains.png").stat().st_size > 1000
