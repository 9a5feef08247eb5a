"""What a storage holds, document by document: the numbers behind `stats` and `ingest`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from compllm_rag.catalog.choices import Choices
from compllm_rag.catalog.kv import KeyValues
from compllm_rag.catalog.measures import Measures
from compllm_rag.catalog.references import References
from compllm_rag.library import Passage

_COLLECTION = "compllm/accounts"


@dataclass(frozen=True)
class Account:
    """Counts of one document, or sums over many."""

    chunks: int = 0
    segments: int = 0
    source_tokens: int = 0
    concepts: int = 0

    def plus(self, other: Account, sign: int = 1) -> Account:
        """Field by field."""
        return Account(*(a + sign * b for a, b in zip(_values(self), _values(other), strict=True)))


def _values(account: Account) -> list[int]:
    return list(asdict(account).values())


class Accounts:
    """Keeps one account per document in the catalog, in the same transaction as the nodes themselves.

    Attributes:
        references: How often chunks refer to each segment, changed along with the accounts.
        choices: What was chosen for each text, likewise.
        measures: Achieved rates of chunks, likewise.
    """

    def __init__(self, values: KeyValues) -> None:
        self._kv = values
        self.references, self.measures = References(values.catalog), Measures(values)
        self.choices = Choices(values.catalog)

    def change(self, chunks: Iterable[tuple[str, Passage]], sign: int) -> None:
        """Add (1) or take away (-1) chunks, each given as its document's id and its passage."""
        groups: dict[str, list[Passage]] = {}
        for doc_id, passage in chunks:
            groups.setdefault(doc_id, []).append(passage)
        rates: list[float] = []
        self.choices.change((passage for passages in groups.values() for passage in passages), sign)
        for doc_id, passages in groups.items():
            self.references.change((key for passage in passages for key in passage.all_keys), sign)
            account = self.of_document(doc_id).plus(_of_passages(passages), sign)
            if account.chunks > 0:
                self._kv.put(doc_id, asdict(account), collection=_COLLECTION)
            else:
                self._kv.delete(doc_id, collection=_COLLECTION)
            rates += [passage.achieved_rate for passage in passages if passage.keys]
        self.measures.change(rates, sign)

    def replace(self, doc_id: str, former: Passage, now: Passage) -> None:
        """Count a chunk of a document anew whose choice was changed where it is kept."""
        self.references.change(former.all_keys, -1)
        self.references.change(now.all_keys, 1)
        account = self.of_document(doc_id).plus(_of_passages([former]), -1).plus(_of_passages([now]))
        self._kv.put(doc_id, asdict(account), collection=_COLLECTION)
        self.measures.change([former.achieved_rate] if former.keys else [], -1)
        self.measures.change([now.achieved_rate] if now.keys else [], 1)

    def of_document(self, doc_id: str) -> Account:
        """Counts of one document; zeros when it is not there."""
        found: dict[str, Any] | None = self._kv.get(doc_id, collection=_COLLECTION)
        return Account(**found) if found else Account()

    def clear(self) -> None:
        """Start all accounts and counts from nothing; what was chosen for texts is kept until `choices.prune`."""
        for doc_id in self._kv.get_all(collection=_COLLECTION):
            self._kv.delete(doc_id, collection=_COLLECTION)
        self.references.clear()
        self.measures.clear()
        self.choices.uncount()

    def of_documents(self) -> dict[str, Account]:
        """The account of every document."""
        return {doc_id: Account(**row) for doc_id, row in self._kv.get_all(collection=_COLLECTION).items()}

    def total(self) -> tuple[int, Account]:
        """Number of documents, and the sums over them."""
        rows = self._kv.get_all(collection=_COLLECTION)
        total = Account()
        for row in rows.values():
            total = total.plus(Account(**row))
        return len(rows), total


def _of_passages(passages: Iterable[Passage]) -> Account:
    total = Account()
    for passage in passages:
        total = total.plus(Account(1, len(passage.keys), len(passage.ids), sum(passage.n_concepts)))
    return total
