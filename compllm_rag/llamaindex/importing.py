"""A persisted stock index becomes a storage: its text and vectors are taken over, only concepts are made.

First all text and vectors are committed together, with a note of what lacks concepts (see `catalog.pending`); from then
on everything is found, and read as text. Then the concepts are made. Whoever interrupts it runs it again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import BaseNode, MetadataMode

from compllm_rag.config import DEFAULT_EMBEDDER
from compllm_rag.errors import EmbedderMismatchError, EmptyCorpusError
from compllm_rag.llamaindex.index import ConceptIndex
from compllm_rag.llamaindex.node_text import text_of_node
from compllm_rag.llamaindex.stock_index import StockIndex, read_stock_index
from compllm_rag.llamaindex.storage_parts import embedder_named
from compllm_rag.storage.manifest import has_manifest, read_manifest
from compllm_rag.storage.namespaces import namespace_folder

logger = logging.getLogger(__name__)

_BATCH = 256
_COMPARED = 3  # nodes that are embedded again, to see whether the embedder is the one
_SAME, _OTHER = 0.999, 0.9  # cosines: above the one it is the same embedder, below the other it is not
_TOLD_EVERY_S = 0.5

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class ImportReport:
    """What an import took over.

    Attributes:
        nodes: Nodes of the index.
        nodes_added: Those that the storage did not have yet.
        documents: Documents they come from.
        chunks_queued: Chunks that still lack concepts, and are read as text until they have them.
        chunks_failed: Those of them whose concepts could not be made.
        cosine: Least similarity of a vector that was taken over to one made now; None where no node has text.
        seconds: Wall time.
    """

    nodes: int
    nodes_added: int
    documents: int
    chunks_queued: int
    chunks_failed: int
    cosine: float | None
    seconds: float

    def fields(self) -> dict[str, Any]:
        """Plain values, as `import-index --json` prints them."""
        return asdict(self)


def import_index(
    persist_dir: str | Path,
    storage_dir: str | Path,
    *,
    embedder: str | BaseEmbedding | None = None,
    index_id: str | None = None,
    later: bool = False,
    progress: Progress | None = None,
    namespace: str | None = None,
    **options: Any,
) -> ImportReport:
    """Bring an index that LlamaIndex persisted into a storage, new or existing, without embedding it again.

    Text, metadata, relationships, ids and hashes of documents stay as they are: `refresh_ref_docs` of unchanged
    documents does nothing afterwards. A node that the storage has already is left alone.

    Args:
        persist_dir: Where `storage_context.persist` wrote it.
        storage_dir: The storage.
        embedder: The one that made the vectors; a name or a LlamaIndex embedder, None for the default. A few nodes are
            embedded again to see whether it is.
        index_id: Which index, where there are several.
        later: Do not wait for the concepts: the next process that opens the storage for writing makes them.
        progress: Called with a message and a share from 0 to 1.
        namespace: Tenant; None takes the folder's own.
        **options: See `ConceptIndex.create`.

    Raises:
        StorageNotFoundError, DataFileError, ConfigurationError: See `read_stock_index`.
        EmptyCorpusError: The index has no nodes.
        EmbedderMismatchError: The vectors are of another embedder.
        StorageMismatchError: The storage was made with other settings.
    """
    begun = time.perf_counter()
    _tell(progress, "reading the index", None)
    stock = read_stock_index(persist_dir, index_id)
    if not stock.nodes:
        raise EmptyCorpusError("this index has no nodes", got=persist_dir, next_step="name another folder")
    known = {name: value for name, value in options.items() if name in ("device", "cache_dir", "offline")}
    made, _, _ = embedder_named(embedder or _own_embedder(storage_dir, namespace), progress, known)
    cosine = check_embedder(stock, made)
    longest = max(map(text_of_node, stock.nodes), key=len)
    with ConceptIndex.create_for(
        longest, storage_dir, embedder=embedder, namespace=namespace, resume=False, progress=progress, **options
    ) as index:
        added = _take_over(index, stock, progress)
        failed = 0 if later or not len(index.pending) else _compress(index, progress)
        queued = len(index.pending)
    return ImportReport(
        nodes=len(stock.nodes),
        nodes_added=added,
        documents=len({node.ref_doc_id or node.node_id for node in stock.nodes}),
        chunks_queued=queued,
        chunks_failed=failed,
        cosine=cosine,
        seconds=time.perf_counter() - begun,
    )


def _own_embedder(storage_dir: str | Path, namespace: str | None) -> str:
    """The embedder that a storage names, or the default for one that is still to be made."""
    folder = namespace_folder(storage_dir, namespace)
    return read_manifest(folder).embedder if has_manifest(folder) else DEFAULT_EMBEDDER


def check_embedder(stock: StockIndex, embedder: BaseEmbedding) -> float | None:
    """Compare vectors of the index with those that an embedder makes of the same nodes.

    Returns:
        The least cosine; None where no node has text.

    Raises:
        EmbedderMismatchError: Another number of dimensions, or vectors of another direction.
    """
    told = [node for node in stock.nodes if node.get_content(metadata_mode=MetadataMode.EMBED).strip()]
    picked = (
        [told[i] for i in sorted({i * (len(told) - 1) // max(_COMPARED - 1, 1) for i in range(_COMPARED)})]
        if told
        else []
    )
    cosines = [_cosine(node, embedder) for node in picked]
    if not cosines:
        return None
    least = min(cosines)
    if least < _OTHER:
        raise EmbedderMismatchError(
            "the vectors of this index were not made by this embedder",
            got=f"a cosine of {least:.3f} between a vector of the index and the one made now",
            expected=f"{_SAME} or more",
            next_step="name the embedder that the index was made with (--embedder, or embedder=), or ingest the texts",
        )
    if least < _SAME:
        logger.warning(
            "vectors made now differ a little from those of the index (cosine %.4f): is the embedder the same, with the"
            " same instructions and precision?",
            least,
        )
    return least


def _cosine(node: BaseNode, embedder: BaseEmbedding) -> float:
    text = node.get_content(metadata_mode=MetadataMode.EMBED)
    there = np.asarray(node.embedding, dtype=np.float64)
    now = np.asarray(embedder.get_text_embedding(text), dtype=np.float64)
    if there.shape != now.shape:
        raise EmbedderMismatchError(
            "the vectors of this index were not made by this embedder",
            got=f"vectors of {there.size} dimensions",
            expected=f"{now.size}, which {embedder.model_name} makes",
            next_step="name the embedder that the index was made with (--embedder, or embedder=)",
        )
    lengths = float(np.linalg.norm(there) * np.linalg.norm(now))
    return float(there @ now) / lengths if lengths else 0.0


def _take_over(index: ConceptIndex, stock: StockIndex, progress: Progress | None) -> int:
    """Text, vectors and hashes in one commit."""
    added = 0
    with index.bulk():
        for start in range(0, len(stock.nodes), _BATCH):
            batch = stock.nodes[start : start + _BATCH]
            coming = _absent(index, batch)
            if coming:
                index.insert_nodes(coming, later=True)
                added += len(coming)
            _tell(progress, "taking text and vectors over", (start + len(batch)) / len(stock.nodes))
        for document, hash_ in stock.hashes.items():
            if index.docstore.get_document_hash(document) != hash_:
                index.docstore.set_document_hash(document, hash_)
    return added


def _absent(index: ConceptIndex, nodes: Sequence[BaseNode]) -> list[BaseNode]:
    there = {node.node_id: node.hash for node in index.faiss.get_nodes([node.node_id for node in nodes])}
    return [node for node in nodes if there.get(node.node_id) != node.hash]


def _compress(index: ConceptIndex, progress: Progress | None) -> int:
    """Wait for the concepts; tells how many chunks failed."""
    queue, total = index.uploads, len(index.pending)
    while not queue.wait(_TOLD_EVERY_S, patient=False):
        status = queue.status()
        if not status.chunks:
            break
        _tell(progress, "making concepts", status.chunks_done / max(total, 1))
    failed = queue.status().failed
    for node_id, error in list(failed.items())[:3]:
        logger.warning("concepts of node %s could not be made, it is read as text: %s", node_id, error)
    return len(failed)


def _tell(progress: Progress | None, message: str, share: float | None) -> None:
    if progress:
        progress(message, share)
