"""The benchmark of chats, on a toy model; no speed is asserted."""

from __future__ import annotations

from pathlib import Path

import benchmarks
import loft_corpus
import toy


def test_turns_of_a_chat(tmp_path: Path, toy_folder: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(2):
        (tmp_path / "texts" / f"{number}.md").write_text(toy.TEXT * 3, encoding="utf-8")
    options = ["--llm", toy_folder, "--texts", tmp_path / "texts", "--turns", 3, "--top-k", 2, "--repeats", 1]
    record, _ = loft_corpus.run("chat", tmp_path / "o.json", *options, "--answer-words", 5)
    first, second, third = record["turns"]
    for way in ("text", "concepts"):
        assert [turn[way]["reused_positions"] for turn in record["turns"]] == [0, 0, 0]
        reused = [turn[f"{way}, reused"]["reused_positions"] for turn in record["turns"]]
        assert reused[0] == 0 < reused[1] < reused[2] < third[f"{way}, reused"]["prompt_positions"]
    assert first["text"]["prompt_positions"] < second["text"]["prompt_positions"]
    lines = benchmarks.page("chat").tables(record)
    assert lines[0] == "## Turns of a chat" and len([line for line in lines if line.startswith("| ")]) == 5 - 1
