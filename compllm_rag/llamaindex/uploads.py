"""Uploads: documents that are searchable at once and get their concepts in the background.

A document's text and vectors are committed before `put` returns, with a note of the chunks that lack concepts (see
`awaiting`). Workers make these; a query that comes first reads such a chunk as text. The queue holds ids only, and
nothing that the catalog does not know: a process may end at any time, and the next one to open the storage goes on.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from llama_index.core.schema import BaseNode, Document, MetadataMode

from compllm_rag.errors import (
    CompLLMError,
    ConfigurationError,
    StoreFullError,
    StoreLockedError,
    StoreReadOnlyError,
    StoreUnavailableError,
    UploadQueueFullError,
)
from compllm_rag.llamaindex.corpus import Corpus
from compllm_rag.llamaindex.ingest import changed_documents, remember_origins, replace_documents
from compllm_rag.llamaindex.naming import Names
from compllm_rag.llamaindex.sound import sound_documents
from compllm_rag.llamaindex.tracing import traced_ensure

logger = logging.getLogger(__name__)

_BATCH_CHUNKS = 32  # chunks compressed between two flushes: fills batches, and bounds how long a stop takes
_EXIT_S = 60.0  # the longest that the end of a process waits for a worker
_RETRY_S = 0.2  # another process writes: it will be done some time
_LONGEST_RETRY_S = 30.0  # between two tries while the concept store is away or full; it may be so for hours


@dataclass(frozen=True)
class UploadReceipt:
    """What an upload brought in.

    Attributes:
        documents: Documents met.
        documents_changed: Those that were new or differed.
        chunks: Chunks of those.
        chunks_queued: Chunks that are read as text until their concepts are made, those of earlier uploads included.
        chunks_added: Chunks that were not there before; only they are embedded.
    """

    documents: int
    documents_changed: int
    chunks: int
    chunks_queued: int
    chunks_added: int = 0


@dataclass(frozen=True)
class UploadStatus:
    """How far the queue is.

    Attributes:
        documents: Documents that wait, wholly or in part.
        chunks: Chunks that wait or are being compressed.
        chunks_done: Chunks that got their concepts from this queue.
        failed: Why chunks could not be compressed, by node id; the next open tries them again.
        held_up: Why nothing goes on now: the concept store is full, or cannot be reached. Chunks wait until it takes
            them; None while it does.
    """

    documents: int
    chunks: int
    chunks_done: int
    failed: dict[str, Exception]
    held_up: Exception | None = None


class UploadTarget(Corpus, Protocol):
    """What a queue works on: a `ConceptIndex`."""

    def attach(self, queue: UploadQueue) -> None:
        """Take the queue for the one of this index."""
        ...


class UploadQueue:
    """A bounded queue of documents with threads that compress. An index has one at most: `ConceptIndex.uploads`.

    It begins with what earlier processes left to do.

    Args:
        index: Where documents go.
        workers: Threads that compress. One keeps a CPU or a GPU busy.
        max_documents: Most documents that may wait for their concepts.
        discreet: Log errors by their kind alone: their words may quote a document.

    Raises:
        ConfigurationError: A number makes no sense, or the index has a queue already.
        StoreReadOnlyError: The storage was opened for reading.
    """

    def __init__(
        self, index: UploadTarget, *, workers: int = 1, max_documents: int = 1000, discreet: bool = False
    ) -> None:
        for name, value in (("workers", workers), ("max_documents", max_documents)):
            if value < 1:
                raise ConfigurationError(f"{name} makes no sense", got=value, expected="at least 1")
        if index.faiss.catalog.read_only:
            raise StoreReadOnlyError("uploads need a storage that can be written", next_step="open it for writing")
        self._index, self._max, self._discreet = index, max_documents, discreet
        self._changed = threading.Condition()
        self._waiting: deque[tuple[str, list[str]]] = deque()  # document and nodes
        self._left: dict[str, int] = {}  # nodes of each document, those being compressed included
        self._done = 0
        self._finished: set[str] = set()  # have their concepts; the catalog is still to be told
        self._failed: dict[str, Exception] = {}
        self._held_up: CompLLMError | None = None
        self._stopping = self._draining = False
        index.attach(self)
        awaiting = index.pending.nodes()
        self._finished.update(node_id for node_id, doc_id in awaiting.items() if doc_id is None)
        self._enqueue((doc_id, node_id) for node_id, doc_id in awaiting.items() if doc_id is not None)
        self._running = workers
        self._threads = [
            threading.Thread(target=self._work, name=f"compllm-upload-{number}", daemon=True)
            for number in range(workers)
        ]
        atexit.register(self._end_with_process)
        for thread in self._threads:
            thread.start()

    def put(self, documents: Iterable[Document]) -> UploadReceipt:
        """Bring documents in; they are found from now on, and read as text until their concepts are made.

        All of them or, when this raises, none. Of several with the same id the last one counts; documents of
        `load_documents` from several files are told apart, as by `ingest`.

        Raises:
            UploadQueueFullError: More documents would wait than `max_documents`; nothing was brought in.
            ConfigurationError: The queue is closed.
            StoreLockedError: Another process writes.
            StoreReadOnlyError: The storage was opened for reading.
        """
        index, read = self._index, list(sound_documents(documents))
        with index.bulk():
            names = Names(index)
            given = {document.id_: document for document in names.settled(read)}
            changed = changed_documents(index, given.values())
            self._check_room(len(changed))
            nodes = index.splitting.nodes(changed)
            added = replace_documents(index, changed, nodes, later=True) if changed else 0
            remember_origins(index, given.values(), changed)
            queued = index.pending.among([node.node_id for node in nodes])
            # Still in our turn: nobody else must find room that is taken.
            self._enqueue((n.ref_doc_id or n.node_id, n.node_id) for n in nodes if n.node_id in queued)
        names.log()
        return UploadReceipt(len(given), len(changed), len(nodes), len(queued), added)

    def add(self, nodes: Iterable[BaseNode]) -> None:
        """Nodes that are there get their concepts anew."""
        self._enqueue((node.ref_doc_id or node.node_id, node.node_id) for node in nodes)

    def _check_room(self, documents: int) -> None:
        with self._changed:
            waiting = len(self._left)
            if self._stopping:
                raise ConfigurationError("the upload queue is closed", next_step="open the storage again")
            if documents and waiting + documents > self._max:
                raise UploadQueueFullError(
                    "the upload queue is full; nothing was brought in",
                    got=f"{documents} documents while {waiting} wait for their concepts",
                    expected=f"at most {self._max} in all (max_documents)",
                    next_step="upload again later or fewer at once, wait() until the queue is done, or use ingest()",
                )

    def _enqueue(self, nodes: Iterable[tuple[str, str]]) -> None:
        by_document: dict[str, list[str]] = {}
        for doc_id, node_id in nodes:
            by_document.setdefault(doc_id, []).append(node_id)
        with self._changed:
            for doc_id, node_ids in by_document.items():
                self._waiting.append((doc_id, node_ids))
                self._left[doc_id] = self._left.get(doc_id, 0) + len(node_ids)
            self._changed.notify_all()

    def status(self) -> UploadStatus:
        """How far the queue is."""
        with self._changed:
            waiting, chunks = len(self._left), sum(self._left.values())
            return UploadStatus(waiting, chunks, self._done, dict(self._failed), self._held_up)

    def wait(self, timeout: float | None = None, *, patient: bool = True) -> bool:
        """Wait until nothing waits any more.

        Args:
            timeout: Seconds to wait at most; None for no limit.
            patient: Wait for a concept store that takes nothing now, too; else raise what it says.

        Returns:
            Whether every chunk has its concepts: false when time ran out, or chunks failed (see `status`).

        Raises:
            StoreFullError, StoreUnavailableError: Not `patient`, and chunks are held up; they still wait.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            idle = self._changed.wait_for(
                lambda: not self._left or not self._running or (self._held_up is not None and not patient),
                None if deadline is None else deadline - time.monotonic(),
            )
            if self._held_up is not None and not patient:
                raise self._held_up
            whole = idle and not self._left and not self._failed
        self._tell_catalog()
        return whole

    def close(self, *, drain: bool = False, timeout: float | None = None) -> bool:
        """Stop the workers. What was not compressed is found again when the storage is opened next.

        Args:
            drain: Let them finish what waits, unless the concept store is full or away; else only what they are at.
            timeout: Seconds to wait for them at most; None for no limit.

        Returns:
            Whether they have ended.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._stopping, self._draining = True, drain
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        atexit.unregister(self._end_with_process)
        self._tell_catalog()
        return not any(thread.is_alive() for thread in self._threads)

    def _end_with_process(self) -> None:
        """At the end of the process: a worker that hangs must not keep it from ending, and has nothing to lose."""
        if not self.close(timeout=_EXIT_S):
            logger.warning("an upload is still being compressed; the next process to open the storage takes it up")

    def _work(self) -> None:
        while True:
            with self._changed:
                # Not for ever where the catalog could not be told yet.
                patience = _RETRY_S if self._finished else None
                if not self._changed.wait_for(lambda: self._waiting or self._stopping, patience):
                    taken = []
                elif self._stopping and not (self._draining and self._waiting):
                    self._running -= 1
                    self._changed.notify_all()
                    return
                else:
                    taken = self._take()
            if not taken:
                self._tell_catalog()
                continue
            if not self._compress([node_id for _, node_ids in taken for node_id in node_ids]):
                continue  # they still wait, for the next open
            with self._changed:
                for doc_id, node_ids in taken:
                    self._left[doc_id] -= len(node_ids)
                    if not self._left[doc_id]:
                        del self._left[doc_id]
                self._changed.notify_all()

    def _take(self) -> list[tuple[str, list[str]]]:
        taken, room = list[tuple[str, list[str]]](), _BATCH_CHUNKS
        while self._waiting and room:
            doc_id, node_ids = self._waiting.popleft()
            if len(node_ids) > room:
                self._waiting.appendleft((doc_id, node_ids[room:]))
            taken.append((doc_id, node_ids[:room]))
            room -= len(taken[-1][1])
        return taken

    def _compress(self, node_ids: Sequence[str]) -> bool:
        """Make concepts of some nodes; what fails is tried alone, and noted when it fails again.

        What is no fault of theirs is waited for; false when the queue was closed meanwhile, and they still wait.
        """
        pause = _RETRY_S
        try:
            while (obstacle := self._make(node_ids)) is not None:
                if not self._stood_by(obstacle, pause):
                    return False
                if not isinstance(obstacle, StoreLockedError):
                    pause = min(2 * pause, _LONGEST_RETRY_S)
        except Exception as error:  # noqa: BLE001 - whatever it is, the worker has to go on with the next
            if len(node_ids) > 1:
                return all(self._compress([node_id]) for node_id in node_ids)
            why = type(error).__name__ if self._discreet else error
            logger.warning("concepts of chunk %s could not be made, it is read as text: %s", node_ids[0], why)
            with self._changed:
                self._failed[node_ids[0]] = error
            return True
        with self._changed:
            self._finished.update(node_ids)
            self._done += len(node_ids)
            for node_id in node_ids:
                self._failed.pop(node_id, None)
        self._tell_catalog()
        return True

    def _make(self, node_ids: Sequence[str]) -> CompLLMError | None:
        """Compress and flush; tells what is in the way for a time: another writer, or a store that takes nothing."""
        try:
            nodes = self._index.faiss.get_nodes(list(node_ids))  # those that were deleted meanwhile are left out
            traced_ensure(self._index.library, (node.get_content(metadata_mode=MetadataMode.NONE) for node in nodes))
            self._index.store.flush()
        except StoreFullError as error:
            with suppress(CompLLMError):
                self._index.store.flush()  # what there was room for; and whoever makes more room needs the lock
            return error
        except (StoreLockedError, StoreUnavailableError) as error:
            return error
        with self._changed:
            if self._held_up is not None:
                logger.warning("the concept store takes concepts again; uploads go on")
                self._held_up = None
        return None

    def _stood_by(self, obstacle: CompLLMError, pause_s: float) -> bool:
        """Wait for what is in the way; false when the queue is closed and it is not worth waiting.

        Another writer will be done soon, so a queue that is drained waits for it. A store that is full or away may
        stay so: such a queue tries once more, and leaves the rest to the next open.
        """
        lasting = not isinstance(obstacle, StoreLockedError)
        with self._changed:
            if lasting:
                if self._held_up is None:
                    logger.warning("uploads wait for the concept store, their chunks are read as text: %s", obstacle)
                self._held_up = obstacle
                if self._stopping:
                    self._draining = False
                self._changed.notify_all()  # for who waits without patience
            self._changed.wait_for(lambda: self._stopping and (lasting or not self._draining), pause_s)
            return not self._stopping or self._draining

    def _tell_catalog(self) -> None:
        """Take the notes of finished nodes out of the catalog, unless somebody writes: then at some later time."""
        with self._changed:
            finished = set(self._finished)
        if not finished:
            return
        try:
            told = self._index.pending.forget_now(finished)
        except CompLLMError:  # the notes do no harm: who finds them finds the concepts as well
            return
        if told:
            with self._changed:
                self._finished -= finished
