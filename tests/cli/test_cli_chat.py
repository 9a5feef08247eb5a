"""`compllm-rag chat`: through a pipe, in a terminal, and what it says when something goes wrong."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import toy
from compllm_rag.cli.chat import Conversation, typed_lines
from compllm_rag.cli.main import app
from compllm_rag.errors import PromptTooLongError
from toy_embedder import save_sentence_transformer

QUESTIONS = ["Who built the lighthouse?", "When did she die?"]


@pytest.fixture(scope="module")
def storage(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    (folder / "rock.md").write_text(f"# Gull Rock\n\n{toy.TEXT}", encoding="utf-8")
    embedder = save_sentence_transformer(folder / "embedder", toy.TEXT)
    words = ["ingest", folder / "rock.md", "--storage", folder / "s", "--llm", toy_folder, "--embedder", embedder]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return folder / "s"


def piped(storage: Path, text: str | bytes, *options: object, code: int = 0):
    words = ["chat", "--storage", storage, "--max-new-tokens", 6, *options]
    result = CliRunner().invoke(app, [str(word) for word in words], input=text)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    assert "Traceback" not in result.output
    return result


def test_a_line_is_a_question_and_nothing_else_is_printed(storage: Path) -> None:
    both = piped(storage, "\n".join(QUESTIONS))
    first = piped(storage, QUESTIONS[0])
    assert both.stderr == first.stderr == ""
    assert first.stdout.strip() and both.stdout.startswith(first.stdout)
    assert piped(storage, "").stdout == ""
    assert piped(storage, f"\n{QUESTIONS[0]}\n  \n").stdout == first.stdout


def test_what_was_said_is_read_again_until_it_is_reset(storage: Path) -> None:
    options = ("--chat-mode", "context", "--top-k", 1)
    alone = piped(storage, QUESTIONS[1], *options).stdout
    after = piped(storage, "\n".join(QUESTIONS), *options).stdout
    before = piped(storage, QUESTIONS[0], *options).stdout
    reset = piped(storage, f"{QUESTIONS[0]}\n/reset\n{QUESTIONS[1]}\n", *options).stdout
    assert reset == before + alone
    assert after != reset


def test_sources(storage: Path) -> None:
    shown = piped(storage, f"/sources\n{QUESTIONS[0]}\n/sources\n", "--top-k", 2).stdout
    assert shown.startswith("no passages were read\n")
    line = r"\[%d\] Gull Rock \(score -?\d\.\d\d, \d+ tokens as \d+ concepts\)\n"
    assert re.search(line % 1 + line % 2 + "$", shown)
    assert "as text" in piped(storage, f"{QUESTIONS[0]}\n/sources\n", "--mode", "text").stdout
    assert piped(storage, f"{QUESTIONS[0]}\n/sources\n", "--chat-mode", "simple").stdout.endswith("were read\n")


def test_an_error_costs_one_line_and_the_rest_is_answered(storage: Path) -> None:
    good = piped(storage, QUESTIONS[0]).stdout
    long = "Who? " * 2000
    for bad, said in [
        (long.encode(), "do not fit the window"),
        (b"caf\xe9", "question cannot be read"),
        (b"/soruces", "no such command: got /soruces, expected /sources, /reset, /help"),
    ]:
        result = piped(storage, bad + b"\n" + QUESTIONS[0].encode() + b"\n", code=2)
        assert result.stdout == good
        [line] = result.stderr.splitlines()
        assert line.startswith("error: ") and said in line
    assert "/sources" in piped(storage, "/help").stdout
    piped(storage, "/etc/hosts is what?")


def test_options_that_make_no_sense(storage: Path, tmp_path: Path) -> None:
    for options, said in [
        (("--chat-mode", "react"), "LlamaIndex has removed this chat mode"),
        (("--chat-mode", "all"), "chat mode unknown"),
        (("--mode", "both"), "unknown mode"),
    ]:
        assert said in piped(storage, QUESTIONS[0], *options, code=2).stderr
    assert "no storage here" in piped(tmp_path / "none", QUESTIONS[0], code=2).stderr


# In a terminal


class Spoken:
    """An engine that says one thing, and is interrupted or fails."""

    def __init__(self, *pieces: str | BaseException) -> None:
        self.pieces, self.source_nodes, self.metadata = pieces, [], {}

    def stream_chat(self, message: str) -> Spoken:
        return self

    @property
    def response_gen(self):
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def test_an_interrupted_answer_does_not_end_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    Conversation(Spoken("Ada", KeyboardInterrupt()), terminal=True).take("Who?")
    assert capsys.readouterr().out == "Ada (interrupted)\n"
    with pytest.raises(KeyboardInterrupt):
        Conversation(Spoken(KeyboardInterrupt()), terminal=False).take("Who?")
    conversation = Conversation(Spoken(PromptTooLongError("too long")), terminal=True)
    conversation.take("Who?")
    assert conversation.failed
    assert capsys.readouterr().err == "error: too long\n"


def test_ctrl_c_begins_the_line_anew_and_ctrl_d_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["one", KeyboardInterrupt(), "two", EOFError(), "three"])

    def read(prompt: str) -> str:
        assert prompt == "> "
        now = next(typed)
        if isinstance(now, BaseException):
            raise now
        return now

    monkeypatch.setattr("builtins.input", read)
    assert list(typed_lines()) == ["one", "two"]


@pytest.mark.slow
def test_a_terminal(storage: Path) -> None:
    """A real one: an answer, one that is interrupted, its sources, and the end."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "compllm_rag.cli", "chat", "--storage", storage, "--max-new-tokens", "1500"]
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown = ""

    def until(*wanted: str) -> None:
        nonlocal shown
        seen, deadline = "", time.monotonic() + 120
        while not all(each in seen for each in wanted):
            assert time.monotonic() < deadline, shown
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 65536).decode(errors="replace")
        shown += seen

    try:
        until("/sources", "> ")
        # The answer may be over before the interrupt is there, which then begins the line anew: so ask again.
        for _ in range(10):
            os.write(ours, b"Who built the lighthouse?\n")
            begun = len(shown)
            while len(shown[begun:].partition("lighthouse?\r\n")[2]) < 3:
                shown += os.read(ours, 65536).decode(errors="replace")
            os.kill(process.pid, signal.SIGINT)
            until("> ")
            if "(interrupted)" in shown:
                break
        assert "(interrupted)" in shown
        os.write(ours, b"/sources\n")
        until("Gull Rock (score", "> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)
    assert "Traceback" not in shown


def test_budgets_and_rates_as_in_a_query(storage: Path) -> None:
    asked = f"{QUESTIONS[0]}\n/sources\n"
    everything = piped(storage, asked, "--top-k", 2).stdout
    # An error of one question costs one line; it says the least that would do.
    said = piped(storage, asked, "--top-k", 2, "--position-budget", 1, code=2).stderr
    least = re.search(r"position_budget of at least (\d+)", said)
    assert least is not None, said
    tight = piped(storage, asked, "--top-k", 2, "--position-budget", least[1], "--read-policy", "budgeted").stdout
    sizes = [sum(int(n) for n in re.findall(r"(\d+) (?:as text|concepts)", shown)) for shown in (everything, tight)]
    assert 0 < sizes[1] <= int(least[1]) < sizes[0]
    refused = piped(storage, "", "--read-policy", "none", code=2).stderr
    assert "unknown read policy" in refused and "fixed, budgeted" in refused
    # There are no passages whose positions could be counted.
    refused = piped(storage, "", "--chat-mode", "simple", "--position-budget", 12, code=2).stderr
    assert "simple has no such option: got position_budget" in refused
