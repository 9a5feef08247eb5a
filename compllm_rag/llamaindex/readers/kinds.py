"""Which reader a file has, by the ending of its name, and which package that needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

from compllm_rag.llamaindex.readers import pages, rows
from compllm_rag.llamaindex.readers.found import Piece, SourceFile

Reader = Callable[[SourceFile], Iterator[Piece]]

_CODE = """
.py .pyi .js .jsx .mjs .cjs .ts .tsx .java .kt .kts .scala .go .rs .c .h .cc .cpp .cxx .hh .hpp .cs .swift .m .rb .php
.pl .lua .r .jl .hs .ml .ex .exs .erl .clj .dart .sh .bash .zsh .ps1 .sql .proto .vue .svelte .tex .yaml .yml .toml .ini
.cfg
"""
_READERS: dict[str, Reader] = {
    **dict.fromkeys(_CODE.split(), pages.read_code),
    ".txt": pages.read_text,
    ".text": pages.read_text,
    ".adoc": pages.read_text,
    ".org": pages.read_text,
    ".md": pages.read_markdown,
    ".markdown": pages.read_markdown,
    ".rst": pages.read_rst,
    ".html": pages.read_html,
    ".htm": pages.read_html,
    ".xhtml": pages.read_html,
    ".pdf": pages.read_pdf,
    ".docx": pages.read_docx,
    ".json": rows.read_json,
    ".jsonl": rows.read_lines,
    ".ndjson": rows.read_lines,
    ".ipynb": rows.read_notebook,
    ".csv": rows.read_table,
    ".tsv": rows.read_table,
}
_PACKAGES = {
    ".html": ("bs4", "beautifulsoup4"),
    ".htm": ("bs4", "beautifulsoup4"),
    ".xhtml": ("bs4", "beautifulsoup4"),
    ".pdf": ("pypdf", "pypdf"),
    ".docx": ("docx2txt", "docx2txt"),
}

SUPPORTED = tuple(_READERS)


def reader_of(path: Path) -> Reader | None:
    """The reader of a file, None for a kind that nothing here reads."""
    return _READERS.get(path.suffix.lower())


def missing_package(path: Path) -> str | None:
    """The package that the reader of a file lacks, None where it lacks none."""
    module, package = _PACKAGES.get(path.suffix.lower(), ("", ""))
    return package if module and importlib.util.find_spec(module) is None else None
