"""Which file each document came from, so that documents whose files are gone can be found.

Only documents that were ingested from files, with the paths told, have an origin; others are never pruned.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from compllm_rag.catalog.kv import KeyValues

_COLLECTION = "compllm/origins"
_SAME_NAMES = "compllm/same-names"
_LINE = re.compile(r":\d+$")


class Origins:
    """The file of each document, in the same transaction as its nodes.

    Args:
        values: Where they lie.
        within: The files and folders that documents now come from.
    """

    def __init__(self, values: KeyValues, within: Iterable[str | Path] = ()) -> None:
        self._kv = values
        # As named, to find a document's path in; and with links followed, to keep: the same folder under two names.
        self._roots = [(_absolute(root), os.path.realpath(root)) for root in within]

    def put(self, doc_id: str, file: str) -> None:
        """Remember the file of a document.

        Args:
            doc_id: Of the document.
            file: Absolute, links of the folder named followed.
        """
        if self._kv.get(doc_id, collection=_COLLECTION) != {"file": file}:
            self._kv.put(doc_id, {"file": file}, collection=_COLLECTION)

    def file_of(self, doc_id: str) -> str | None:
        """The file of a document, None where none is known."""
        row = self._kv.get(doc_id, collection=_COLLECTION)
        return None if row is None else str(row.get("file"))

    def call(self, doc_id: str, asked: str) -> None:
        """Remember that a document has an id of its own, since another file has a document of the same name.

        Args:
            doc_id: The id it has.
            asked: The id it would have.
        """
        self._kv.put(doc_id, {"asked": asked}, collection=_SAME_NAMES)

    def of_same_name(self) -> dict[str, list[str]]:
        """Ids of the documents that `call` named, by the id they would have."""
        found: dict[str, list[str]] = {}
        for doc_id, row in self._kv.get_all(collection=_SAME_NAMES).items():
            found.setdefault(str(row.get("asked")), []).append(doc_id)
        return found

    def forget(self, doc_id: str) -> None:
        """Forget a document that is deleted."""
        for collection in (_COLLECTION, _SAME_NAMES):
            if self._kv.get(doc_id, collection=collection) is not None:
                self._kv.delete(doc_id, collection=collection)

    @property
    def roots(self) -> list[str]:
        """The paths that documents now come from, links followed."""
        return [real for _, real in self._roots]

    def not_met(self, met: Collection[str]) -> dict[str, str]:
        """Ids and files of the documents that came from within the paths given and were not met there now."""
        rows = {id_: str(row.get("file")) for id_, row in self._kv.get_all(collection=_COLLECTION).items()}
        return {id_: file for id_, file in rows.items() if id_ not in met and lies_in(file, self.roots)}

    def file(self, source: str) -> str | None:
        """The file that a document's `source` names, None where it is not within the paths given.

        Args:
            source: A path, with `:line` behind it where the file holds several documents.
        """
        path = _absolute(_LINE.sub("", source) if ".jsonl:" in source.lower() else source)
        for named, real in self._roots:
            if source and lies_in(path, [named]):
                return real + path[len(named) :]
        return None


def _absolute(path: str | Path) -> str:
    return os.path.normpath(Path(path).absolute())


def lies_in(path: str, roots: Sequence[str]) -> bool:
    """Whether a path is one of some paths, or within one."""
    return any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)
