"""What was chosen for each text that was ingested: how many concepts at each rate, or that it stays text.

A record's key says how many concepts it has, so whoever looks for it must know what was chosen. It is kept by the
SHA-256 of the text, in the transaction that brings the chunks, with what compressing took.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from compllm_rag.catalog.catalog import Catalog
from compllm_rag.compression.rate_policies.choosing import Choice
from compllm_rag.passages import Passage, Took

_TABLE = """CREATE TABLE IF NOT EXISTS choices (
    text TEXT PRIMARY KEY, n INTEGER NOT NULL, tokens INTEGER NOT NULL, concepts INTEGER NOT NULL,
    wished REAL, seconds REAL, reason TEXT, value TEXT NOT NULL
) WITHOUT ROWID"""
_ADD = """INSERT INTO choices VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (text) DO UPDATE SET
    n = n + excluded.n, tokens = excluded.tokens, concepts = excluded.concepts, wished = excluded.wished,
    seconds = coalesce(excluded.seconds, seconds), reason = excluded.reason, value = excluded.value"""
# Upper ends of what `stats` counts chunks by; achieved rates lie a little below the rates asked for.
BANDS = (1.0, 1.5, 2.0, 3.0, 4.0)
SLOW_S = 0.1
_NAMED = 5


@dataclass
class ChosenRates:
    """Of all chunks of a storage.

    Attributes:
        chunks: How many chunks are known here; those of a storage made by an earlier release are not.
        by_rate: Chunks with concepts by the rate achieved: the upper end of the band it lies in.
        by_reason: Chunks that stay text, by why.
        text_tokens: Tokens of those.
        expected: Of those, the least, the mean and the most that the guard measured; None where that was not kept.
        fluctuation: Root mean square of what achieved rates differ from the wished ones, in shares of these; None
            where no chunk has concepts.
        slow: Different chunks that took longer than `SLOW_S` to compress.
        slowest: Of the slowest: seconds, node and document.
    """

    chunks: int = 0
    by_rate: dict[str, int] = field(default_factory=dict)
    by_reason: dict[str, int] = field(default_factory=dict)
    text_tokens: int = 0
    expected: dict[str, float] | None = None
    fluctuation: float | None = None
    slow: int = 0
    slowest: list[dict[str, Any]] = field(default_factory=list)


class Choices:
    """Choices by text; changes commit with the rest of the catalog.

    Args:
        catalog: Where they lie; one of an earlier release has none until the first is added.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.catalog, self._there = catalog, False
        self.took = Took()

    def of(self, digest: str) -> Choice | None:
        """What was chosen for the text of this SHA-256; None where nothing was, or it is damaged."""
        with self.catalog.reading() as connection:
            if not self._is_there(connection):
                return None
            row = connection.execute("SELECT value FROM choices WHERE text = ?", (digest,)).fetchone()
        return None if row is None else _decode(row[0])

    def change(self, passages: Iterable[Passage], sign: int) -> None:
        """Count chunks that come (1) or go (-1) with their choice; one that no chunk has any more is forgotten."""
        passages = list(passages)
        known = {passage.digest: passage for passage in passages if passage.choice is not None and passage.digest}
        counted = Counter(passage.digest for passage in passages if passage.digest)
        if not counted:
            return
        with self.catalog.writing() as connection:
            if sign > 0:
                connection.execute(_TABLE)
                connection.executemany(_ADD, [self._row(p, counted[digest]) for digest, p in known.items()])
            elif self._is_there(connection):
                rows = [(n, digest) for digest, n in counted.items()]
                connection.executemany("UPDATE choices SET n = n - ? WHERE text = ?", rows)
                connection.executemany("DELETE FROM choices WHERE text = ? AND n <= 0", [row[1:] for row in rows])

    def _row(self, passage: Passage, n: int) -> tuple[Any, ...]:
        choice = passage.choice
        wished = None if choice is None else choice.wished
        seconds = self.took.take(passage.digest)
        return (
            passage.digest,
            n,
            len(passage.ids),
            sum(passage.n_concepts),
            wished,
            seconds,
            passage.reason,
            _encode(choice),
        )

    def concepts(self) -> int:
        """Concepts of all texts at the rate that queries read, each text counted once, as the store does."""
        with self.catalog.reading() as connection:
            if not self._is_there(connection):
                return 0
            return int(connection.execute("SELECT coalesce(sum(concepts), 0) FROM choices WHERE n > 0").fetchone()[0])

    def priced(self) -> Iterator[tuple[str, Choice]]:
        """Texts whose rates follow from a budget."""
        with self.catalog.reading() as connection:
            if not self._is_there(connection):
                return
            query = "SELECT text, value FROM choices WHERE n > 0 AND reason IS NULL ORDER BY text"
            for digest, value in connection.execute(query).fetchall():
                choice = _decode(value)
                if choice is not None and choice.lost:
                    yield digest, choice

    def put(self, changed: Mapping[str, Choice]) -> None:
        """Change what was chosen for texts that are there."""
        rows = [(sum(map(sum, c.n_concepts)), c.wished, _encode(c), digest) for digest, c in changed.items()]
        with self.catalog.writing() as connection:
            connection.executemany("UPDATE choices SET concepts = ?, wished = ?, value = ? WHERE text = ?", rows)

    def note_times(self) -> None:
        """Note what texts took that were compressed after they came."""
        rows = [(seconds, digest) for digest, seconds in self.took.take_all().items()]
        if rows:
            with self.catalog.writing() as connection:
                if self._is_there(connection):
                    connection.executemany("UPDATE choices SET seconds = ? WHERE text = ?", rows)

    def uncount(self) -> None:
        """Count from nothing again; what was chosen is kept until `prune`."""
        with self.catalog.writing() as connection:
            if self._is_there(connection):
                connection.execute("UPDATE choices SET n = 0")

    def prune(self) -> None:
        """Forget what no chunk has."""
        with self.catalog.writing() as connection:
            if self._is_there(connection):
                connection.execute("DELETE FROM choices WHERE n <= 0")

    def summary(self, slow_s: float = SLOW_S) -> ChosenRates:
        """Distribution and stability of rates, texts that stay text, chunks that took long."""
        made = ChosenRates()
        with self.catalog.reading() as connection:
            if not self._is_there(connection):
                return made
            _add_rates(connection, made)
            query = "SELECT count(*) FROM choices WHERE n > 0 AND seconds > ?"
            made.slow = int(connection.execute(query, (slow_s,)).fetchone()[0])
            if made.slow:
                made.slowest = list(_slowest(connection, slow_s))
        return made

    def _is_there(self, connection: sqlite3.Connection) -> bool:
        if not self._there:
            query = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'choices'"
            found = bool(connection.execute(query).fetchone()[0])
            # A table that is not committed yet may still be taken back.
            self._there = found and not self.catalog.pending
            return found
        return True


