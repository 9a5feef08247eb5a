"""A toy corpus in the layouts that the LOFT benchmarks read, and a way to run them."""

from __future__ import annotations

import gzip
import io
import json
from contextlib import redirect_stderr
from pathlib import Path

import benchmarks
import toy
import toy_embedder


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def official(folder: Path, name: str, queries: list[dict]) -> Path:
    made = folder / "rag" / name / "32k"
    corpus = [{"pid": f"p{i}", "title_text": f"T{i}", "passage_text": f"Text {i}. ", "metadata": {}} for i in range(3)]
    write(made / "corpus.jsonl", corpus)
    write(made / "dev_queries.jsonl", queries)
    return made


def reconstructed(folder: Path) -> Path:
    """Six documents, four questions and a toy embedder."""
    parts = [toy.TEXT[i * 60 : i * 60 + 60] for i in range(6)]
    corpus = [{"id": str(i), "title": f"T{i}", "text": part} for i, part in enumerate(parts)]
    queries = [
        {"id": f"q{i}", "question": " ".join(parts[i].split()[1:5]), "answers": ["Ada"], "gold_doc_ids": [str(i)]}
        for i in range(4)
    ]
    write(folder / "eval/loft_nq_128k/corpus.jsonl.gz", corpus)
    write(folder / "eval/loft_nq_128k/queries.jsonl.gz", queries)
    toy_embedder.save_sentence_transformer(folder / "embedder", toy.TEXT)
    return folder


def run(name: str, out: Path, *words: object) -> tuple[dict, str]:
    """What a benchmark writes, and its progress; in this process, because starting one takes longer than the run."""
    told = io.StringIO()
    with redirect_stderr(told):
        record = benchmarks.benchmark(name).main(["--json", str(out), *map(str, words)])
    made: dict = json.loads(out.read_text())
    assert json.loads(json.dumps(record)) == made
    return made, told.getvalue()


def options(data: Path, toy_folder: Path) -> list[object]:
    return ["--llm", toy_folder, "--data-dir", data, "--embedder", data / "embedder" / "model", "--storage", data / "s"]
