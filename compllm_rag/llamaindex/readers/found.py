"""What is met between files and documents: open files, texts, documents with an origin, and what was left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import Document

from compllm_rag.errors import UnreadableFileError

SkipKind = Literal[
    "unlisted", "unreadable", "vanished", "broken", "special", "reader", "unknown", "excluded", "storage"
]


@dataclass(frozen=True)
class SkippedFile:
    """A file or folder (or a line of a file) that gave no document.

    Attributes:
        path: Where it lies, with `:line` behind it where only that line was left out.
        reason: Why, in one line.
        kind: `unlisted` (a folder that cannot be listed), `unreadable` (a file that cannot be opened), `vanished`,
            `broken` (what is in it cannot be read), `special` (a link to nowhere, a pipe, a device), `reader` (a
            package is missing), `unknown` (nothing here reads such files), `excluded` (a folder that is no part of a
            corpus unless it is named), `storage` (a storage's own files, which never are).
        file: The same path with the links of its folder followed, as documents' origins are kept.
    """

    path: str
    reason: str
    kind: SkipKind
    file: str = field(default="", repr=False, compare=False)

    @property
    def problem(self) -> bool:
        """Whether somebody may miss it: `ingest --strict` fails then."""
        return self.kind not in ("unknown", "excluded", "storage")

    def fields(self) -> dict[str, str]:
        """Plain values."""
        return {"path": self.path, "reason": self.reason, "kind": self.kind}


@dataclass(frozen=True)
class FileNote:
    """Something that was assumed about a file or a document that came in.

    Attributes:
        path: Which one.
        what: What was assumed, in one line.
    """

    path: str
    what: str

    def fields(self) -> dict[str, str]:
        """Plain values."""
        return {"path": self.path, "what": self.what}


class FileDocument(Document):
    """A document that knows the file it was read from; kept beside its fields, so that no node inherits it."""

    _file: str = PrivateAttr(default="")
    _within: str = PrivateAttr(default="")

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)

    @classmethod
    def class_name(cls) -> str:
        """As of any document: what is kept of it must be readable without this class."""
        return "Document"

    @property
    def file(self) -> str:
        """Absolute path of its file, links of the folder named followed; `-` is standard input."""
        return self._file

    @property
    def within(self) -> str:
        """What tells it from the other documents of its file: `#` and more, or nothing."""
        return self._within

    @classmethod
    def of(cls, file: str, piece: Piece, source: str, key: str) -> FileDocument:
        """A document from a piece of a file."""
        hidden = ["source"]
        made = cls(
            id_=key,
            text=piece.text,
            metadata={"title": piece.title, "source": source, **piece.metadata},
            excluded_llm_metadata_keys=hidden,
            # What differs from page to page must not make the embeddings of equal texts differ.
            excluded_embed_metadata_keys=[*hidden, *piece.metadata],
        )
        made._file = file
        made._within = piece.part if piece.key is None else f"#{piece.key}"
        return made


@dataclass(frozen=True)
class Piece:
    """The text of one document.

    Attributes:
        text: All of it.
        title: Its title, perhaps empty.
        key: The id that the file itself gives it; None takes the file's name and `part`.
        part: What tells the pieces of one file apart, as the end of an id.
        line: The line it stands in, where each line is a document.
        metadata: More, for the LLM to read.
    """

    text: str
    title: str
    key: str | None = None
    part: str = ""
    line: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceFile:
    """An open file, as readers get it.

    Attributes:
        path: Where it lies; for its name, not to be opened again.
        stream: Its bytes.
        note: Tells what was assumed.
        skip: Tells that a line was left out, and why.
    """

    path: Path
    stream: BinaryIO
    note: Callable[[str], None]
    skip: Callable[[str, int], None]

    @property
    def stem(self) -> str:
        """Its name without the ending."""
        return shown(self.path.stem)


def shown(path: str | Path) -> str:
    """A path as valid Unicode: bytes of a name that are none are written as such, in hexadecimal."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def broken(reason: str) -> UnreadableFileError:
    """The error of a reader: what is wrong with its file, in one line."""
    return UnreadableFileError("file cannot be read as documents", got=" ".join(reason.split()))
