"""Files of records: JSON lines, JSON, and tables of comma- or tab-separated values."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from compllm_rag.errors import UnreadableFileError
from compllm_rag.llamaindex.readers.decoding import decoded, joined, whole
from compllm_rag.llamaindex.readers.found import Piece, SourceFile, broken, shown
from compllm_rag.llamaindex.readers.titles import markdown_title

_MOST_COMPLAINTS = 20  # of one file, line by line; the others are counted
_WANTED = 'each line must be {"id": ..., "title": ..., "text": ...}'


def read_lines(source: SourceFile) -> Iterator[Piece]:
    """JSON lines: each a document of its own. A line that cannot be read is left out, and told."""
    first: dict[str, int] = {}
    left_out = noted = 0
    offset = last = 0
    for number, line in enumerate(_lines(source), 1):
        begins, offset = offset, offset + len(line)
        try:
            text, remark = decoded(line, begins) if isinstance(line, bytes) else (line, None)
            if not text.strip():
                continue
            piece, more = record(_parsed(text, in_line=True), number)
            if piece.key in first:
                raise broken(f"the id {piece.key!r} is that of line {first[piece.key]} already")
        except UnreadableFileError as error:
            left_out += 1
            if left_out <= _MOST_COMPLAINTS:
                source.skip(str(error.got), number)
            last = number
            continue
        first[str(piece.key)] = number
        remark = joined(remark, more)
        noted += remark is not None
        if remark and noted <= _MOST_COMPLAINTS:
            source.note(f"line {number}: {remark}")
        yield piece
    if noted > _MOST_COMPLAINTS:
        source.note(f"{noted - _MOST_COMPLAINTS} more lines like these")
    if left_out > _MOST_COMPLAINTS:
        source.skip(f"{left_out - _MOST_COMPLAINTS} more lines cannot be read, this is the last", last)


def read_json(source: SourceFile) -> Iterator[Piece]:
    """JSON: records with `id` and `text` as lines of them are, anything else as one text, a value a line."""
    text, remark = decoded(source.stream.read())
    if remark:
        source.note(remark)
    value = _parsed(text)
    rows = value if isinstance(value, list) else [value]
    if rows and all(isinstance(row, dict) and {"id", "text"} <= row.keys() for row in rows):
        yield from _records(source, rows)
        return
    try:
        plain = json.dumps(value, indent=1, ensure_ascii=False)
    except RecursionError as error:
        raise broken("it is nested too deeply") from error
    plain, remark = whole(plain)
    if remark:
        source.note(remark)
    yield Piece(plain, shown(source.path.name))


def read_notebook(source: SourceFile) -> Iterator[Piece]:
    """A Jupyter notebook: what its cells say, without what they gave."""
    text, remark = decoded(source.stream.read())
    if remark:
        source.note(remark)
    try:
        said = ["".join(cell["source"]) for cell in _parsed(text)["cells"]]
    except (KeyError, TypeError) as error:
        raise broken("no notebook: cells with sources are missing") from error
    text, remark = whole("\n\n".join(said))
    if remark:
        source.note(remark)
    yield Piece(text, markdown_title(text) or source.stem)


def read_table(source: SourceFile) -> Iterator[Piece]:
    """A table: a line for each row, with the names of the first row in front of its values."""
    text, remark = decoded(source.stream.read())
    if remark:
        source.note(remark)
    try:
        names, *rows = _rows(text, source.path.suffix.lower()) or [[]]
    except csv.Error as error:
        raise broken(f"no table: {error}") from error
    if not rows or any(_is_number(name) for name in names):
        names, rows = [], [names, *rows]  # no names in the first row: it is like the others
    yield Piece("\n".join(filter(None, (_row(names, row) for row in rows))), source.stem)


def record(row: Any, number: int | None) -> tuple[Piece, str | None]:
    """A document from a record with `id`, `text` and perhaps `title`, and what was replaced in it.

    Raises:
        UnreadableFileError: It is no such record.
    """
    if not isinstance(row, dict):
        raise broken(f"{_kind(row)} in place of an object; {_WANTED}")
    missing = [name for name in ("id", "text") if name not in row]
    if missing:
        raise broken(f"no {' and no '.join(missing)}; {_WANTED}")
    text, key, title = row["text"], row["id"], row.get("title")
    if not isinstance(text, str):
        raise broken(f"text is {_kind(text)}; make it a string")
    if not isinstance(key, str | int):
        raise broken(f"id is {_kind(key)}; make it a string")
    text, in_text = whole(text)
    title, in_title = whole("" if title is None else str(title))
    key, in_key = whole(str(key))
    if not key:
        raise broken("the id is empty; give it one")
    if in_key:
        raise broken("the id holds a NUL character or half a surrogate")
    return Piece(text, title, key=key, line=number), joined(in_text or in_title)


def _records(source: SourceFile, rows: list[Any]) -> Iterator[Piece]:
    seen = set[str]()
    for number, row in enumerate(rows, 1):
        try:
            piece, remark = record(row, number)
            if piece.key in seen:
                raise broken(f"the id {piece.key!r} is there already")
        except UnreadableFileError as error:
            source.skip(str(error.got), number)
            continue
        seen.add(str(piece.key))
        if remark:
            source.note(f"record {number}: {remark}")
        yield piece


def _lines(source: SourceFile) -> Iterator[bytes | str]:
    """Lines of a file, one at a time unless its mark says that a line end is not one byte."""
    start = source.stream.peek(4)[:4] if isinstance(source.stream, io.BufferedReader) else b""
    if start.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        text, remark = decoded(source.stream.read())
        if remark:
            source.note(remark)
        yield from text.split("\n")
    else:
        yield from source.stream


def _parsed(text: str, *, in_line: bool = False) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise broken("it is nested too deeply") from error
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if in_line else f"line {error.lineno} column {error.colno}"
        raise broken(f"no JSON: {error.msg.removesuffix(' at')} at {where}") from error
    except ValueError as error:  # a number of thousands of digits
        raise broken(f"no JSON: {error}") from error


def _kind(value: object) -> str:
    return {type(None): "null", bool: "true or false", list: "a list", dict: "an object"}.get(type(value), "a number")


def _rows(text: str, suffix: str) -> list[list[str]]:
    if suffix == ".tsv":
        return list(csv.reader(io.StringIO(text), delimiter="\t"))
    try:
        sniffed: type[csv.Dialect] = csv.Sniffer().sniff(text[:4096], delimiters=",;\t|")
    except csv.Error:
        sniffed = csv.excel
    # Only what parts the cells: the sniffer takes quotes that are doubled inside of a cell (RFC 4180, 2.7) for its end
    # unless it met such ones at the beginning.
    delimiter, spaces = sniffed.delimiter, sniffed.skipinitialspace
    return list(csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=spaces))


def _row(names: list[str], row: list[str]) -> str:
    cells = [" ".join(cell.split()) for cell in row]
    named = [
        f"{name.strip()}: {cell}" if name.strip() else cell for name, cell in zip(names, cells, strict=False) if cell
    ]
    return "; ".join([*named, *filter(None, cells[len(names) :])])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
