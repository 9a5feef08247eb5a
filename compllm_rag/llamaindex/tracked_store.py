"""`TrackedVectorStore`: any LlamaIndex vector store beside a catalog that knows which concepts its nodes refer to.

The other store keeps vectors and text, and has no transactions with the catalog: what is added or deleted there is so
at once. The catalog follows in the same step, and an error undoes nothing that the other store has done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.storage.docstore.types import RefDocInfo
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)

from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.rows import StoredNode
from compllm_rag.catalog.tracked import TrackedNode, TrackedNodes
from compllm_rag.errors import ConfigurationError, StorageMismatchError
from compllm_rag.handles import ProcessBound
from compllm_rag.library import Passage
from compllm_rag.llamaindex.filters import matches
from compllm_rag.llamaindex.inner_store import has_nodes, limited, listed
from compllm_rag.llamaindex.nodes import decode_node, encode_node
from compllm_rag.llamaindex.sound import sound_nodes
from compllm_rag.llamaindex.threaded_store import ThreadedVectorStore
from compllm_rag.llamaindex.vector_store import FaissTextVectorStore

_PAGE = 256


class TrackingObserver(Protocol):
    """What an index does when nodes come and go; see `AccountsObserver`."""

    def added(self, nodes: Sequence[BaseNode]) -> None:
        """Nodes are added."""

    def gone(self, nodes: Mapping[str, tuple[str, Passage]]) -> None:
        """Nodes are taken away."""

    def passages(self, nodes: Sequence[BaseNode]) -> list[Passage]:
        """Their texts, as the LLM gets them."""

    def complete(self, nodes: Sequence[BaseNode]) -> None:
        """Have their concepts."""

    def recheck(self, keys: Mapping[str, Sequence[str]]) -> None:
        """Some of the concepts that nodes have may have been lost."""

    def flush(self) -> None:
        """Have what was made on the disk."""

    def cleared(self) -> None:
        """All nodes are taken away."""


class TrackedVectorStore(ProcessBound, ThreadedVectorStore):
    """A vector store of somebody else's, with a catalog that keeps count of its nodes' concepts.

    `ConceptIndex.from_vector_store` makes it; `client` is the other store.

    Args:
        inner: Keeps vectors and, if it can, text.
        catalog: Keeps which concepts each node refers to, and text where `inner` keeps none.
    """

    stores_text: bool = True
    is_embedding_query: bool = True
    _inner: BasePydanticVectorStore = PrivateAttr()
    _tracked: TrackedNodes = PrivateAttr()
    _observer: TrackingObserver | None = PrivateAttr(default=None)
    _since: dict[str, Sequence[str]] = PrivateAttr(default_factory=dict)  # keys of nodes noted since the last commit
    _opened_by: ClassVar[str] = "open it there with ConceptIndex.from_vector_store"

    def __init__(self, inner: BasePydanticVectorStore, catalog: Catalog) -> None:
        if not inner.is_embedding_query:
            raise ConfigurationError(
                "this vector store embeds by itself", got=type(inner).__name__, expected="one that takes embeddings"
            )
        super().__init__(stores_text=True)  # type: ignore[call-arg, unused-ignore]
        self._inner, self._tracked = inner, TrackedNodes(catalog)

    @classmethod
    def class_name(cls) -> str:
        """The name of this class."""
        return "TrackedVectorStore"

    @property
    def client(self) -> BasePydanticVectorStore:
        """The other store. What is changed in it directly is not known here until `ConceptIndex.collect_garbage`."""
        return self._inner

    @property
    def catalog(self) -> Catalog:
        """What is known of its nodes."""
        return self._tracked.catalog

    @property
    def dim(self) -> int:
        """Dimensions of the vectors."""
        return self.catalog.dim

    @property
    def n_nodes(self) -> int:
        """How many nodes are known."""
        return len(self._tracked)

    def observed_by(self, observer: TrackingObserver) -> None:
        """From now on tell `observer` of every node that comes or goes."""
        self._observer = observer

    def add(self, nodes: Sequence[BaseNode], **add_kwargs: Any) -> list[str]:
        """Add nodes with their embeddings; a node whose id is known is replaced.

        Raises:
            StoreLockedError, StoreReadOnlyError, StoreFullError: See `Catalog.writing`.
        """
        latest = list({node.node_id: node for node in sound_nodes(nodes)}.values())
        if latest:
            with self.catalog.writing():
                known = self._tracked.get([node.node_id for node in latest])
                self._take_away(known)
                self._note(latest)
                # Last: when it raises, the catalog goes back to what it knew. Some stores pass over an id they have.
                if known:
                    self._inner.delete_nodes(list(known))
                self._inner.add(latest, **add_kwargs)  # type: ignore[arg-type, unused-ignore]
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete all nodes of a document."""
        with self.catalog.writing():
            self._take_away(self._tracked.get(self._tracked.of_document(ref_doc_id)))
            self._inner.delete(ref_doc_id, **delete_kwargs)

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Delete nodes that are named and pass the filters.

        Raises:
            ConfigurationError: Neither is given, or the store cannot list what passes, or delete single nodes.
        """
        if node_ids is None and filters is None:
            raise ConfigurationError(
                "nothing says which nodes to delete", expected="node_ids or filters", next_step="use clear() for all"
            )
        going = node_ids if filters is None else [node.node_id for node in self.get_nodes(node_ids, filters)]
        if going:
            with self.catalog.writing():
                known = self._tracked.get(going)
                self._take_away(known)
                self._delete_inside(list(going), known, delete_kwargs)

    def clear(self) -> None:
        """Delete all nodes."""
        with self.catalog.writing():
            self._tracked.clear()
            self._seen().cleared()
            self._inner.clear()

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Nodes that are named and pass the filters; all of them when neither is given.

        Raises:
            ConfigurationError: The store cannot list its nodes.
        """
        if node_ids == []:  # some stores take an empty list for all
            return []
        if not self._inner.stores_text:
            pages = self._tracked.pages() if node_ids is None else [node_ids]
            kept = [node for page in pages for node in self._tracked.get(page).values()]
            nodes = [_node_of(node) for node in kept]
            return [n for n in nodes if filters is None or matches(filters, n.metadata, n.ref_doc_id or n.node_id)]
        if node_ids is None:
            return listed(self._inner, None, filters)
        pages = [node_ids[start : start + _PAGE] for start in range(0, len(node_ids), _PAGE)]
        return [node for page in pages for node in listed(self._inner, page, filters)]

    def iter_pages(self, page: int = _PAGE) -> Iterator[list[BaseNode]]:
        """All nodes that are known, a page at a time."""
        for node_ids in self._tracked.pages(page):
            yield self.get_nodes(node_ids)

    def chunks_by_document(self) -> dict[str, int]:
        """How many nodes each document has."""
        return self._tracked.by_document()

    def node_ids(self, ref_doc_id: str) -> list[str]:
        """Ids of the nodes of a document, in order of arrival."""
        return self._tracked.of_document(ref_doc_id)

    def embedded_nodes(self, node_ids: Sequence[str]) -> list[BaseNode]:
        """None: nothing common to all vector stores gives vectors back, so they are made again."""
        return []

    def absent(self) -> list[str]:
        """Ids of nodes that are known here and that the other store does not have any more.

        Raises:
            ConfigurationError: The store cannot list its nodes.
        """
        gone: list[str] = []
        for page in self._tracked.pages(_PAGE):
            if isinstance(self._inner, SimpleVectorStore):
                present = self._inner.data.embedding_dict.keys() & set(page)
            else:
                present = {node.node_id for node in listed(self._inner, page, None)}
            gone += [node_id for node_id in page if node_id not in present]
        return gone

    def unknown(self) -> list[BaseNode]:
        """Nodes of the other store that are not known here.

        Raises:
            ConfigurationError: The store cannot list its nodes, or keeps no text.
        """
        if not self._inner.stores_text:
            raise ConfigurationError(
                "nodes that others brought into this vector store have no text",
                got=type(self._inner).__name__,
                expected="a vector store that keeps text",
                next_step="insert the documents through the index",
            )
        nodes = listed(self._inner, None, None)
        known: set[str] = set()
        for start in range(0, len(nodes), _PAGE):
            known |= self._tracked.get([node.node_id for node in nodes[start : start + _PAGE]]).keys()
        return [node for node in nodes if node.node_id not in known]

    def adopt(self, nodes: Sequence[BaseNode]) -> None:
        """Know nodes that the other store has, and have their concepts."""
        self._seen().complete(nodes)
        with self.catalog.writing():
            self._note(nodes)

    def forget(self, node_ids: Sequence[str]) -> None:
        """Know nodes no more that the other store does not have."""
        with self.catalog.writing():
            self._take_away(self._tracked.get(node_ids))

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Ask the other store.

        Raises:
            ConfigurationError: The query is limited to documents or nodes, and the store would not heed that.
            StorageMismatchError: It found what this catalog has no text of, although it should.
        """
        if query.doc_ids == [] or not (self.n_nodes or has_nodes(self._inner)):
            return VectorStoreQueryResult(nodes=[], similarities=[], ids=[])  # some stores take an empty list for all
        result = self._inner.query(limited(self._inner, query, self._tracked.of_document), **kwargs)
        if self._inner.stores_text:
            return result
        kept = self._tracked.get(result.ids or [])
        lost = [node_id for node_id in result.ids or [] if node_id not in kept]
        if lost:
            raise StorageMismatchError(
                "the vector store has vectors whose text is not in this storage",
                got=f"node {lost[0]!r:.80}",
                expected="the vector store that belongs to the storage",
                next_step="give the one that was filled with it, or make both anew",
            )
        nodes = [_node_of(kept[node_id]) for node_id in result.ids or []]
        return VectorStoreQueryResult(nodes=nodes, similarities=result.similarities, ids=result.ids)

    def ref_doc_info(self) -> dict[str, RefDocInfo]:
        """The nodes of every document, and the metadata of its first.

        Raises:
            ConfigurationError: The store cannot list its nodes.
        """
        found: dict[str, RefDocInfo] = {}
        for nodes in self.iter_pages():
            for node in nodes:
                document = found.setdefault(node.ref_doc_id or node.node_id, RefDocInfo(metadata=node.metadata))
                document.node_ids.append(node.node_id)
        return found

    def commit(self) -> None:
        """Make durable what the catalog knows; the other store has done so in its own way."""
        self.catalog.commit()
        self._since.clear()

    def rollback(self) -> None:
        """Keep what was done: the other store cannot take it back, and the catalog must not forget it."""
        if self.catalog.pending:
            self._seen().flush()
            self._seen().recheck(self._since)  # a flush that failed before this one has forgotten what it had
            self.commit()

    def close(self) -> None:
        """Close the catalog. The other store stays open: it is whose it was."""
        self.catalog.close()

    def persist(self, persist_path: str = "", fs: Any = None) -> None:
        """Commit, and let the other store persist in its way where a path is given."""
        self.commit()
        if persist_path:
            self._inner.persist(persist_path, fs=fs)

    def _seen(self) -> TrackingObserver:
        if self._observer is None:
            raise ConfigurationError(
                "this vector store belongs to no index", next_step="make it with ConceptIndex.from_vector_store"
            )
        return self._observer

    def _note(self, nodes: Sequence[BaseNode]) -> None:
        whole, seen = not self._inner.stores_text, self._seen()
        notes = []
        for node, passage in zip(nodes, seen.passages(nodes), strict=True):
            row = encode_node(node) if whole else None
            notes.append(
                TrackedNode(
                    node.node_id,
                    node.ref_doc_id or node.node_id,
                    passage.keys,
                    passage.n_concepts,
                    len(passage.ids),
                    row.text if row else None,
                    row.node if row else None,
                    passage.others,
                    passage.digest,
                )
            )
        self._tracked.add(notes)
        seen.added(nodes)
        self._since |= {note.node_id: note.passage.all_keys for note in notes}

    def _take_away(self, known: Mapping[str, TrackedNode]) -> None:
        if known:
            self._seen().gone({id_: (node.ref_doc_id, node.passage) for id_, node in known.items()})
            self._tracked.forget(known)
            for id_ in known:
                self._since.pop(id_, None)

    def _delete_inside(self, going: list[str], known: Mapping[str, TrackedNode], options: dict[str, Any]) -> None:
        try:
            self._inner.delete_nodes(going, **options)
        except NotImplementedError as error:
            # Whole documents every store can delete.
            documents = {node.ref_doc_id for node in known.values()}
            if any(self._tracked.of_document(document) for document in documents) or len(known) < len(going):
                raise ConfigurationError(
                    "this vector store cannot delete single nodes",
                    got=type(self._inner).__name__,
                    next_step="delete whole documents, with delete_ref_doc",
                ) from error
            for document in documents:
                self._inner.delete(document, **options)


NodeStore = FaissTextVectorStore | TrackedVectorStore


def _node_of(kept: TrackedNode) -> BaseNode:
    held = json.loads(kept.node or "{}")
    return decode_node(StoredNode(0, kept.ref_doc_id, kept.node_id, kept.text or "", held["kind"], held["fields"]))
