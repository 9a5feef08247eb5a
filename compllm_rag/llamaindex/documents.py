"""Files and folders to LlamaIndex documents, one at a time; one that cannot be read does not keep the others out."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from llama_index.core.schema import Document

from compllm_rag.errors import EmptyCorpusError, UnreadableFileError
from compllm_rag.llamaindex.readers.found import FileDocument, FileNote, Piece, SkippedFile, SourceFile, shown
from compllm_rag.llamaindex.readers.kinds import reader_of
from compllm_rag.llamaindex.readers.pages import read_text
from compllm_rag.llamaindex.readers.rows import read_lines
from compllm_rag.llamaindex.readers.walk import FoundFile, Listing, as_paths, check_paths, skipped_by, walk

__all__ = ["FileDocuments", "check_paths", "empty_corpus", "load_documents", "some"]

logger = logging.getLogger(__name__)
STDIN = "-"  # in place of a file's path


@dataclass(frozen=True)
class StdinSource:
    """Standard input as a source of documents.

    Attributes:
        stream: Its bytes.
        lines: They are JSON lines; else they are one text.
        key: Id of the text; None makes one of its digest, so that another text is another document.
        title: Title of the text.
    """

    stream: BinaryIO
    lines: bool = False
    key: str | None = None
    title: str = ""


class FileDocuments(Iterator[Document]):
    """The documents of some paths, read as they are asked for; see `load_documents`.

    Attributes:
        skipped: What gave no document so far, and why.
        notes: What was assumed about files that did, such as their encoding.
        finished: Files that were read from begin to end; what is not in them any more is gone.
        bytes_read: Of files, so far.
        logs: Whether all that is logged too, because nobody asked to be told.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        on_skip: Callable[[SkippedFile], None] | None = None,
        stdin: StdinSource | None = None,
        listing: Listing | None = None,
    ) -> None:
        self.paths = as_paths(paths)
        self.skipped: list[SkippedFile] = []
        self.notes: list[FileNote] = []
        self.finished: set[str] = set()
        self.bytes_read = 0
        self.logs = on_skip is None
        self._on_skip, self._stdin = on_skip or _warn, stdin
        self._found = listing  # by somebody who looked already; None looks through the paths
        self._listing: Listing | None = None
        self._documents = self._read()

    @property
    def listing(self) -> Listing:
        """The files to read; the paths are looked through on first use.

        Raises:
            CorpusPathError: A path does not exist.
        """
        if self._listing is None:
            self._listing = self._found or walk(self.paths)
            for skipped in self._listing.skipped:
                self._skip(skipped)
        return self._listing

    @property
    def bytes_total(self) -> int:
        """Bytes of all files to read."""
        return sum(found.size for found in self.listing.files)

    def __next__(self) -> Document:
        return next(self._documents)

    def first_read(self) -> Self:
        """The same documents, the first of them read already: what is wrong shows before anything slow is done.

        Raises:
            EmptyCorpusError: There is none.
            CorpusPathError: A path does not exist.
        """
        first, rest = next(self._documents, None), self._documents
        if first is None:
            raise empty_corpus(self.skipped)
        self._documents = _chained(first, rest)
        return self

    def _read(self) -> Iterator[Document]:
        files = self.listing.files
        if self._stdin is not None:
            yield from self._read_stdin(self._stdin)
        for found in files:
            before, complaints = self.bytes_read, len(self.skipped)
            yield from self._read_file(found)
            self.bytes_read = before + found.size
            if len(self.skipped) == complaints:
                self.finished.add(found.file)

    def _read_file(self, found: FoundFile) -> Iterator[Document]:
        before = self.bytes_read
        reader = reader_of(found.path)
        if reader is None:  # the walk asked the same
            return
        try:
            with _opened(found.path) as stream:
                for piece in reader(self._source(found.path, found.file, stream)):
                    if not stream.closed:
                        self.bytes_read = max(self.bytes_read, before + min(stream.tell(), found.size))
                    if piece.text.strip():
                        yield _document(found, piece)
        except UnreadableFileError as error:
            self._skip(SkippedFile(shown(found.path), str(error.got), "broken", found.file))
        except OSError as error:
            self._skip(skipped_by(error, found.path, found.file))
        except (RecursionError, MemoryError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else "it does not fit the memory"
            self._skip(SkippedFile(shown(found.path), reason, "broken", found.file))

    def _read_stdin(self, given: StdinSource) -> Iterator[Document]:
        source = self._source(Path("standard input"), STDIN, given.stream)
        try:
            for piece in read_lines(source) if given.lines else read_text(source):
                if not piece.text.strip():
                    continue
                if given.lines:
                    yield FileDocument.of(STDIN, piece, f"{STDIN}:{piece.line}", str(piece.key))
                else:
                    digest = hashlib.sha256(piece.text.encode()).hexdigest()[:12]
                    piece = Piece(piece.text, given.title, key=given.key or f"stdin-{digest}")
                    yield FileDocument.of(STDIN, piece, STDIN, str(piece.key))
        except UnreadableFileError as error:
            self._skip(SkippedFile("standard input", str(error.got), "broken", STDIN))

    def _source(self, path: Path, file: str, stream: BinaryIO) -> SourceFile:
        name = shown(path)
        return SourceFile(
            path,
            stream,
            note=lambda what: self._note(FileNote(name, what)),
            skip=lambda reason, line: self._skip(SkippedFile(f"{name}:{line}", reason, "broken", file)),
        )

    def _note(self, note: FileNote) -> None:
        self.notes.append(note)
        if self.logs:
            logger.warning("%s: %s", note.path, note.what)

    def _skip(self, skipped: SkippedFile) -> None:
        self.skipped.append(skipped)
        self._on_skip(skipped)


def load_documents(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    on_skip: Callable[[SkippedFile], None] | None = None,
) -> FileDocuments:
    """Read documents from files and folders: text, Markdown, source code, JSON lines, tables, HTML, PDF, DOCX.

    A file is a document, its path (within the folder given) its id, its first heading or its name the title. Of PDFs
    each page is one, of JSON lines each line: `{"id", "title", "text"}`. Documents of white space alone are passed
    over. HTML, PDF and DOCX need `pip install 'compllm-rag[readers]'`.

    What cannot be read is left out, and the rest goes on: it is in `skipped` of what this returns and of the report of
    an ingest.

    Args:
        paths: Files or folders; folders are read in order of name. Hidden folders in them, links to folders, folders
            of programs (`node_modules`, virtual environments) and storages are left out.
        on_skip: Called with each file that is left out; None logs a warning for those that somebody may miss.

    Returns:
        An iterator over documents with `title` and `source` in their metadata; the LLM and the embedder see the title
        only. It raises `CorpusPathError` when a path does not exist.
    """
    return FileDocuments(paths, on_skip)


def some(documents: FileDocuments) -> FileDocuments:
    """The same documents, the first of them read already; see `FileDocuments.first_read`."""
    return documents.first_read()


def empty_corpus(skipped: Iterable[SkippedFile] = ()) -> EmptyCorpusError:
    """The error for a corpus without documents.

    Args:
        skipped: What was left out of it.
    """
    left_out = list(skipped)
    told = sorted(left_out, key=lambda one: not one.problem)[:1]
    first = "".join(f", the first: {one.path}: {one.reason}" for one in told)
    return EmptyCorpusError(
        "there is nothing to ingest",
        got=f"no document with text{f' ({len(left_out)} left out{first})' if left_out else ''}",
        expected="at least one",
        next_step="name files or folders that hold text, Markdown, source code, JSON lines, HTML, PDF or DOCX",
    )


def _document(found: FoundFile, piece: Piece) -> FileDocument:
    source = shown(found.path)
    if piece.line is not None:
        source = f"{source}:{piece.line}"
    key = piece.key if piece.key is not None else f"{found.name}{piece.part}"
    return FileDocument.of(found.file, piece, source, key)


def _opened(path: Path) -> BinaryIO:
    """Open a plain file, never waiting: it may have become a pipe since it was found."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UnreadableFileError("file cannot be read as documents", got="no plain file any more")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _chained(first: Document, rest: Iterator[Document]) -> Iterator[Document]:
    yield first
    yield from rest


def _warn(skipped: SkippedFile) -> None:
    if skipped.problem:
        logger.warning("left out: %s: %s", skipped.path, skipped.reason)
