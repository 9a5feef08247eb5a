"""Search by words (BM25) over the text of a catalog.

The index of words is built from the rows by whoever searches first, and again once rows have changed. It is in no file:
20,000 chunks of 150 words take 2 to 4 s of one core, a search in them 1 ms. From a file it would be there at once, when
it was written and found to belong to the rows; so nothing on the disk can disagree with the text.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from compllm_rag.catalog import rows as node_rows
from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.rows import StoredNode
from compllm_rag.catalog.words import words
from compllm_rag.errors import ConfigurationError
from compllm_rag.handles import ProcessBound


class KeywordIndex(ProcessBound):
    """BM25 over the rows of a catalog, as they are at each search. Safe between threads.

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
        self._stamp: tuple[int, int] | None = None
        self._ids: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._vocabulary: dict[str, int] = {}
        self._index: Any = None

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
        with self._catalog.reading() as connection:  # threads take turns
            self._refresh(connection)
            known = [self._vocabulary[word] for word in words(question) if word in self._vocabulary]
            if not known:
                return []
            scores: npt.NDArray[np.float32] = self._index.get_scores_from_ids(known)  # (n_rows,)
            among = allowed(connection)
            if among is not None:
                scores = np.where(np.isin(self._ids, among), scores, 0)
            # lexsort: by score, and by place where scores are equal.
            best = np.lexsort((self._ids, -scores))[:k]
            hits = [(int(self._ids[place]), float(scores[place])) for place in best if scores[place] > 0]
            return list(node_rows.with_rows(connection, hits))

    def _refresh(self, connection: sqlite3.Connection) -> None:
        # Uncommitted rows have no generation yet; every change of theirs counts up within the connection.
        stamp = (self._catalog.generation, connection.total_changes if self._catalog.pending else -1)
        if stamp == self._stamp:
            return
        ids: list[int] = []
        vocabulary: dict[str, int] = {}
        corpus: list[list[int]] = []
        for row in node_rows.read_all(connection):
            ids.append(row.id)
            corpus.append([vocabulary.setdefault(word, len(vocabulary)) for word in words(self._text_of(row))])
        index = self._bm25s.BM25(method="lucene") if vocabulary else None
        if index is not None:
            index.index((corpus, dict(vocabulary)), show_progress=False)
        self._ids, self._vocabulary, self._index = np.array(ids, dtype=np.int64), vocabulary, index
        self._stamp = stamp


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
