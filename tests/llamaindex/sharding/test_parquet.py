"""Parquet files as documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from compllm_rag.errors import ConfigurationError, CorpusPathError, UnreadableFileError
from compllm_rag.llamaindex.sharding.parquet import Columns, parquet_documents

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install 'compllm-rag[ray]')")


def write(file: Path, **columns: list[object]) -> Path:
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), file)
    return file


def test_rows_become_documents(tmp_path: Path) -> None:
    write(tmp_path / "b" / "two.parquet", text=["three"], key=["z"], name=["T"])
    file = write(
        tmp_path / "a.parquet", text=["one", None, "  ", "two"], key=["x", "y", "v", "w"], name=["A", "", "", None]
    )
    made = list(parquet_documents([tmp_path], Columns(id="key", title="name")))
    assert [(d.id_, d.text, d.metadata["title"]) for d in made] == [
        ("x", "one", "A"),
        ("w", "two", ""),
        ("z", "three", "T"),
    ]
    assert made[1].metadata["source"].endswith("a.parquet#3")
    assert made[0].file == str(file.resolve())
    numbered = list(parquet_documents([file], Columns()))
    assert [(d.id_, d.metadata["title"]) for d in numbered] == [("a.parquet#0", ""), ("a.parquet#3", "")]


def test_what_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", text=["one", "two"], number=[1, 2], key=["x", None])
    with pytest.raises(ConfigurationError, match="body.*expected one of text, number, key"):
        list(parquet_documents([file], Columns(text="body")))
    with pytest.raises(ConfigurationError, match="number: int64"):
        list(parquet_documents([file], Columns(text="number")))
    with pytest.raises(UnreadableFileError, match="row 1"):
        list(parquet_documents([file], Columns(id="key")))
    twice = write(tmp_path / "c" / "twice.parquet", text=["one", "two", "three"], key=["x", "y", "x"])
    with pytest.raises(UnreadableFileError, match="the same id.*'x' in row 2"):
        list(parquet_documents([twice], Columns(id="key")))
    with pytest.raises(CorpusPathError):
        list(parquet_documents([tmp_path / "no"], Columns()))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusPathError, match="no Parquet files"):
        list(parquet_documents([tmp_path / "empty"], Columns()))
    (tmp_path / "bad.parquet").write_text("no Parquet at all")
    with pytest.raises(UnreadableFileError):
        list(parquet_documents([tmp_path / "bad.parquet"], Columns()))
