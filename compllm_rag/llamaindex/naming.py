"""Ids of documents from files: one that another file's document has already is never taken from it.

A document is called by its path within the folder that was ingested, or by the id that its line has. So two folders
may each hold a document of one name. The second is then called by more of its path (`bread/ferry.md`), and found again
under that id, wherever its folder moves.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from llama_index.core.schema import Document
from llama_index.core.storage.docstore.types import BaseDocumentStore

from compllm_rag.catalog.origins import Origins
from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.readers.found import FileDocument, FileNote, shown
from compllm_rag.llamaindex.tracked_store import NodeStore

logger = logging.getLogger(__name__)
_STDIN = "-"
# Share of words that two states of a document have in common at least.
_ALIKE = 1 / 3


class Named(Protocol):
    """Where documents lie that have names: a `ConceptIndex`."""

    origins: Origins

    @property
    def faiss(self) -> NodeStore:
        """Vectors and text."""
        ...

    @property
    def docstore(self) -> BaseDocumentStore:
        """Hashes of documents."""
        ...


class Names:
    """Gives documents from files their ids, within one transaction of the catalog.

    Args:
        index: Where they go.

    Attributes:
        notes: Documents that could not be called as they would be.
        moved: How many came from a file other than before, which is not there any more.
    """

    def __init__(self, index: Named) -> None:
        self.notes: list[FileNote] = []
        self.moved = 0
        self._index = index
        self._others: dict[str, list[str]] | None = None
        self._given: dict[str, str] = {}

    def settled(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents under the ids they have from now on; those that do not come from files as they are.

        Raises:
            ConfigurationError: No id is left for one.
        """
        for document in documents:
            if not isinstance(document, FileDocument) or not document.file:
                yield document
                continue
            doc_id = self._id(document)
            if self._given.get(doc_id, document.file) != document.file:
                continue  # the same file by another name
            self._given[doc_id] = document.file
            yield document if doc_id == document.id_ else document.model_copy(update={"id_": doc_id})

    def log(self) -> None:
        """Warn of the documents that could not be called as they would be."""
        for note in self.notes:
            logger.warning("%s: %s", note.path, note.what)

    def _id(self, document: FileDocument) -> str:
        asked: str = document.id_
        file = document.file
        if self._others is None:
            self._others = self._index.origins.of_same_name()
        known: list[str] = [asked, *self._others.get(asked, ())]
        files: dict[str, str | None] = {doc_id: self._file(doc_id) for doc_id in known}
        for doc_id, other in files.items():
            if other == file or (other and _same(other, file)):
                return doc_id
        left = [doc_id for doc_id, other in files.items() if other and _gone(other) and doc_id not in self._given]
        moved = self._moved(left, document.text) if left else None
        if moved is not None:
            self.moved += 1
            return moved
        if files[asked] is None:
            return asked
        longer = next((one for one in _longer(document) if self._file(one) is None), None)
        if longer is None:
            raise ConfigurationError(
                "two documents have the same id",
                got=f"{asked!r} of {file}",
                expected="unique ids",
                next_step="rename one",
            )
        self._index.origins.call(longer, asked)
        self._others.setdefault(asked, []).append(longer)
        holder = {"": "another document", _STDIN: "a text from standard input"}.get(
            files[asked] or "", files[asked] or ""
        )
        self.notes.append(FileNote(shown(file), f"{asked} is the id of {shown(holder)}; this one is {longer}"))
        return longer

    def _file(self, doc_id: str) -> str | None:
        """The file of a document that is there, empty where it has none, None where there is no such document."""
        file = self._given.get(doc_id) or self._index.origins.file_of(doc_id)
        if file is not None:
            return file
        nodes = self._index.faiss.node_ids(doc_id)
        if not nodes and self._index.docstore.get_document_hash(doc_id) is None:
            return None
        # Storages keep origins of what was ingested with its paths told; of other documents their metadata may know.
        for node in self._index.faiss.get_nodes(nodes[:1]) if nodes else ():
            source = str(node.metadata.get("source") or "")
            if source:
                path, _, line = source.rpartition(":")
                return os.path.abspath(path if path and line.isdigit() else source)  # noqa: PTH100
        return ""

    def _moved(self, doc_ids: list[str], text: str) -> str | None:
        """Of documents whose files are gone, the one that this text is a later state of, None where it is of none.

        A file that is gone may as well lie on a disk that is not mounted: what says something else is no successor.
        """
        alike = []
        for doc_id in doc_ids:
            nodes = self._index.faiss.get_nodes(self._index.faiss.node_ids(doc_id))
            former = [node.get_content() for node in nodes]
            if "".join(former) == text:
                return doc_id
            if not former or any(part in text for part in former if part.strip()):
                alike.append(doc_id)
            else:
                words, others = set(text.split()), set(" ".join(former).split())
                if len(words & others) >= _ALIKE * len(words | others):
                    alike.append(doc_id)
        return alike[0] if alike else None


def _longer(document: FileDocument) -> Iterator[str]:
    """Ids with ever more of the path of a document's file."""
    if document.file == _STDIN:
        yield f"stdin#{document.id_}"
        return
    parts = shown(document.file).replace(os.sep, "/").split("/")
    name = document.id_.removesuffix(document.within) if document.within else document.id_
    own_key = document.within == f"#{document.id_}"
    for depth in range(1 if own_key else name.count("/") + 2, len(parts) + 1):
        yield "/".join(parts[-depth:]) + document.within


def _gone(file: str) -> bool:
    if file == _STDIN:
        return False
    try:
        os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False  # nobody can tell
    return False


def _same(file: str, other: str) -> bool:
    try:
        return Path(file).samefile(other)
    except OSError:
        return False
