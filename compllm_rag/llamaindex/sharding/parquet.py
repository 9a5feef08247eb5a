"""Rows of Parquet files as documents, read a batch of rows at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_index.core.schema import Document

from compllm_rag.errors import ConfigurationError, CorpusPathError, MissingExtraError, UnreadableFileError
from compllm_rag.llamaindex.readers.found import FileDocument, Piece, shown

_ROWS = 1000
_ENDING = ".parquet"


@dataclass(frozen=True)
class Columns:
    """Names of the columns that make a document.

    Attributes:
        text: Its text.
        id: Its id; None calls it by its file and the number of its row, from 0.
        title: Its title; None for none.
    """

    text: str = "text"
    id: str | None = None
    title: str | None = None


def parquet_documents(paths: Iterable[Path], columns: Columns) -> Iterator[Document]:
    """Documents of Parquet files; rows without text are passed over.

    Args:
        paths: Files, or folders with `*.parquet` files at any depth, read in order of name.
        columns: Where id, title and text of a document stand.

    Raises:
        CorpusPathError: A path does not exist.
        ConfigurationError: A file has no such column, or one that holds no text.
        UnreadableFileError: A file is no Parquet file, or cannot be read, or an id lacks or occurs twice in it.
        MissingExtraError: pyarrow is not installed.
    """
    for file, name in _files(paths):
        seen = set[bytes]()  # digests of ids: there may be millions
        for number, row in enumerate(_rows(file, columns)):
            text = row[columns.text]
            if text is None or not text.strip():
                continue
            key = f"{name}#{number}" if columns.id is None else row[columns.id]
            if key is None or key == "":
                raise UnreadableFileError(
                    "a row of a Parquet file has no id",
                    got=f"row {number} of {file}",
                    expected=f"an id in column {columns.id!r}",
                    next_step="give it one, or leave --id-column out to number rows",
                )
            digest = hashlib.blake2b(str(key).encode("utf-8", "replace"), digest_size=16).digest()
            if digest in seen:
                raise UnreadableFileError(
                    "two rows of a Parquet file have the same id, and a document is one row",
                    got=f"{key!r} in row {number} of {file}, and before",
                    expected=f"ids that differ in column {columns.id!r}",
                    next_step="name a column of unique ids, or leave --id-column out to number rows",
                )
            seen.add(digest)
            title = "" if columns.title is None else row[columns.title] or ""
            piece = Piece(text, str(title), key=str(key))
            yield FileDocument.of(os.path.realpath(file), piece, f"{shown(file)}#{number}", str(key))


def _files(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    for path in paths:
        if not path.exists():
            raise CorpusPathError("there is nothing at this path", got=path, next_step="check its name")
        if path.is_dir():
            found = sorted(path.rglob(f"*{_ENDING}"))
            if not found:
                raise CorpusPathError("there are no Parquet files here", got=path, expected=f"*{_ENDING}")
            yield from ((file, file.relative_to(path).as_posix()) for file in found)
        else:
            yield path, path.name


def _rows(file: Path, columns: Columns) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(
            "Parquet files need pyarrow", got="no such package", next_step="pip install 'compllm-rag[ray]'"
        ) from error
    wanted = [name for name in (columns.text, columns.id, columns.title) if name is not None]
    try:
        with parquet.ParquetFile(file) as opened:
            schema = opened.schema_arrow
            _check(file, schema, columns, wanted)
            for batch in opened.iter_batches(batch_size=_ROWS, columns=wanted):
                yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UnreadableFileError(
            "this Parquet file cannot be read",
            got=f"{file}: {str(error).splitlines()[0]}",
            next_step="leave it out, or write it again",
        ) from error


def _check(file: Path, schema: Any, columns: Columns, wanted: list[str]) -> None:
    absent = [name for name in wanted if name not in schema.names]
    if absent:
        raise ConfigurationError(
            "a Parquet file has no such column",
            got=f"{', '.join(absent)} of {file}",
            expected=f"one of {', '.join(schema.names[:20])}",
            next_step="name the columns by --text-column, --id-column and --title-column",
        )
    kind = str(schema.field(columns.text).type)
    if kind not in ("string", "large_string", "string_view"):
        raise ConfigurationError(
            "the column of texts holds something else", got=f"{columns.text}: {kind} in {file}", expected="text"
        )
