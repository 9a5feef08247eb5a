"""Documents of one index: brought in, listed, looked at, deleted. All of it blocks: call it in threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

from llama_index.core.schema import MetadataMode

from compllm_rag.catalog.documents import documents_after
from compllm_rag.errors import StoreLockedError
from compllm_rag.llamaindex.uploads import UploadReceipt
from compllm_rag.llamaindex.vector_store import FaissTextVectorStore
from compllm_rag.server.document_schemas import (
    Chunk,
    DocumentDetail,
    DocumentList,
    DocumentSummary,
    Job,
    QueueStatus,
    State,
    UploadAccepted,
)
from compllm_rag.server.failures import Refusal, code_of
from compllm_rag.server.files import Read
from compllm_rag.server.jobs import Jobs, UploadJob
from compllm_rag.server.work import Workers

if TYPE_CHECKING:
    from llama_index.core.schema import BaseNode

    from compllm_rag.llamaindex.index import ConceptIndex

T = TypeVar("T")
_PAGE = "#page="  # between the name of a PDF and the number of a page, in ids of documents
_AT_ONCE = 200
_PATIENCE_S = 5.0


def upload(index: ConceptIndex, read: Read, jobs: Jobs) -> UploadAccepted:
    """Bring documents in; text and vectors are committed when this returns.

    Raises:
        UploadQueueFullError, StoreLockedError, StoreFullError: See `UploadQueue.put`; nothing was brought in.
    """
    names = tuple(document.id_ for document in read.documents)

    def bring_in() -> tuple[UploadReceipt, list[str]]:
        with index.bulk():
            gone = [doc_id for name in read.whole for doc_id in _pages(index, name) if doc_id not in names]
            for doc_id in gone:
                index.delete_ref_doc(doc_id)
            return index.upload(read.documents), gone

    receipt, gone = _patiently(bring_in)
    job = jobs.add(index.config.namespace, names)
    return UploadAccepted(
        job_id=job.id,
        documents=list(names),
        changed=receipt.documents_changed,
        chunks=receipt.chunks,
        chunks_added=receipt.chunks_added,
        chunks_waiting=receipt.chunks_queued,
        removed=gone,
        skipped=read.skipped,
    )


def delete(index: ConceptIndex, doc_id: str) -> None:
    """Delete a document.

    Raises:
        Refusal: There is none.
    """

    def take_out() -> None:
        with index.bulk():
            _must_exist(index, doc_id)
            index.delete_ref_doc(doc_id)

    _patiently(take_out)


def listed(index: ConceptIndex, after: str, limit: int) -> DocumentList:
    """A page of documents."""
    store = cast(FaissTextVectorStore, index.faiss)
    rows = documents_after(store.catalog, after, limit + 1)
    more, rows = len(rows) > limit, rows[:limit]
    titles = {node.node_id: _title(node) for node in store.get_nodes([row.first for row in rows])}
    waiting, failed = _waiting(index), _failed(index)
    return DocumentList(
        documents=[
            DocumentSummary(
                id=row.id,
                title=titles.get(row.first, ""),
                state=_state(waiting.get(row.id, ()), failed),
                chunks=row.nodes,
                chunks_waiting=len(waiting.get(row.id, ())),
            )
            for row in rows
        ],
        next_after=rows[-1].id if more else None,
        total=store.n_documents,
    )


def detail(index: ConceptIndex, doc_id: str, *, text: bool) -> DocumentDetail:
    """One document with its chunks.

    Raises:
        Refusal: There is none.
    """
    nodes = cast(FaissTextVectorStore, index.faiss).document_nodes(doc_id)
    if not nodes:
        _must_exist(index, doc_id)
    waiting, failed = index.pending.among([node.node_id for node in nodes]), _failed(index)
    return DocumentDetail(
        id=doc_id,
        title=_title(nodes[0]) if nodes else "",
        state=_state(waiting, failed),
        chunks=len(nodes),
        chunks_waiting=len(waiting),
        metadata={key: value for key, value in nodes[0].metadata.items() if key != "title"} if nodes else {},
        nodes=[_chunk(index, node, waiting, failed, text=text) for node in nodes],
    )


def job_status(index: ConceptIndex, job: UploadJob) -> Job:
    """How far the concepts of an upload are; documents that were deleted since count no more."""
    node_ids = [node_id for doc_id in job.documents for node_id in index.faiss.node_ids(doc_id)]
    waiting, failed = index.pending.among(node_ids), _failed(index)
    lost = len(failed.intersection(node_ids))
    return Job(
        job_id=job.id,
        state=_state(waiting, failed),
        documents=list(job.documents),
        chunks=len(node_ids),
        chunks_waiting=len(waiting) - lost,
        chunks_failed=lost,
    )


def queue_status(index: ConceptIndex, generations: Workers) -> QueueStatus:
    """What waits."""
    running = None if index.faiss.catalog.read_only else index.uploads.status()
    return QueueStatus(
        documents_waiting=running.documents if running else 0,
        chunks_waiting=running.chunks if running else len(index.pending),
        chunks_done=running.chunks_done if running else 0,
        chunks_failed=len(running.failed) if running else 0,
        held_up=code_of(running.held_up) if running and running.held_up else None,
        generations_running=generations.running,
        generations_waiting=generations.waiting,
        generations_limit=generations.limit,
    )


def counts(index: ConceptIndex) -> tuple[int, int]:
    """How many documents and chunks there are."""
    store = cast(FaissTextVectorStore, index.faiss)
    return store.n_documents, store.n_nodes


def _pages(index: ConceptIndex, name: str) -> list[str]:
    """Ids of the documents that were made of the pages of an uploaded file of this name."""
    store = cast(FaissTextVectorStore, index.faiss)
    begin, found = f"{name}{_PAGE}", list[str]()
    while rows := documents_after(store.catalog, found[-1] if found else begin, _AT_ONCE):
        own = [row for row in rows if row.id.startswith(begin)]
        found += [row.id for row in own]
        if len(own) < _AT_ONCE:
            break
    firsts = {row: index.faiss.node_ids(row)[:1] for row in found}
    nodes = store.get_nodes([node_id for node_ids in firsts.values() for node_id in node_ids])
    return [node.ref_doc_id for node in nodes if node.ref_doc_id and node.metadata.get("source") == name]


def _patiently(work: Callable[[], T]) -> T:
    """Do something again while another process has uncommitted work, such as an ingest between two commits.

    Raises:
        StoreLockedError: It went on for too long.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return work()
        except StoreLockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _must_exist(index: ConceptIndex, doc_id: str) -> list[str]:
    """Its nodes.

    Raises:
        Refusal: There is no such document.
    """
    node_ids = index.faiss.node_ids(doc_id)
    if not node_ids and index.docstore.get_document_hash(doc_id) is None:
        raise Refusal(404, "no_such_document", "there is no such document. Next step: see GET /v1/documents")
    return node_ids


def _chunk(index: ConceptIndex, node: BaseNode, waiting: Iterable[str], failed: set[str], *, text: bool) -> Chunk:
    said = node.get_content(metadata_mode=MetadataMode.NONE)
    passage = index.library.passage(said)
    return Chunk(
        node_id=node.node_id,
        state=_state([node.node_id] if node.node_id in waiting else (), failed),
        n_tokens=len(passage.ids),
        n_concepts=sum(passage.n_concepts),
        text=said if text else None,
    )


def _title(node: BaseNode) -> str:
    return str(node.metadata.get("title") or "")


def _waiting(index: ConceptIndex) -> dict[str, list[str]]:
    """Nodes without concepts, by document."""
    found: dict[str, list[str]] = {}
    for node_id, doc_id in index.pending.nodes().items():
        if doc_id is not None:
            found.setdefault(doc_id, []).append(node_id)
    return found


def _failed(index: ConceptIndex) -> set[str]:
    return set() if index.faiss.catalog.read_only else set(index.uploads.status().failed)


def _state(waiting: Sequence[str] | frozenset[str], failed: set[str]) -> State:
    if any(node_id not in failed for node_id in waiting):
        return "waiting"
    return "failed" if waiting else "ready"
