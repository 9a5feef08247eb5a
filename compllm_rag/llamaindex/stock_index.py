"""What LlamaIndex's own `storage_context.persist(folder)` left in a folder: nodes, vectors, hashes of documents."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from llama_index.core.data_structs.data_structs import IndexDict, IndexStruct
from llama_index.core.schema import BaseNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.storage.index_store import SimpleIndexStore
from llama_index.core.vector_stores import SimpleVectorStore

from compllm_rag.errors import ConfigurationError, DataFileError, StorageNotFoundError

_DOCSTORE, _INDEX_STORE = "docstore.json", "index_store.json"
_VECTORS = ("default__vector_store.json", "vector_store.json")  # the second is that of older releases
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class StockIndex:
    """A vector index as it was persisted.

    Attributes:
        nodes: Its nodes, each with its embedding as it was made.
        hashes: Of the documents they come from, by id.
        dim: Dimensions of the embeddings; 0 where there is none.
    """

    nodes: list[BaseNode]
    hashes: dict[str, str]
    dim: int


def read_stock_index(folder: str | Path, index_id: str | None = None) -> StockIndex:
    """Read a persisted index.

    Args:
        folder: Where `storage_context.persist` wrote it.
        index_id: Which index, where there are several.

    Raises:
        StorageNotFoundError: No index was persisted there.
        DataFileError: A file cannot be read, or text and vectors do not belong together.
        ConfigurationError: There are several indexes, or none of that id, or it is none of vectors.
    """
    path = Path(folder)
    vectors_file = next((path / name for name in _VECTORS if (path / name).is_file()), None)
    if not (path / _DOCSTORE).is_file() or vectors_file is None:
        raise StorageNotFoundError(
            "no index that LlamaIndex persisted lies here",
            got=path,
            expected=f"{_DOCSTORE} and {_VECTORS[0]}, as storage_context.persist(folder) writes them",
            next_step="name that folder; where vectors and text lie in Qdrant, Chroma or the like, open "
            "ConceptIndex.from_vector_store and adopt() them",
        )
    texts, known = _parsed(path / _DOCSTORE, _read_texts)
    embeddings = _parsed(vectors_file, _read_vectors)
    nodes: list[BaseNode] = []
    for vector_id, node_id in _node_ids(path / _INDEX_STORE, index_id, embeddings).items():
        node, embedding = texts.get(node_id), embeddings.get(vector_id)
        if node is None or embedding is None:
            raise DataFileError(
                "text and vectors of this index do not belong together",
                got=f"node {node_id!r:.80} without {'text' if node is None else 'vector'}",
                expected=f"each in {_DOCSTORE} and in {vectors_file.name}",
                next_step="persist the index again, or ingest the documents",
            )
        node.embedding = embedding
        nodes.append(node)
    _check_lengths(nodes, vectors_file)
    documents = {node.ref_doc_id for node in nodes if node.ref_doc_id is not None}
    hashes = {document: known[document] for document in sorted(documents) if document in known}
    return StockIndex(nodes, hashes, len(nodes[0].embedding or []) if nodes else 0)


def _read_texts(file: Path) -> tuple[dict[str, BaseNode], dict[str, str]]:
    """Nodes by id, and hashes by document."""
    store = SimpleDocumentStore.from_persist_path(str(file))
    nodes = store.docs
    # One by one: LlamaIndex's list of all hashes has one document for each hash.
    found = {
        document: store.get_document_hash(document)
        for document in {node.ref_doc_id for node in nodes.values()}
        if document
    }
    return nodes, {document: hash_ for document, hash_ in found.items() if hash_}


def _read_vectors(file: Path) -> dict[str, list[float]]:
    held = SimpleVectorStore.from_persist_path(str(file)).data.embedding_dict
    return {vector_id: np.asarray(vector, dtype=np.float64).tolist() for vector_id, vector in held.items()}


def _node_ids(file: Path, index_id: str | None, embeddings: Mapping[str, object]) -> dict[str, str]:
    """Node ids by vector id."""
    everything = {node_id: node_id for node_id in embeddings}
    if not file.is_file():
        if index_id is not None:
            raise ConfigurationError("no index has this id", got=index_id, expected=f"a {_INDEX_STORE}")
        return everything
    structs: list[IndexStruct] = _parsed(
        file, lambda path: SimpleIndexStore.from_persist_path(str(path)).index_structs()
    )
    ours = {struct.index_id: struct for struct in structs if isinstance(struct, IndexDict)}
    if index_id is not None and index_id not in ours:
        raise ConfigurationError("no index of vectors has this id", got=index_id, expected=", ".join(ours) or "none")
    if index_id is None and len(ours) > 1:
        raise ConfigurationError(
            "there are several indexes of vectors",
            got=", ".join(ours),
            expected="the id of one",
            next_step="name it: --index-id, or index_id=",
        )
    if structs and not ours:
        raise ConfigurationError(
            "this is no index of vectors",
            got=", ".join(sorted(type(struct).__name__ for struct in structs)),
            expected="a VectorStoreIndex",
            next_step="ingest its documents",
        )
    if not ours:
        return everything
    return dict(ours[index_id or next(iter(ours))].nodes_dict)


def _check_lengths(nodes: list[BaseNode], file: Path) -> None:
    lengths = {len(node.embedding or []) for node in nodes}
    if len(lengths) > 1:
        raise DataFileError(
            "vectors of this index are not of one length", got=f"{sorted(lengths)} in {file}", expected="one embedder"
        )


def _parsed(file: Path, read: Callable[[Path], _Read]) -> _Read:
    try:
        return read(file)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # JSON's and pydantic's too
        kind = "JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else "what LlamaIndex persists"
        raise DataFileError(
            "a file of this index cannot be read",
            got=f"{type(error).__name__} in {file}",
            expected=kind,
            next_step="persist the index again; vectors that lie in FAISS or in a database are no JSON: open "
            "ConceptIndex.from_vector_store, or ingest the documents",
        ) from error
