"""What a storage holds, document by document: the numbers behind `stats` and `ingest`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llama_index.core.schema import BaseNode, MetadataMode

from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.kvstore import CatalogKVStore

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
    """Keeps one account per document in the catalog, in the same transaction as the nodes themselves."""

    def __init__(self, kvstore: CatalogKVStore, library: ConceptLibrary) -> None:
        self._kv, self._library = kvstore, library

    def of_nodes(self, nodes: Iterable[BaseNode]) -> Account:
        """Counts of a set of nodes."""
        total = Account()
        for node in nodes:
            passage = self._library.passage(node.get_content(metadata_mode=MetadataMode.NONE))
            total = total.plus(Account(1, len(passage.keys), len(passage.ids), sum(passage.n_concepts)))
        return total

    def change(self, nodes: Sequence[BaseNode], sign: int) -> None:
        """Add (1) or take away (-1) nodes."""
        groups: dict[str, list[BaseNode]] = {}
        for node in nodes:
            groups.setdefault(node.ref_doc_id or "", []).append(node)
        for doc_id, group in groups.items():
            account = self.of_document(doc_id).plus(self.of_nodes(group), sign)
            if account.chunks > 0:
                self._kv.put(doc_id, asdict(account), collection=_COLLECTION)
            else:
                self._kv.delete(doc_id, collection=_COLLECTION)

    def of_document(self, doc_id: str) -> Account:
        """Counts of one document; zeros when it is not there."""
        found: dict[str, Any] | None = self._kv.get(doc_id, collection=_COLLECTION)
        return Account(**found) if found else Account()

    def total(self) -> tuple[int, Account]:
        """Number of documents, and the sums over them."""
        rows = self._kv.get_all(collection=_COLLECTION)
        total = Account()
        for row in rows.values():
            total = total.plus(Account(**row))
        return len(rows), total
