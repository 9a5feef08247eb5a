"""Uploaded files as documents, by the readers of `ingest`; nothing of them is written to a disk."""

from __future__ import annotations

import hashlib
import unicodedata
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from llama_index.core.schema import Document

from compllm_rag.errors import UnreadableFileError
from compllm_rag.llamaindex.readers.found import FileDocument, SourceFile, broken
from compllm_rag.llamaindex.readers.kinds import SUPPORTED, missing_package, reader_of
from compllm_rag.server.document_schemas import NewDocument, Skipped
from compllm_rag.server.failures import Refusal

_LONGEST_NAME = 500
_UNPACKED = 256 << 20  # bytes of an archive's parts, as it says itself


class Read(NamedTuple):
    """What came in.

    Attributes:
        documents: Each of an id of its own.
        skipped: What gave none.
        whole: Names of files that were read from begin to end: pages that are not in them any more are gone.
    """

    documents: list[Document]
    skipped: list[Skipped]
    whole: Sequence[str] = ()


def readable_types() -> list[str]:
    """Endings of files that can be read here."""
    return sorted(ending for ending in SUPPORTED if missing_package(Path(f"a{ending}")) is None)


def read_files(files: Iterable[tuple[str, BinaryIO]]) -> Read:
    """Documents of files.

    Args:
        files: Name, as the client gave it, and bytes of each.

    Raises:
        Refusal: None gave a document, or two have the same id.
    """
    documents: list[Document] = []
    skipped: list[Skipped] = []
    whole: list[str] = []
    for given, stream in files:
        name = file_name(given)
        before, faults = len(documents), len(skipped)
        try:
            documents += _read(name, stream, skipped)
        except UnreadableFileError as error:
            skipped.append(Skipped(name=name, reason=str(error.got)))
        except RecursionError:
            skipped.append(Skipped(name=name, reason="it is nested too deeply"))
        if len(documents) == before and not any(one.name == name for one in skipped):
            skipped.append(Skipped(name=name, reason="there is no text in it"))
        if len(skipped) == faults:
            whole.append(name)
    if not documents:
        told = "; ".join(f"{one.name}: {one.reason}" for one in skipped[:5])
        raise Refusal(400, "empty_document", f"no file holds text that can be read: {told or 'there are no files'}")
    return Read(_unique(documents), skipped, whole)


def read_json(given: Iterable[NewDocument]) -> Read:
    """Documents of texts.

    Raises:
        Refusal: One has white space alone, or two have the same id.
    """
    return Read(_unique([document_of(one, one.id) for one in given]), [])


def document_of(given: NewDocument, doc_id: str | None) -> Document:
    """A document of a text.

    Args:
        given: Text, title, metadata.
        doc_id: Its id; None makes one of the text's digest.

    Raises:
        Refusal: There is white space alone.
    """
    if not given.text.strip():
        raise Refusal(400, "empty_document", "a document has no text", param="text")
    digest = hashlib.sha256(given.text.encode()).hexdigest()[:16]
    metadata = {"title": given.title, **given.metadata} if given.title else dict(given.metadata)
    return Document(id_=doc_id or f"text-{digest}", text=given.text, metadata=metadata)


def file_name(given: str) -> str:
    """A file's name as an id: with slashes, without what cannot be seen. It is never used as a path."""
    plain = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in given.replace("\\", "/"))
    return plain.strip().strip("/")[-_LONGEST_NAME:] or "file"


def _read(name: str, stream: BinaryIO, skipped: list[Skipped]) -> list[Document]:
    path = Path(PurePosixPath(name).name)
    reader = reader_of(path)
    if reader is None:
        skipped.append(Skipped(name=name, reason="no reader for such files"))
        return []
    if (package := missing_package(path)) is not None:
        skipped.append(Skipped(name=name, reason=f"the server lacks the package {package}"))
        return []
    _check_size(path, stream)
    source = SourceFile(
        path,
        stream,
        note=lambda what: None,  # which encoding was assumed
        skip=lambda reason, line: skipped.append(Skipped(name=f"{name}:{line}", reason=reason)),
    )
    return [
        FileDocument.of("", piece, name, piece.key if piece.key is not None else f"{name}{piece.part}")
        for piece in reader(source)
        if piece.text.strip()
    ]


def _check_size(path: Path, stream: BinaryIO) -> None:
    """Refuse what is small as it comes and huge once it is unpacked, or cannot be.

    Raises:
        UnreadableFileError: It is.
    """
    if path.suffix.lower() != ".docx" or not zipfile.is_zipfile(stream):
        return
    stream.seek(0)
    try:
        with zipfile.ZipFile(stream) as archive:
            size = sum(part.file_size for part in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise broken(f"no DOCX: {error}") from error
    stream.seek(0)
    if size > _UNPACKED:
        raise broken(f"it unpacks to {size >> 20} MB, more than {_UNPACKED >> 20}")


def _unique(documents: list[Document]) -> list[Document]:
    met: set[str] = set()
    for document in documents:
        if document.id_ in met:
            raise Refusal(
                422, "invalid_request", "two documents of this upload have the same id. Next step: give them names of"
                " their own", param="id",
            )  # fmt: skip
        met.add(document.id_)
    return documents
