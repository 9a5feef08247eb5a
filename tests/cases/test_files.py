"""One bad file, and data that disappears: files that change while they are read, and paths in all their spellings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.errors import CompLLMError, ConfigurationError, CorpusPathError, EmptyCorpusError
from compllm_rag.llamaindex.documents import load_documents
from toy_embedder import HashEmbedder


@pytest.fixture
def index(compressor: Compressor) -> ConceptIndex:
    return ConceptIndex.create(None, compressor=compressor, embedder=HashEmbedder(), chunk_size=60)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("ferry", "bread", "owl"):
        (folder / f"{name}.txt").write_text(f"Something about a {name}.")
    return folder


def ids(index: ConceptIndex) -> list[str]:
    return sorted(index.ref_doc_info)


def ingest(index: ConceptIndex, paths: Any, **options: Any) -> Any:
    return index.ingest(load_documents(paths, on_skip=lambda skipped: None), within=paths, **options)


def test_a_file_that_vanishes_between_listing_and_reading(index: ConceptIndex, corpus: Path) -> None:
    documents = load_documents(corpus, on_skip=lambda skipped: None).first_read()
    (corpus / "ferry.txt").unlink()
    report = index.ingest(documents, within=[corpus])
    assert ids(index) == ["bread.txt", "owl.txt"]
    assert [Path(one.path).name for one in report.skipped] == ["ferry.txt"]


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/./", "{}/../corpus", "bytes", "link", "twice"])
def test_prune_knows_a_folder_by_all_its_names(index: ConceptIndex, corpus: Path, spelling: str) -> None:
    ingest(index, corpus)
    (corpus / "owl.txt").unlink()
    named: Any = spelling.format(corpus)
    if spelling == "bytes":
        named = os.fsencode(corpus)
    elif spelling == "link":
        named = corpus.parent / "link"
        named.symlink_to(corpus)
    elif spelling == "twice":
        named = [corpus, corpus]
    assert ingest(index, named, prune=True).documents_deleted == 1
    assert ids(index) == ["bread.txt", "ferry.txt"]


def test_prune_of_a_root_that_vanished_or_is_not_mounted(index: ConceptIndex, corpus: Path) -> None:
    ingest(index, corpus)
    corpus.rename(corpus.parent / "moved")
    with pytest.raises(CorpusPathError):
        ingest(index, corpus, prune=True)
    corpus.mkdir()
    with pytest.raises(EmptyCorpusError):
        ingest(index, corpus, prune=True)
    assert ids(index) == ["bread.txt", "ferry.txt", "owl.txt"]


def test_a_file_that_is_broken_now_takes_no_document_away(index: ConceptIndex, corpus: Path) -> None:
    lines = corpus / "lines.jsonl"
    lines.write_text('{"id": "k", "text": "K."}\n{"id": "l", "text": "L."}\n')
    ingest(index, corpus)
    lines.write_text('{"id": "k", "text": "K."}\n{"id": "l", "te')
    with pytest.raises(CompLLMError, match="nothing was pruned"):
        ingest(index, corpus, prune=True)
    assert {"k", "l"} <= {*ids(index)}


def test_a_root_that_is_a_loop_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CorpusPathError, match="leads back to itself"):
        next(load_documents(tmp_path / "loop"))


def test_within_that_is_no_path(index: ConceptIndex, corpus: Path) -> None:
    with pytest.raises(ConfigurationError, match="no path"):
        index.ingest(load_documents(corpus), within=["a\0b"])


def test_empty_and_blank_files_are_no_documents(index: ConceptIndex, tmp_path: Path) -> None:
    for name, text in {"a.txt": "", "b.md": " \n\t\n", "c.jsonl": "\n\n", "d.html": "<html></html>"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "good.txt").write_text("Good.")
    assert ingest(index, tmp_path).documents == 1
    assert ids(index) == ["good.txt"]


TITLES = {
    "nothing.md": ("---\ntitle: null\n---\nBody", "nothing"),
    "none.md": ("---\ntitle: ~\n---\n# Heading\nBody", "Heading"),
    "broken.md": ("---\ntitle: [x\n: :\n---\nBody", "broken"),
    "open.md": ("---\ntitle: never closed\nBody", "open"),
    "comment.md": ("<!--\n# out\n-->\n# Shown\n", "Shown"),
    "fences.md": ("````\n```\n# no\n```\n# no\n````\n# Yes\n", "Yes"),
    "toml.md": ('+++\ntitle = "Toml"\n+++\n# Heading\n', "Toml"),
    "script.py": ("# a comment\nx = 1\n", "script.py"),
    "page.html": ("<p>no title</p>", "page"),
}


def test_titles_are_no_comments_and_no_null(tmp_path: Path) -> None:
    for name, (text, _) in TITLES.items():
        (tmp_path / name).write_text(text)
    got = {document.id_: document.metadata["title"] for document in load_documents(tmp_path)}
    assert got == {name: title for name, (_, title) in TITLES.items()}
