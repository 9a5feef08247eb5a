"""`--generator`: commands that ask a vLLM server, and what they say when it is not what it should be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import toy
from compllm_rag.cli.main import app
from compllm_rag.models.llm import TargetLLM
from tests.vllm_servers import FakeVLLM
from toy_embedder import save_sentence_transformer

QUESTION = "Who built the lighthouse?"


@pytest.fixture(scope="module")
def folder(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storages `input` and `deep`, by their codec."""
    made = tmp_path_factory.mktemp("vllm")
    (made / "rock.md").write_text(f"# Gull Rock\n\n{toy.TEXT}", encoding="utf-8")
    embedder = save_sentence_transformer(made / "embedder", toy.TEXT)
    for codec in ("input", "deep"):
        models = ("--llm", toy_folder, "--embedder", embedder, "--codec", codec)
        run("ingest", made / "rock.md", "--storage", made / codec, *models)
    return made


@pytest.fixture(scope="module")
def server(toy_folder: Path) -> Iterator[FakeVLLM]:
    with FakeVLLM(TargetLLM.from_pretrained(toy_folder)) as made:
        yield made


def run(*words: object, code: int = 0, **options: Any) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words], **options)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    assert "Traceback" not in result.output
    return result


def query(storage: Path, *words: object, code: int = 0, **options: Any) -> Any:
    return run("query", QUESTION, "--storage", storage, "--max-new-tokens", 8, *words, code=code, **options)


def test_a_query_is_answered_by_the_server(folder: Path, server: FakeVLLM) -> None:
    address = f"vllm:{server.url}"
    for mode in ("concepts", "text"):
        before = len(server.streamed)
        there, here = (
            json.loads(query(folder / "input", "--mode", mode, "--json", *words).stdout)
            for words in (("--generator", address), ())
        )
        assert (there["answer"], there["finish_reason"]) == (here["answer"], here["finish_reason"])
        assert there["prompt_positions"] == here["prompt_positions"] and there["ttft_s"] > 0
        [body] = server.streamed[before:]
        assert ("prompt_embeds" in body) == (mode == "concepts")
    told = query(folder / "input", "--stream", env={"COMPLLM_GENERATOR": address})
    assert "first token after" in told.stdout and len(server.streamed) == before + 2


def test_deep_concepts_need_another_way(folder: Path, server: FakeVLLM) -> None:
    address = f"vllm:{server.url}"
    told = query(folder / "deep", "--generator", address, code=2).stderr
    assert "mode text" in told and "--codec input" in told
    assert query(folder / "deep", "--generator", address, "--mode", "text").stdout


def test_a_chat_is_answered_by_the_server(folder: Path, server: FakeVLLM) -> None:
    words = ("chat", "--storage", folder / "input", "--max-new-tokens", 6)
    there = run(*words, "--generator", f"vllm:{server.url}", input=f"{QUESTION}\nWhen did she die?\n")
    assert there.stdout == run(*words, input=f"{QUESTION}\nWhen did she die?\n").stdout


def test_what_is_wrong_is_said_in_a_line(folder: Path, server: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "vllm:http://HOST:PORT" in query(folder / "input", "--generator", server.url, code=2).stderr
    assert "no such generator" in run("serve", folder / "input", "--generator", "tgi:http://a", code=2).stderr
    monkeypatch.setattr(server, "served", {"a": 512, "b": 512})
    assert "a, b" in query(folder / "input", "--generator", f"vllm:{server.url}", code=2).stderr
    assert query(folder / "input", "--generator", f"vllm:{server.url}#a").stdout
    monkeypatch.setattr(server, "llm", toy.llm(seed=1))
    assert "models export" in query(folder / "input", "--generator", f"vllm:{server.url}#a", code=2).stderr