def _add_rates(connection: sqlite3.Connection, made: ChosenRates) -> None:
    squares = weight = 0.0
    found: list[tuple[float, int]] = []  # what the guard measured of how many chunks
    rows = connection.execute(
        "SELECT n, tokens, concepts, wished, reason, CASE WHEN reason IS NULL THEN '' ELSE value END "
        "FROM choices WHERE n > 0 AND tokens > 0"
    )
    for n, tokens, concepts, wished, reason, value in rows:
        made.chunks += n
        if reason is not None:
            choice = _decode(value)
            found += [] if choice is None or choice.expected is None else [(choice.expected, n)]
            made.by_reason[reason] = made.by_reason.get(reason, 0) + n
            made.text_tokens += n * tokens
        elif concepts:
            rate = tokens / concepts
            band = next((f"{top:g}" for top in BANDS if rate <= top + 1e-9), f"above {BANDS[-1]:g}")
            made.by_rate[band] = made.by_rate.get(band, 0) + n
            if wished:
                squares, weight = squares + n * (rate / wished - 1) ** 2, weight + n
    made.fluctuation = (squares / weight) ** 0.5 if weight else None
    if found:
        mean = sum(value * n for value, n in found) / sum(n for _, n in found)
        made.expected = {"least": min(found)[0], "mean": mean, "most": max(found)[0]}


def _slowest(connection: sqlite3.Connection, slow_s: float) -> Iterator[dict[str, Any]]:
    query = "SELECT text, seconds, tokens FROM choices WHERE n > 0 AND seconds > ? ORDER BY seconds DESC LIMIT ?"
    slow = {text: (seconds, tokens) for text, seconds, tokens in connection.execute(query, (slow_s, _NAMED))}
    marks = ",".join("?" * len(slow))
    named: dict[str, tuple[str, str]] = {}
    found = f"SELECT text_sha256, node_id, ref_doc_id FROM nodes WHERE text_sha256 IN ({marks})"  # noqa: S608 - question marks
    for digest, node_id, doc_id in connection.execute(found, list(slow)):
        named.setdefault(digest, (node_id, doc_id))
    for digest, (seconds, tokens) in slow.items():
        node_id, doc_id = named.get(digest, ("", ""))  # no text here: it lies in another vector store
        yield {"seconds": round(seconds, 4), "tokens": tokens, "node_id": node_id, "doc_id": doc_id}


def damaged_choices(connection: sqlite3.Connection, chunks: int, *, deep: bool) -> list[str]:
    """What is wrong with what was chosen, in words; nothing in a catalog of an earlier release.

    Args:
        connection: To the catalog.
        chunks: How many chunks it has.
        deep: Read each choice.
    """
    query = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'choices'"
    if not connection.execute(query).fetchone()[0]:
        return []
    wrong = []
    counted = int(connection.execute("SELECT coalesce(sum(n), 0) FROM choices").fetchone()[0])
    if counted > chunks:
        wrong.append(f"rates of {counted} chunks are known, and {chunks} are there")
    if deep:
        unread = sum(_decode(value) is None for (value,) in connection.execute("SELECT value FROM choices"))
        if unread:
            wrong.append(f"what was chosen for {unread} texts cannot be read")
    return wrong


def _encode(choice: Choice | None) -> str:
    if choice is None:
        return "{}"
    priced = {"sizes": choice.sizes, "lost": choice.lost} if choice.sizes else {}
    return json.dumps({"rates": choice.rates, "k": choice.n_concepts, "reason": choice.reason} | _told(choice) | priced)


def _told(choice: Choice) -> dict[str, float]:
    told = {"wished": choice.wished, "expected": choice.expected}
    return {name: value for name, value in told.items() if value is not None}


def _decode(value: str) -> Choice | None:
    try:
        held = json.loads(value)
        counts = tuple(tuple(int(k) for k in ks) for ks in held["k"])
        rates = tuple(float(rate) for rate in held["rates"])
        lost = tuple(tuple(float(each) for each in row) for row in held.get("lost", ()))
        sizes = tuple(int(size) for size in held.get("sizes", ()))
        return Choice(rates, counts, held.get("wished"), held["reason"], held.get("expected"), sizes, lost)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # the policy decides anew; another K is another key, so that no wrong concept is ever read
