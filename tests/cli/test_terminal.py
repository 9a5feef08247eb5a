"""Whatever the terminal: answers are printed, questions come from standard input, the storage from the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from compllm_rag.cli import main as cli
from compllm_rag.cli.main import app
from tests.models.wheels import ROOT

HARD = "naïve 灯台 🙂 \ud800"
ENCODINGS = ["ascii", "latin-1", "cp1252", "utf-8"]


def python(*words: str, encoding: str) -> subprocess.CompletedProcess[bytes]:
    environment = {
        **os.environ,
        "PYTHONIOENCODING": encoding,
        "LC_ALL": "C",
        "PYTHONPATH": str(ROOT),
        "PYTHONUTF8": "0",
    }
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, timeout=120, check=False)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_encoding_loses_an_answer(encoding: str) -> None:
    code = f"""
import typer
from compllm_rag.cli.base import print_json
from compllm_rag.cli.terminal import print_anything
print_anything()
typer.echo({ascii(HARD)})
typer.echo({ascii(HARD)}, err=True)
print_json({{"answer": {ascii(HARD)}}})
"""
    done = python("-c", code, encoding=encoding)
    assert done.returncode == 0, done.stderr
    # click takes a stream of ASCII for one of UTF-8 that is set up badly.
    known = "utf-8" if encoding == "ascii" else encoding
    text, answer = done.stdout.decode(known).splitlines()
    assert text.startswith("naïve ")
    assert ("灯台" in text) == (known == "utf-8")
    assert json.loads(answer) == {"answer": HARD}
    assert len(done.stderr.decode(known).splitlines()) == 1


def test_the_command_itself_prints_where_there_is_only_ascii(tmp_path: Path) -> None:
    folder = tmp_path / "灯台"
    done = python("-m", "compllm_rag.cli", "verify", str(folder), encoding="ascii")
    assert done.returncode == 2
    (line,) = done.stderr.decode("utf-8").splitlines()
    assert line.startswith("error: there is no storage here")
    assert "Traceback" not in line


def test_the_version_is_told() -> None:
    from compllm_rag import __version__

    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.stdout.startswith(f"compllm-rag {__version__}")
    assert "--show-completion" in CliRunner().invoke(app, ["--help"]).stdout


class Asked(Exception):
    pass


def asked(words: list[str], monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[str, Path] | str:
    """The question and the storage that a query is answered from, or the one line that refuses it."""
    found: list[tuple[str, Path]] = []

    def index(storage: Path, **rest: object) -> None:
        found.append((seen[0], storage))
        raise cli.ConfigurationError("stop here", got="a test", expected="no more")

    seen: list[str] = []
    read = cli.question_of
    monkeypatch.setattr(cli, "question_of", lambda question: seen.append(read(question)) or seen[0])
    monkeypatch.setattr(cli, "_index", index)
    done = CliRunner().invoke(app, ["query", *words], **options)
    assert done.exit_code == 2, done.output
    return found[0] if found else done.stderr


def test_a_question_comes_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    question = "Who built it, 灯台?"
    assert asked(["-", "--storage", "s"], monkeypatch, input=f"{question}\n") == (question, Path("s"))


@pytest.mark.parametrize(
    ("data", "trouble"), [(b"", "holds no question"), (b" \n", "holds no question"), (b"a\xff", "0xff")]
)
def test_standard_input_without_a_question_is_refused(
    data: bytes, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = asked(["-", "--storage", "s"], monkeypatch, input=data)
    assert isinstance(told, str)
    assert trouble in told


def test_the_storage_comes_from_the_environment_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPLLM_STORAGE", "mine")
    assert asked(["Who?"], monkeypatch) == ("Who?", Path("mine"))
    assert asked(["Who?", "--storage", "other"], monkeypatch) == ("Who?", Path("other"))
    for words in (["stats"], ["verify"], ["compact"], ["migrate"], ["repair"], ["namespace", "list"]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2, words
        assert "no storage" in done.stderr
        assert "mine" in done.stderr
    monkeypatch.delenv("COMPLLM_STORAGE")
    assert "Missing option '--storage'" in CliRunner().invoke(app, ["stats"]).output


def test_every_command_on_a_storage_takes_it_from_the_environment() -> None:
    def commands(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
        for word, command in getattr(group, "commands", {}).items():
            yield f"{name} {word}".strip(), command
            yield from commands(command, f"{name} {word}".strip())

    found = {
        name: parameter.envvar
        for name, command in commands(typer.main.get_command(app))
        for parameter in command.params
        if parameter.name == "storage"
    }
    assert {"ingest", "query", "chat", "import-index", "stats", "verify"} <= set(found)
    # The demo makes a storage of its own, which must not be somebody's; the others name it beside a file.
    assert {name for name, variable in found.items() if variable != "COMPLLM_STORAGE"} == {"demo", "export", "import"}
