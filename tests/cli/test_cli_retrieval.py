"""`query --retrieval` and `query --filter`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import toy
from compllm_rag.cli.filters import parse_filters
from compllm_rag.cli.main import app
from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.filters import matches
from toy_embedder import save_sentence_transformer


@pytest.fixture(scope="module")
def storage(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filters")
    embedder = save_sentence_transformer(folder / "embedder", toy.TEXT)
    lines = [
        {"id": "rock", "title": "Gull Rock", "text": toy.TEXT, "year": 1871},
        {"id": "boat", "title": "Boat", "text": "The museum keeps a boat named XK-4711.", "year": "1950"},
    ]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    run("ingest", folder / "texts.jsonl", "--storage", folder / "s", "--llm", toy_folder, "--embedder", embedder)
    return folder / "s"


def run(*words: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def asked(storage: Path, *options: str, question: str = "XK-4711?") -> list[str]:
    words = ("query", question, "--storage", storage, "--max-new-tokens", 1, "--top-k", 9, "--json", *options)
    return sorted({source["doc_id"] for source in json.loads(run(*words).stdout)["sources"]})


@pytest.mark.parametrize("retrieval", ["vector", "bm25", "hybrid"])
def test_query_looks_as_it_is_told(storage: Path, retrieval: str) -> None:
    everything = ["boat"] if retrieval == "bm25" else ["boat", "rock"]
    assert asked(storage, "--retrieval", retrieval) == everything
    assert asked(storage, "--retrieval", retrieval, "--filter", "title=Boat") == ["boat"]
    assert asked(storage, "--retrieval", retrieval, "--filter", "title=boat") == []


def test_query_refuses_other_ways(storage: Path) -> None:
    refused = run("query", "x", "--storage", storage, "--retrieval", "sparse", code=2)
    assert refused.stderr.startswith("error: unknown way of retrieval: got sparse")
    refused = run("query", "x", "--storage", storage, "--filter", "title", code=2)
    assert "KEY=VALUE" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "metadata", "passes"),
    [
        ("year=1871", {"year": 1871}, True),
        ("year=1871", {"year": "1871"}, True),
        ('year="1871"', {"year": 1871}, False),
        ("year!=1871", {"year": "1871"}, False),
        ("year!=1871", {}, True),
        ("year >= 1870", {"year": 1871}, True),
        ("year<1871", {"year": 1871}, False),
        ("date>=2024-05-01", {"date": "2024-10-01"}, True),
        ("draft=true", {"draft": True}, True),
        ("draft=false", {"draft": True}, False),
        ("title~LIGHT", {"title": "The lighthouse"}, True),
        ("url=https://x.org/?a=b", {"url": "https://x.org/?a=b"}, True),
        ("title=", {"title": ""}, True),
        ("name=nan", {"name": "nan"}, True),
    ],
)
def test_filters_as_typed(text: str, metadata: dict[str, Any], passes: bool) -> None:
    parsed = parse_filters([text])
    assert parsed is not None and matches(parsed, metadata, "d") is passes


def test_several_filters_all_hold() -> None:
    parsed = parse_filters(["a=1", "b=2"])
    assert parsed is not None
    assert matches(parsed, {"a": 1, "b": 2}, "d") and not matches(parsed, {"a": 1}, "d")
    assert parse_filters([]) is None


@pytest.mark.parametrize("text", ["title", "=x", " =x", ">3", ""])
def test_what_is_no_filter_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="KEY=VALUE"):
        parse_filters([text])
