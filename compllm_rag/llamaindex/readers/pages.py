"""Texts and documents for people to read: plain text, Markdown, reStructuredText, source code, HTML, PDF, DOCX."""

from __future__ import annotations

import io
import logging
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from xml.etree.ElementTree import ParseError

from compllm_rag.llamaindex.readers.decoding import decoded, joined, whole
from compllm_rag.llamaindex.readers.found import Piece, SourceFile, broken, shown
from compllm_rag.llamaindex.readers.titles import markdown_title, rst_title

# What parsers of other people's files are seen to raise; a file that brings one of them about is broken.
_FAULTS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip
_MOST_UNPACKED = 256 * 2**20  # bytes of a DOCX; a bomb has gigabytes
_BLOCKS = [
    "address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "dialog", "div", "dl", "dt",
    "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li",
    "main", "nav", "ol", "p", "pre", "section", "summary", "table", "tr", "ul",
]  # fmt: skip
_UNSEEN = ["script", "style", "template", "noscript", "svg", "head"]
_IMAGE_NAME = re.compile(r"^(?:microsoft \w+ - |untitled$)", re.I)


def read_text(source: SourceFile) -> Iterator[Piece]:
    """Plain text; its name is its title."""
    yield Piece(_text(source), source.stem)


def read_markdown(source: SourceFile) -> Iterator[Piece]:
    """Markdown, as it is written."""
    text = _text(source)
    yield Piece(text, markdown_title(text) or source.stem)


def read_rst(source: SourceFile) -> Iterator[Piece]:
    """reStructuredText, as it is written."""
    text = _text(source)
    yield Piece(text, rst_title(text) or source.stem)


def read_code(source: SourceFile) -> Iterator[Piece]:
    """Source code; `table.py` and `table.js` are not the same title."""
    yield Piece(_text(source), shown(source.path.name))


def read_html(source: SourceFile) -> Iterator[Piece]:
    """What a page shows, a line for each block; its title, or its first heading."""
    from bs4 import BeautifulSoup, UnusualUsageWarning
    from bs4.element import NavigableString
    from bs4.exceptions import ParserRejectedMarkup

    data = source.stream.read()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnusualUsageWarning)  # of what looks like XML, or like an address
            page = BeautifulSoup(data, "html.parser")
        titles = [" ".join(tag.get_text(" ").split()) for tag in (page.title, page.h1) if tag]
        title = next(filter(None, titles), source.stem)
        for unseen in page(_UNSEEN):
            unseen.decompose()
        for said in page.find_all(string=lambda said: type(said) is NavigableString):  # and no comment
            if not said.find_parent("pre"):
                said.replace_with(re.sub(r"\s+", " ", said))
        for end in page(["br", *_BLOCKS, "td", "th"]):
            end.insert_after("\n" if end.name not in ("td", "th") else " ")
            if end.name != "br":
                end.insert_before("\n" if end.name in _BLOCKS else " ")
        text = page.get_text()
    except (ParserRejectedMarkup, RecursionError, AssertionError, ValueError) as error:
        raise broken(f"no HTML: {error}") from error
    encoding = (page.original_encoding or "utf-8").lower()
    declared = (page.declared_html_encoding or "").lower()
    if encoding not in ("utf-8", "ascii", declared):
        source.note(f"read as {encoding}")
    if page.contains_replacement_characters:
        source.note("characters in no encoding that could be told were replaced")
    # One blank in front of a line is what is left of an indentation; more are those of a <pre>.
    text = re.sub(r"^ (?! )|[ \t]+$", "", text, flags=re.M)
    text, remark = whole(re.sub(r"\n{3,}", "\n\n", text).strip())
    if remark:
        source.note(remark)
    yield Piece(text, title)


def read_pdf(source: SourceFile) -> Iterator[Piece]:
    """A PDF, a document for each page that has text, with the label of the page in its metadata."""
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of every fault it can live with
    try:
        reader = pypdf.PdfReader(source.stream)
        if reader.is_encrypted and not reader.decrypt(""):
            raise broken("it is encrypted; save it without a password")
        title, labels = _pdf_title(reader), reader.page_labels
        found = 0
        for number, page in enumerate(reader.pages, 1):
            text, remark = whole(page.extract_text())
            if remark:
                source.note(f"page {number}: {remark}")
            found += bool(text.strip())
            label = labels[number - 1] if number <= len(labels) else str(number)
            yield Piece(text, title or source.stem, part=f"#page={number}", metadata={"page_label": label})
    except pypdf.errors.DependencyError as error:
        raise broken(f"it is encrypted: {error}") from error
    except (pypdf.errors.PyPdfError, *_FAULTS) as error:
        raise _fault("PDF", error) from error
    if not found:
        raise broken("no page has text; scanned pages need a text recognition first")


def read_docx(source: SourceFile) -> Iterator[Piece]:
    """A DOCX: paragraphs, tables, headers and footers."""
    import docx2txt

    data = io.BytesIO(source.stream.read())
    try:
        with zipfile.ZipFile(data) as packed:
            size = sum(member.file_size for member in packed.infolist() if member.filename.endswith(".xml"))
        if size > _MOST_UNPACKED:
            raise broken(f"it would unpack to {size} bytes of XML, more than {_MOST_UNPACKED}")
        text, remark = whole(docx2txt.process(data))
    except (zipfile.BadZipFile, ParseError, NotImplementedError, *_FAULTS) as error:
        raise _fault("DOCX", error) from error
    if remark:
        source.note(remark)
    yield Piece(text, source.stem)


def _text(source: SourceFile) -> str:
    text, remark = decoded(source.stream.read())
    if remark:
        source.note(remark)
    return text


def _pdf_title(reader: object) -> str:
    """Its title, unless that is what a program wrote in without being asked."""
    title = " ".join(str(getattr(getattr(reader, "metadata", None), "title", None) or "").split())
    title, _ = whole(title)
    return "" if _IMAGE_NAME.match(title) else title


def _fault(kind: str, error: Exception) -> Exception:
    from compllm_rag.errors import UnreadableFileError

    if isinstance(error, UnreadableFileError):
        return error
    return broken(f"no sound {kind}: {joined(type(error).__name__, str(error)[:120])}")
