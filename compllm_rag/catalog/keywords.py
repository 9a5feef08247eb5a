"""Search by words (BM25) over the text of a catalog.

The index of words is built from the rows by whoever searches first, and again once rows have changed. It is in no file:
20,000 chunks of 150 words take 2 to 4 s of one core, a search in them 1 ms. From a file it would be there at once, when
it was written and found to belong to the rows; so nothing on the disk can disagree with the text.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from compllm_rag.catalog import rows as node_rows
from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.database import read_state
from compllm_rag.catalog.rows import StoredNode
from compllm_rag.catalog.words import words
from compllm_rag.errors import ConfigurationError
from compllm_rag.handles import ProcessBound


class _Words(NamedTuple):
    """Ids of rows (n_rows,), numbers of words, and what bm25s made of them; None where there are no words."""

    ids: npt.NDArray[np.int64]
    vocabulary: dict[str, int]
    index: Any


class KeywordIndex(ProcessBound):
    """BM25 over the rows of a catalog, as they were committed at each search. Safe between threads.

    Who searches beside an upload does not see it half done, nor waits for it; who brings something in sees it at once.

    Args:
        catalog: Where the text lies.
        text_of: What of a row is searched.

    Raises:
        ConfigurationError: bm25s is not installed.
    """

    _opened_by = "make one there, from the index of that process"

    def __init__(self, catalog: Catalog, text_of: Callable[[StoredNode], str]) -> None:
        self._bm25s = _bm25s()
        self._catalog, self._text_of = catalog, text_of
        self._lock = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._held = _Words(np.empty(0, dtype=np.int64), {}, None)

    def search(
        self,
        question: str,
        k: int,
        allowed: Callable[[sqlite3.Connection], npt.NDArray[np.int64] | None] = lambda connection: None,
    ) -> list[tuple[StoredNode, float]]:
        """Find the rows that say the words of a question, rare words counting more.

        Args:
            question: In words.
            k: How many rows, at most; those without any of the words are never among them.
            allowed: Gives the ids (n,), ascending, of the rows that may be found; None for all.

        Returns:
            Rows and BM25 scores, best first; ties in order of arrival.

        Raises:
            CorruptRecordError: A row fails its checksum.
        """
        with self._catalog.snapshot() as (connection, _):
            ids, vocabulary, index = self._at(connection)
            known = [vocabulary[word] for word in words(question) if word in vocabulary]
            if not known:
                return []
            scores: npt.NDArray[np.float32] = index.get_scores_from_ids(known)  # (n_rows,)
            among = allowed(connection)
            if among is not None:
                scores = np.where(np.isin(ids, among), scores, 0)
            # lexsort: by score, and by place where scores are equal.
            best = np.lexsort((ids, -scores))[:k]
            hits = [(int(ids[place]), float(scores[place])) for place in best if scores[place] > 0]
            return list(node_rows.with_rows(connection, hits))

    def _at(self, connection: sqlite3.Connection) -> _Words:
        """The words of the rows that a view shows; one thread makes them, the others wait for it."""
        # A view of the last commit never changed anything itself. Uncommitted rows have no generation yet; every change
        # of theirs counts up within the connection of whoever makes them.
        stamp = (read_state(connection).number, connection.total_changes)
        with self._lock:
            if stamp != self._stamp:
                self._held, self._stamp = self._made(connection), stamp
            return self._held

    def _made(self, connection: sqlite3.Connection) -> _Words:
        ids: list[int] = []
        vocabulary: dict[str, int] = {}
        corpus: list[list[int]] = []
        for row in node_rows.read_all(connection):
            ids.append(row.id)
            corpus.append([vocabulary.setdefault(word, len(vocabulary)) for word in words(self._text_of(row))])
        index = self._bm25s.BM25(method="lucene") if vocabulary else None
        if index is not None:
            index.index((corpus, dict(vocabulary)), show_progress=False)
        return _Words(np.array(ids, dtype=np.int64), vocabulary, index)


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise ConfigurationError(
            "search by words needs a package that is not installed",
            got=str(error),
            expected="bm25s",
            next_step="pip install 'compllm-rag[bm25]'",
        ) from error
    return bm25s
