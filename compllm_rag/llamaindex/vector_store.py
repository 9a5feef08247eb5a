"""`FaissTextVectorStore`: exact cosine search with the nodes' text beside it, real deletes and commits.

For `VectorStoreIndex`, `IngestionPipeline` and everything else in LlamaIndex that takes a vector store.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

import fsspec  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import numpy.typing as npt
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)

from compllm_rag.catalog import rows as node_rows
from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.flat_vectors import unit_vector
from compllm_rag.catalog.rows import StoredNode
from compllm_rag.errors import ConfigurationError, EmbedderMismatchError
from compllm_rag.handles import ProcessBound
from compllm_rag.llamaindex.heeded import refuse_options
from compllm_rag.llamaindex.node_search import allowed_ids, nearest, search_mode
from compllm_rag.llamaindex.nodes import decode_node, encode_node
from compllm_rag.llamaindex.sound import sound_nodes
from compllm_rag.llamaindex.threaded_store import ThreadedVectorStore


class NodeObserver(Protocol):
    """Told of every node that comes or goes, in the step that writes it; what it raises undoes the step."""

    def added(self, nodes: Sequence[BaseNode]) -> None:
        """Nodes are added."""

    def removed(self, nodes: Sequence[BaseNode]) -> None:
        """Nodes are deleted or replaced."""

    def cleared(self) -> None:
        """All nodes are deleted."""


class FaissTextVectorStore(ProcessBound, ThreadedVectorStore):
    """Vectors in FAISS, nodes in SQLite, one commit for both.

    Scores are cosine similarities: higher is better. Changes are visible in this instance at once, and durable and
    visible to other processes after `commit` (or `persist`). `close` gives uncommitted work up; a `with` block commits
    at its end, or rolls back when it ends by an exception. Safe between threads; one writer at a time.

    Ids may be of any length and hold any character, NUL included. Half surrogates, which UTF-8 cannot express, are
    refused in ids and replaced by U+FFFD in text and metadata; see `sound` and `metadata`.

    Args:
        dim: Dimensions of every vector.
        catalog: Where all of it lies; None keeps it in memory. See `create` and `open` for folders.
    """

    _opened_by: ClassVar[str] = "open it again there: FaissTextVectorStore.open(path, read_only=True)"
    stores_text: bool = True
    is_embedding_query: bool = True
    dim: int
    _catalog: Catalog = PrivateAttr()
    _observer: NodeObserver | None = PrivateAttr(default=None)

    def __init__(self, dim: int = 384, *, catalog: Catalog | None = None) -> None:
        made = Catalog.in_memory(dim) if catalog is None else catalog
        super().__init__(stores_text=True, dim=made.dim)  # type: ignore[call-arg, unused-ignore]
        self._catalog = made

    @classmethod
    def create(cls, path: str | os.PathLike[str], dim: int) -> Self:
        """Make an empty store in a folder.

        Raises:
            ConfigurationError: One lies there already.
            StoreReadOnlyError: The folder cannot be written.
        """
        return cls(catalog=Catalog.create(path, dim))

    @classmethod
    def open(cls, path: str | os.PathLike[str], read_only: bool = False) -> Self:
        """Open the store in a folder; errors as of `Catalog.open`."""
        return cls(catalog=Catalog.open(path, read_only=read_only))

    @classmethod
    def class_name(cls) -> str:
        """The name of this class."""
        return "FaissTextVectorStore"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Where it lies, for `from_dict`; not what is in it."""
        where = {"folder": None if self._catalog.path is None else str(self._catalog.path)}
        return {**super().to_dict(**kwargs), **where, "read_only": self._catalog.read_only}

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """Open the store that `to_dict` described.

        Raises:
            ConfigurationError: It lay in memory.
            EmbedderMismatchError: The one in that folder has vectors of another length now.
            StorageNotFoundError: There is none in that folder any more; further errors as of `Catalog.open`.
        """
        fields = data | kwargs
        if not fields.get("folder"):
            raise ConfigurationError(
                "this dictionary names no folder that could be opened",
                got="a vector store in memory",
                expected="one made by FaissTextVectorStore.create, or of a ConceptIndex with a storage_dir",
                next_step="make a new one and add the nodes again",
            )
        made = cls.open(fields["folder"], read_only=bool(fields.get("read_only")))
        if made.dim != fields["dim"]:
            made.close()
            raise EmbedderMismatchError(
                "the vectors in this folder are of another length",
                got=f"{made.dim} dimensions in {fields['folder']}",
                expected=f"{fields['dim']}",
                next_step="open the folder that was meant",
            )
        return made

    @property
    def client(self) -> Any:
        """The FAISS index that belongs to the rows now. Do not change it."""
        with self._catalog.reading():
            return self._catalog.vectors().index

    @property
    def catalog(self) -> Catalog:
        """Rows, settings and transactions."""
        return self._catalog

    @property
    def n_nodes(self) -> int:
        """How many nodes there are."""
        return self._count("count(*)")

    @property
    def n_documents(self) -> int:
        """How many documents they come from."""
        return self._count("count(DISTINCT ref_doc_id)")

    def observed_by(self, observer: NodeObserver) -> None:
        """From now on tell `observer` of every node that comes or goes."""
        self._observer = observer

    def add(self, nodes: Sequence[BaseNode], **add_kwargs: Any) -> list[str]:
        """Add nodes with their embeddings, all or none. A node whose id is there already is replaced.

        Returns:
            Their ids.

        Raises:
            EmbedderMismatchError: An embedding has another number of dimensions.
            ConfigurationError: An embedding is missing, NaN, infinite or zero; metadata or an id cannot be kept.
            StoreLockedError, StoreReadOnlyError, StoreFullError: See `Catalog.writing`.
        """
        refuse_options("adding nodes", add_kwargs)
        nodes = sound_nodes(nodes)
        latest = list({node.node_id: node for node in nodes}.values())
        if latest:
            rows = [encode_node(node) for node in latest]
            units = np.stack([self._unit(node) for node in latest])
            with self._catalog.writing() as connection:
                replaced = node_rows.ids_where(connection, "node_id", [row.node_id for row in rows])
                self._take_away(connection, replaced)
                ids = node_rows.write_rows(connection, rows)
                if self._observer is not None:
                    self._observer.added(latest)
                vectors = self._catalog.vectors(changing=True)
                vectors.remove(replaced)
                vectors.add(ids, units)
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete all nodes of a document: vectors, text and metadata. One that is not there is no error."""
        refuse_options("deleting a document", delete_kwargs)
        with self._catalog.writing() as connection:
            self._drop(connection, node_rows.ids_where(connection, "ref_doc_id", [ref_doc_id]))

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Delete nodes that are named and pass the filters.

        Raises:
            ConfigurationError: Neither is given; `clear` is for that.
        """
        refuse_options("deleting nodes", delete_kwargs, ("filters",))
        if node_ids is None and filters is None:
            raise ConfigurationError(
                "nothing says which nodes to delete", expected="node_ids or filters", next_step="use clear() for all"
            )
        with self._catalog.writing() as connection:
            self._drop(connection, [row.id for row in self._select(connection, node_ids, filters)])

    def clear(self) -> None:
        """Delete all nodes. Settings and other collections of the catalog stay; ids are not used again."""
        with self._catalog.writing() as connection:
            connection.execute("DELETE FROM nodes")
            if self._observer is not None:
                self._observer.cleared()
            self._catalog.vectors(changing=True).clear()

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Nodes that are named and pass the filters, in order of arrival; all of them when neither is given.

        Raises:
            CorruptRecordError: A row fails its checksum.
        """
        with self._catalog.reading() as connection:
            return [decode_node(row) for row in self._select(connection, node_ids, filters)]

    def iter_nodes(self, page: int = 256) -> Iterator[BaseNode]:
        """All nodes in order of arrival, in bounded memory; the store may change between pages."""
        for nodes in self.iter_pages(page):
            yield from nodes

    def iter_pages(self, page: int = 256) -> Iterator[list[BaseNode]]:
        """All nodes in order of arrival, that many at a time; the store may change between pages."""
        last = 0
        while True:
            with self._catalog.reading() as connection:
                rows = node_rows.read_after(connection, last, page)
            if not rows:
                return
            yield [decode_node(row) for row in rows]
            last = rows[-1].id

    def chunks_by_document(self) -> dict[str, int]:
        """How many nodes each document has."""
        with self._catalog.reading() as connection:
            return dict(connection.execute("SELECT ref_doc_id, count(*) FROM nodes GROUP BY ref_doc_id").fetchall())

    def node_ids(self, ref_doc_id: str) -> list[str]:
        """Ids of the nodes of a document, in order of arrival."""
        with self._catalog.reading() as connection:
            ids = sorted(node_rows.ids_where(connection, "ref_doc_id", [ref_doc_id]))
            rows = node_rows.read_ids(connection, ids)
            return [rows[id_].node_id for id_ in ids]

    def document_nodes(self, ref_doc_id: str) -> list[BaseNode]:
        """The nodes of a document in order of arrival, all of one commit: none of a replacement that is being made."""
        with self._catalog.snapshot() as (connection, _):
            ids = sorted(node_rows.ids_where(connection, "ref_doc_id", [ref_doc_id]))
            rows = node_rows.read_ids(connection, ids)
            return [decode_node(rows[id_]) for id_ in ids]

    def embedded_nodes(self, node_ids: Sequence[str]) -> list[BaseNode]:
        """Nodes that are named, with their embeddings (of length 1); ids that are not there are skipped."""
        with self._catalog.reading() as connection:
            rows = node_rows.read_ids(connection, node_rows.ids_where(connection, "node_id", node_ids))
            found = self._catalog.vectors().get(rows)
        nodes = []
        for id_, row in rows.items():
            node = decode_node(row)
            node.embedding = found[id_].tolist() if id_ in found else None
            nodes.append(node)
        return nodes

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Find the nodes most similar to an embedding.

        `query.doc_ids=[]` allows nothing; `query.node_ids=[]` is what LlamaIndex's retriever passes for "no limit".

        Args:
            query: What is asked. The modes are DEFAULT and MMR (similar to the query, and not to each other).
            **kwargs: Of MMR: `mmr_threshold` (0 to 1; 0.5), and `mmr_prefetch_k` or `mmr_prefetch_factor`, how many
                of the most similar nodes are chosen from: 4 times `similarity_top_k`, and 100 at least.

        Returns:
            Nodes (without embeddings), cosine similarities and ids, best first; ties in order of arrival. Of MMR the
            scores are those by which nodes were chosen.

        Raises:
            EmbedderMismatchError: The embedding has another number of dimensions.
            ConfigurationError: It is missing, NaN, infinite or zero; another mode; an option that the mode does not
                have; a filter that makes no sense.
            CorruptRecordError: A row fails its checksum, or the vectors were damaged.
        """
        diversity = search_mode(query, kwargs)
        if query.similarity_top_k < 1:
            raise ConfigurationError(
                "similarity_top_k makes no sense", got=query.similarity_top_k, expected="at least 1"
            )
        if query.query_embedding is None:
            raise ConfigurationError("the query has no embedding", next_step="give query_embedding")
        vector = unit_vector(query.query_embedding, self.dim, "the query")
        with self._catalog.snapshot() as (connection, vectors):
            allowed = allowed_ids(connection, query)
            found = nearest(connection, vectors, vector, query.similarity_top_k, allowed, diversity)
            nodes = [decode_node(row) for row, _ in found]
        return VectorStoreQueryResult(
            nodes=nodes, similarities=[score for _, score in found], ids=[node.node_id for node in nodes]
        )

    def commit(self) -> None:
        """Make uncommitted work durable and visible to others; see `Catalog.commit`."""
        self._catalog.commit()

    def rollback(self) -> None:
        """Give uncommitted work up."""
        self._catalog.rollback()

    def close(self) -> None:
        """Let go of all files. Uncommitted work is given up, never committed silently."""
        self._catalog.close()

    def persist(self, persist_path: str = "", fs: fsspec.AbstractFileSystem | None = None) -> None:
        """Commit. The path is not used: a store lies in the folder it was made in.

        Raises:
            ConfigurationError: The store lies in memory, so that nothing would persist.
        """
        if self._catalog.path is None:
            raise ConfigurationError(
                "this store lies in memory and cannot persist",
                next_step="make it with FaissTextVectorStore.create(path, dim)",
            )
        self.commit()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._catalog.__exit__(kind, error, trace)

    def _count(self, what: str) -> int:
        with self._catalog.reading() as connection:
            (number,) = connection.execute(f"SELECT {what} FROM nodes").fetchone()
            return int(number)

    def _unit(self, node: BaseNode) -> npt.NDArray[np.float32]:
        if node.embedding is None:
            raise ConfigurationError(
                f"node {node.node_id!r:.80} has no embedding", next_step="embed it before adding it"
            )
        return unit_vector(node.embedding, self.dim, f"node {node.node_id!r:.80}")

    def _drop(self, connection: sqlite3.Connection, ids: Sequence[int]) -> None:
        if ids:
            self._take_away(connection, ids)
            self._catalog.vectors(changing=True).remove(ids)

    def _take_away(self, connection: sqlite3.Connection, ids: Sequence[int]) -> None:
        if ids and self._observer is not None:
            self._observer.removed([decode_node(row) for row in node_rows.read_ids(connection, ids).values()])
        node_rows.delete_rows(connection, ids)

    def _select(
        self, connection: sqlite3.Connection, node_ids: list[str] | None, filters: MetadataFilters | None
    ) -> Iterator[StoredNode]:
        if node_ids is None and filters is None:
            return node_rows.read_all(connection)
        asked: Any = node_ids
        node_ids = [asked] if isinstance(asked, str) else node_ids  # its letters would be ids of no node
        query = VectorStoreQuery(node_ids=node_ids, filters=filters)
        if node_ids == []:  # no node, and not LlamaIndex's "no limit"
            return iter(())
        allowed = allowed_ids(connection, query)
        return node_rows.read_all(connection) if allowed is None else node_rows.read_each(connection, allowed.tolist())
