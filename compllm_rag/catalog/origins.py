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

    def record(self, doc_id: str, source: str) -> None:
        """Remember where a document came from, if that is within the paths given.

        Args:
            doc_id: Of the document.
            source: Its file, with `:line` behind it where the file holds several.
        """
        file = self._file(source)
        if file is not None and self._kv.get(doc_id, collection=_COLLECTION) != {"file": file}:
            self._kv.put(doc_id, {"file": file}, collection=_COLLECTION)

    def forget(self, doc_id: str) -> None:
        """Forget a document that is deleted."""
        if self._kv.get(doc_id, collection=_COLLECTION) is not None:
            self._kv.delete(doc_id, collection=_COLLECTION)

    def gone(self, met: Collection[str]) -> list[str]:
        """Ids of the documents that came from within the paths given and were not met there now."""
        rows = self._kv.get_all(collection=_COLLECTION)
        roots = [real for _, real in self._roots]
        return [id_ for id_, row in rows.items() if id_ not in met and _lies_in(str(row.get("file")), roots)]

    def _file(self, source: str) -> str | None:
        path = _absolute(_LINE.sub("", source) if ".jsonl:" in source.lower() else source)
        for named, real in self._roots:
            if source and _lies_in(path, [named]):
                return real + path[len(named) :]
        return None


def _absolute(path: str | Path) -> str:
    return os.path.normpath(Path(path).absolute())


def _lies_in(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)
