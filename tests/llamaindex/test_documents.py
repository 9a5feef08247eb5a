"""Files to documents: what comes in, what is left out and said."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from compllm_rag.errors import CorpusPathError, EmptyCorpusError
from compllm_rag.llamaindex.documents import FileDocuments, load_documents, some


def told(documents: FileDocuments) -> dict[str, tuple[str, str]]:
    return {Path(s.path).name: (s.kind, s.reason) for s in documents.skipped}


def test_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.md").write_text("intro\n# The heading\ntext", encoding="utf-8")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfplain")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    rows = [{"id": 7, "title": "Seven", "text": "t"}, {"id": "x", "text": "u"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    documents = load_documents([tmp_path])
    found = list(documents)
    assert [(d.id_, d.metadata["title"], d.text) for d in found] == [
        ("a.txt", "a", "plain"),
        ("7", "Seven", "t"),
        ("x", "", "u"),
        ("b/one.md", "The heading", "intro\n# The heading\ntext"),
    ]
    assert told(documents) == {"picture.png": ("unknown", "kind of file is not read: .png")}
    assert documents.bytes_read == documents.bytes_total > 0
    assert "source" not in found[0].get_content(metadata_mode="llm")
    assert [d.id_ for d in load_documents([tmp_path / "a.txt"])] == ["a.txt"]
    assert [d.id_ for d in load_documents(str(tmp_path / "a.txt"))] == ["a.txt"]
    assert [d.id_ for d in load_documents([os.fsencode(tmp_path / "a.txt")])] == ["a.txt"]


def test_a_path_that_is_named_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "dangling.md").symlink_to(tmp_path / "gone")
    (tmp_path / "loop.md").symlink_to("loop.md")
    for path in (tmp_path / "missing", tmp_path / "dangling.md", tmp_path / "loop.md", f"{tmp_path}/a\0b"):
        with pytest.raises(CorpusPathError):
            list(load_documents([path]))


@pytest.mark.timeout(60)
def test_accidents_leave_the_others_in(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The ferry to Orsa leaves at nine.")
    (tmp_path / ".#b.md").symlink_to("me@host.1234:5678")
    (tmp_path / "loop.md").symlink_to("loop.md")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "null.md").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s.txt"))
    (tmp_path / "latin.txt").write_bytes(b"Caf\xe9 opens at ten.")
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.txt")).write_text("Open at ten.")
    (tmp_path / "linked").symlink_to(tmp_path.parent)
    (tmp_path / "data.txt").write_bytes(bytes(range(256)))
    documents = load_documents([tmp_path], on_skip=lambda skipped: None)
    assert {d.id_ for d in documents} == {"a.txt", "latin.txt", "caf\\xe9.txt"}
    assert {name: kind for name, (kind, _) in told(documents).items()} == {
        ".#b.md": "special", "loop.md": "special", "pipe.txt": "special", "null.md": "special", "s.txt": "special",
        "linked": "excluded", "data.txt": "broken",
    }  # fmt: skip
    assert [note.what for note in documents.notes] == ["byte 3 is not UTF-8; read as Windows-1252"]
    for document in documents:
        document.metadata["source"].encode()


def test_files_that_cannot_be_opened_or_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_text(name)
    real = os.open

    def opened(path: Path, *args: int, **more: int) -> int:
        if Path(path).name == "b.txt":
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **more)

    monkeypatch.setattr(os, "open", opened)
    documents = load_documents([tmp_path], on_skip=lambda skipped: None)
    found = [next(documents).id_]
    (tmp_path / "c.txt").unlink()
    (tmp_path / "d.txt").unlink()
    os.mkfifo(tmp_path / "d.txt")
    found += [d.id_ for d in documents]
    assert found == ["a.txt"]
    assert told(documents) == {
        "b.txt": ("unreadable", "permission denied"),
        "c.txt": ("vanished", "it is not there any more"),
        "d.txt": ("broken", "no plain file any more"),
    }


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "team").mkdir()
    (tmp_path / "team" / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    real = os.scandir

    def listed(path: Path):
        if Path(path).name == "team":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", listed)
    documents = load_documents([tmp_path], on_skip=lambda skipped: None)
    assert [d.id_ for d in documents] == ["b.txt"]
    assert told(documents) == {"team": ("unlisted", "permission denied")}


def test_lines_that_cannot_be_read(tmp_path: Path) -> None:
    lines = [
        b'{"id": 1, "text": "a"}', b'{"id": 2}', b"[1]", b'{"id": 3, "text": 5}', b'{"id": 4, "text": null}',
        b'{"id": null, "text": "a"}', b"", b'{"id": 5, "text": "\\ud800b"}', b'{"id": "\\ud800", "text": "b"}',
        b'{"id": 1, "text": "again"}', b'{"id": 6, "text": "c"', b'{"id": 7, "text": "Caf\xe9"}',
        b'{"id": 8, "text": "x", "m": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"id": 9, "text": "z"}',
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    documents = load_documents([tmp_path], on_skip=lambda skipped: None)
    assert [(d.id_, d.text) for d in documents] == [("1", "a"), ("5", "\ufffdb"), ("7", "Café"), ("9", "z")]
    assert {name: reason[:20] for name, (_, reason) in told(documents).items()} == {
        "rows.jsonl:2": "no text; each line m",
        "rows.jsonl:3": "a list in place of a",
        "rows.jsonl:4": "text is a number; ma",
        "rows.jsonl:5": "text is null; make i",
        "rows.jsonl:6": "id is null; make it ",
        "rows.jsonl:9": "the id holds a NUL c",
        "rows.jsonl:10": "the id '1' is that o",
        "rows.jsonl:11": "no JSON: Expecting '",
        "rows.jsonl:13": "it is nested too dee",
    }
    at = b"\n".join(lines).index(b"\xe9")
    assert [note.what for note in documents.notes] == [
        "line 8: a NUL character or half a surrogate was replaced",
        f"line 12: byte {at} is not UTF-8; read as Windows-1252",
    ]
    (tmp_path / "rows.jsonl").write_text("no\n" * 1000)
    documents = load_documents([tmp_path], on_skip=lambda skipped: None)
    assert not list(documents)
    assert len(documents.skipped) == 21
    assert documents.skipped[-1].path.endswith(":1000")
    (tmp_path / "rows.jsonl").write_bytes('{"id": 1, "text": "ä"}\n{"id": 2, "text": "ö"}'.encode("utf-16"))
    assert [d.text for d in load_documents([tmp_path])] == ["ä", "ö"]


def test_folders_of_programs_and_storages_are_no_corpus(tmp_path: Path) -> None:
    for folder in (".git", "node_modules/x", "env", "storage/reader", "storage/concepts", "deep/.venv"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "README.md").write_text("# Not yours")
    (tmp_path / "env/pyvenv.cfg").write_text("")
    (tmp_path / "storage/catalog.db").write_bytes(b"")
    (tmp_path / "storage/mine.md").write_text("# Mine")
    (tmp_path / "ferry.md").write_text("# Ferry")
    documents = load_documents([tmp_path])
    assert [d.id_ for d in documents] == ["ferry.md", "storage/mine.md"]
    kinds = {name: kind for name, (kind, _) in told(documents).items()}
    assert kinds == dict.fromkeys((".git", ".venv", "env", "node_modules"), "excluded") | {"storage": "storage"}
    assert [d.id_ for d in load_documents([tmp_path / ".git"])] == ["README.md"]
    assert [d.id_ for d in load_documents((tmp_path / "storage").iterdir())] == ["mine.md"]
    assert not list(load_documents([tmp_path / "storage" / "reader" / "README.md"]))


def test_folders_nested_deeper_than_python_calls(tmp_path: Path) -> None:
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1100):
            os.mkdir("d")
            os.chdir("d")
        os.chdir(here)
        (tmp_path / "d" / "a.txt").write_text("a")
        assert [d.id_ for d in load_documents([tmp_path])] == ["d/a.txt"]
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # Python's own removal calls itself too often


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path.parent / "other").symlink_to(tmp_path)
    paths = [tmp_path, tmp_path / "a.txt", tmp_path.parent / "other", os.path.relpath(tmp_path)]
    assert [d.id_ for d in load_documents(paths)] == ["a.txt"]


def test_an_empty_corpus_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(bytes(range(256)))
    with pytest.raises(EmptyCorpusError, match=r"2 left out, the first: .*b\.txt: byte 128"):
        some(load_documents([tmp_path], on_skip=lambda skipped: None))


def test_what_is_left_out_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(bytes(range(256)))
    list(load_documents([tmp_path]))
    assert ["b.txt: byte 128" in record.getMessage() for record in caplog.records] == [True]
