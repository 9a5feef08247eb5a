"""Files to documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compllm_rag.errors import ConfigurationError, CorpusPathError, UnreadableFileError
from compllm_rag.llamaindex.documents import load_documents


def test_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.md").write_text("intro\n# The heading\ntext", encoding="utf-8")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfplain")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    rows = [{"id": 7, "title": "Seven", "text": "t"}, {"id": "x", "text": "u"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = list(load_documents([tmp_path]))
    assert [(d.id_, d.metadata["title"], d.text) for d in found] == [
        ("a.txt", "a", "plain"),
        ("7", "Seven", "t"),
        ("x", "", "u"),
        ("b/one.md", "The heading", "intro\n# The heading\ntext"),
    ]
    assert "source" not in found[0].get_content(metadata_mode="llm")
    assert [d.id_ for d in load_documents([tmp_path / "a.txt"])] == ["a.txt"]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CorpusPathError, match="missing"):
        list(load_documents([tmp_path / "missing"]))
    (tmp_path / "dangling.md").symlink_to(tmp_path / "gone")
    with pytest.raises(CorpusPathError):
        list(load_documents([tmp_path / "dangling.md"]))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "dangling.md").symlink_to(tmp_path / "gone")
    with pytest.raises(UnreadableFileError, match="dangling"):
        list(load_documents([tmp_path / "folder"]))
    for name, data, said in [
        ("latin.txt", b"caf\xe9", "byte 3"),
        ("bad.jsonl", b'{"id": 1, "text": "a"}\n{"id": 2}\n', "line 2"),
        ("list.jsonl", b"[1]\n", "line 1"),
        ("number.jsonl", b'{"id": 1, "text": 5}\n', "line 1"),
        ("null.jsonl", b'{"id": null, "text": "a"}\n', "line 1"),
        ("half.jsonl", b'{"id": 1, "text": "a"}\n\n{"id": 2, "text": "\\ud800"}\n', "line 3: a lone surrogate"),
        ("half-title.jsonl", b'{"id": 2, "title": "\\ud800", "text": "b"}\n', "line 1: a lone surrogate"),
        ("book.pdf", b"%PDF", "not supported"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UnreadableFileError, match=said):
            list(load_documents([tmp_path / name]))


def test_two_documents_of_one_id(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"id": 1, "text": "x"}\n')
    with pytest.raises(ConfigurationError, match=r"a\.jsonl:1.*b\.jsonl:1"):
        list(load_documents([tmp_path]))
