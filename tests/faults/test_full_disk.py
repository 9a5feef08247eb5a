"""Questions take no space: where SQLite cannot lay out the index of its journal, they are answered all the same.

A folder in the place of that index is what a full disk looks like to SQLite, and needs no file system of its own.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_index.core import Document
from typer.testing import CliRunner

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.cli.main import app
from compllm_rag.errors import CompLLMError, UnreadableFileError
from compllm_rag.storage.stats import storage_stats
from compllm_rag.storage.verification import verify_storage
from compllm_rag.store.faults import translated_errors
from toy_embedder import HashEmbedder

DATABASES = ("catalog.db", "concepts/index/cache.db")


def fill(folder: Path) -> None:
    for name in DATABASES:
        (folder / f"{name}-shm").mkdir()


def clear(folder: Path) -> None:
    for name in DATABASES:
        (folder / f"{name}-shm").rmdir()


@pytest.fixture
def storage(tmp_path: Path, compressor: Compressor) -> Iterator[Path]:
    with ConceptIndex.create(tmp_path / "s", compressor=compressor, embedder=HashEmbedder()) as index:
        index.ingest([Document(id_="a", text="The ferry to Orsa leaves at nine.")])
    fill(tmp_path / "s")
    yield tmp_path / "s"


def opened(folder: Path, compressor: Compressor, **options: bool) -> ConceptIndex:
    return ConceptIndex.load(folder, compressor=compressor, embedder=HashEmbedder(), **options)


def test_reading_takes_no_space(storage: Path, compressor: Compressor) -> None:
    assert storage_stats(storage)["documents"] == 1
    assert verify_storage(storage, deep=True).sound
    with opened(storage, compressor, read_only=True) as index:
        assert index.as_query_engine().query("When does the ferry leave?").metadata["compllm"]["store"]["misses"] == 0
    done = CliRunner().invoke(app, ["stats", "--storage", str(storage)])
    assert done.exit_code == 0, done.output


def test_a_reader_sees_what_is_written_once_there_is_space(storage: Path, compressor: Compressor) -> None:
    with opened(storage, compressor, read_only=True) as reader:
        clear(storage)
        with opened(storage, compressor) as writer:
            writer.insert(Document(id_="b", text="A boat to Rock leaves at ten."))
            assert {n.ref_doc_id for n in reader.faiss.iter_nodes()} == {"a", "b"}
            found = reader.as_query_engine().query("When does the boat leave?")
            assert found.metadata["compllm"]["store"]["misses"] == 0


def test_writing_is_refused_in_one_line(storage: Path, compressor: Compressor) -> None:
    with pytest.raises(CompLLMError):
        opened(storage, compressor)


def test_a_journal_that_would_have_to_be_read_is_not_passed_over(
    storage: Path, compressor: Compressor, tmp_path: Path
) -> None:
    clear(storage)
    with opened(storage, compressor) as index:
        index.insert(Document(id_="b", text="A boat to Rock leaves at ten."))
        shutil.copytree(storage, tmp_path / "killed", ignore=shutil.ignore_patterns("*-shm"))
    fill(tmp_path / "killed")
    with pytest.raises(CompLLMError):
        opened(tmp_path / "killed", compressor, read_only=True)
    done = CliRunner().invoke(app, ["stats", "--storage", str(tmp_path / "killed")])
    assert done.exit_code == 2
    assert "error: the catalog" in done.output
    clear(tmp_path / "killed")
    with opened(tmp_path / "killed", compressor, read_only=True) as index:
        assert {n.ref_doc_id for n in index.faiss.iter_nodes()} == {"a", "b"}


@pytest.mark.parametrize("writing", [False, True])
def test_a_disk_that_fails_is_one_of_our_errors(tmp_path: Path, writing: bool) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
    with pytest.raises(UnreadableFileError, match="free some space"), translated_errors(tmp_path, writing=writing):
        raise error
