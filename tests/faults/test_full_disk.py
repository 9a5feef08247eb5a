"""Questions take no space: where SQLite cannot lay out the index of its journal, they are answered all the same."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document
from typer.testing import CliRunner

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.cli.main import app
from compllm_rag.errors import CompLLMError, UnreadableFileError
from compllm_rag.storage.stats import storage_stats
from compllm_rag.storage.verification import verify_storage
from compllm_rag.store.faults import translated_errors
from compllm_rag.store.sqlite import Connection
from toy_embedder import HashEmbedder


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The first look at a database fails as it does on a full disk; undone, there is space again."""

    def execute(self: Connection, statement: str, *values: Any) -> sqlite3.Cursor:
        if "sqlite_master LIMIT 1" in statement:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
            raise error
        return sqlite3.Connection.execute(self, statement, *values)

    monkeypatch.setattr(Connection, "execute", execute, raising=False)
    yield monkeypatch


@pytest.fixture
def storage(tmp_path: Path, compressor: Compressor) -> Path:
    with ConceptIndex.create(tmp_path / "s", compressor=compressor, embedder=HashEmbedder()) as index:
        index.ingest([Document(id_="a", text="The ferry to Orsa leaves at nine.")])
    return tmp_path / "s"


def opened(folder: Path, compressor: Compressor, **options: bool) -> ConceptIndex:
    return ConceptIndex.load(folder, compressor=compressor, embedder=HashEmbedder(), **options)


def test_reading_takes_no_space(storage: Path, compressor: Compressor, full: pytest.MonkeyPatch) -> None:
    assert storage_stats(storage)["documents"] == 1
    assert verify_storage(storage, deep=True).sound
    with opened(storage, compressor, read_only=True) as index:
        assert index.as_query_engine().query("When does the ferry leave?").metadata["compllm"]["store"]["misses"] == 0
    done = CliRunner().invoke(app, ["stats", "--storage", str(storage)])
    assert done.exit_code == 0, done.output


def test_a_reader_sees_what_is_written_once_there_is_space(
    storage: Path, compressor: Compressor, full: pytest.MonkeyPatch
) -> None:
    with opened(storage, compressor, read_only=True) as reader:
        full.undo()
        with opened(storage, compressor) as writer:
            writer.insert(Document(id_="b", text="A boat to Rock leaves at ten."))
            assert {n.ref_doc_id for n in reader.faiss.iter_nodes()} == {"a", "b"}
            found = reader.as_query_engine().query("When does the boat leave?")
            assert found.metadata["compllm"]["store"]["misses"] == 0


def test_a_journal_that_has_to_be_read_is_not_passed_over(
    storage: Path, compressor: Compressor, tmp_path: Path, full: pytest.MonkeyPatch
) -> None:
    full.undo()
    with opened(storage, compressor) as index:
        index.insert(Document(id_="b", text="A boat to Rock leaves at ten."))
        shutil.copytree(storage, tmp_path / "killed", ignore=shutil.ignore_patterns("*-shm"))
    assert (tmp_path / "killed" / "catalog.db-wal").stat().st_size
    with opened(tmp_path / "killed", compressor, read_only=True) as index:
        assert {n.ref_doc_id for n in index.faiss.iter_nodes()} == {"a", "b"}


def test_a_journal_that_cannot_be_read_is_one_line(
    storage: Path, compressor: Compressor, full: pytest.MonkeyPatch
) -> None:
    for name in ("catalog.db-wal", "concepts/index/cache.db-wal"):
        (storage / name).write_bytes(b"something")
    with pytest.raises(CompLLMError, match="disk I/O error"):
        opened(storage, compressor, read_only=True)
    done = CliRunner().invoke(app, ["stats", "--storage", str(storage)])
    assert done.exit_code == 2
    assert "error: the catalog" in done.output


@pytest.mark.parametrize("writing", [False, True])
def test_a_disk_that_fails_is_one_of_our_errors(tmp_path: Path, writing: bool) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
    with pytest.raises(UnreadableFileError, match="free some space"), translated_errors(tmp_path, writing=writing):
        raise error
