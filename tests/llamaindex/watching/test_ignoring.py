"""What is left out of a watched folder is what git itself leaves out, and what programs leave."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.readers.walk import Listing, look_at, shut_out, walk
from compllm_rag.llamaindex.watching.ignoring import IgnoreRules

TREE = {
    ".gitignore": "*.log\nbuild/\n/only-here.txt\ndocs/**/draft.md\n!keep.log\n\\#odd.md\n# a comment\nspace.md\\ \n",
    "docs/.gitignore": "private*\n!private-but-shown.md\n/deep/*\n!/deep/in.md\n",
    "docs/deep/.gitignore": "in.md\n!out.md\n",
    ".git/info/exclude": "excluded.md\n",
}
FILES = [
    *("a.md", "a.log", "keep.log", "build/a.md", "build/deep/a.md", "only-here.txt", "sub/only-here.txt"),
    *("docs/draft.md", "docs/x/y/draft.md", "docs/private.md", "docs/private-but-shown.md", "docs/private/a.md"),
    *("docs/deep/in.md", "docs/deep/out.md", "docs/deep/more.md", "docs/keep.log", "#odd.md", "odd.md", "excluded.md"),
    *("sub/excluded.md", "sub/build/b.md", "sub/build", "sub/a.log/b.md"),
]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repo"
    for name in (*TREE, *FILES):
        path = root / name
        if not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(TREE.get(name, "text"))
    return root


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_as_git_says(repository: Path) -> None:
    exclude = TREE[".git/info/exclude"]
    shutil.rmtree(repository / ".git")
    subprocess.run(["git", "init", "-q", repository], check=True)
    (repository / ".git" / "info").mkdir(exist_ok=True)
    (repository / ".git" / "info" / "exclude").write_text(exclude)
    done = subprocess.run(["git", "check-ignore", *FILES], cwd=repository, capture_output=True, text=True)
    theirs = {*done.stdout.split()}
    rules = IgnoreRules(str(repository))
    ours = {name for name in FILES if shut_out(repository, str(repository / name), rules)}
    assert ours == theirs
    assert len(theirs) > 10
    docs = IgnoreRules(str(repository / "docs"))  # a folder within a repository heeds those above it
    ours = {f"docs/{p.relative_to(repository / 'docs')}" for p in (repository / "docs").rglob("*.*")
            if p.is_file() and p.name != ".gitignore" and shut_out(repository / "docs", str(p), docs)}  # fmt: skip
    assert ours == {name for name in theirs if name.startswith("docs/")}


def test_a_walk_and_a_look_agree(repository: Path) -> None:
    rules = IgnoreRules(str(repository))
    whole = walk([repository], rules)
    every = [str(path) for path in repository.rglob("*") if path.is_file()]
    for files in (every, [str(path) for path in repository.iterdir()]):
        looked = Listing()
        look_at(looked, repository, files, rules)
        assert {(f.path, f.name, f.file) for f in looked.files} == {(f.path, f.name, f.file) for f in whole.files}
        assert len(looked.files) == len(whole.files)
    assert "docs/private-but-shown.md" in {found.name for found in whole.files}
    gone = Listing()
    look_at(gone, repository, [str(repository / "never.md")], rules)
    assert [(one.kind, one.path) for one in gone.skipped] == [("vanished", str(repository / "never.md"))]


def test_what_programs_leave_and_what_the_user_says(tmp_path: Path) -> None:
    root = str(tmp_path)

    def out(name: str, *patterns: str, gitignore: bool = True) -> str | None:
        return IgnoreRules(root, patterns, gitignore=gitignore)(os.path.join(root, name), False)

    for name in (
        "a.md~",
        ".#a.md",
        "#a.md#",
        ".a.md.swp",
        "sub/4913",
        "jquery.min.js",
        "package-lock.json",
        "~$a.docx",
    ):
        assert "what programs leave" in out(name), name
    for name in ("a.md", "tmp.md", "app.js", "package.json"):
        assert out(name) is None
    assert out("jquery.min.js", "!*.min.js") is None
    assert out("a.md", "*.md", "!b.md") == "left out by --ignore"
    assert out("b.md", "*.md", "!b.md") is None
    (tmp_path / ".gitignore").write_bytes(b"*.md\n\xff\xfe\n")
    assert out("a.md") == "left out by .gitignore"
    assert out("a.md", gitignore=False) is None
    rules = IgnoreRules(root)
    assert rules(str(tmp_path / "a.md"), False)
    (tmp_path / ".gitignore").unlink()
    assert rules(str(tmp_path / "a.md"), False)
    rules.forget()
    assert rules(str(tmp_path / "a.md"), False) is None
    with pytest.raises(ConfigurationError, match="no pattern"):
        IgnoreRules(root, ["!"])
