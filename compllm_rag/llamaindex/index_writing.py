"""How a `ConceptIndex` is written: documents and nodes come and go, in steps that are kept whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from llama_index.core.data_structs.data_structs import IndexDict
from llama_index.core.schema import BaseNode, Document, ImageNode, IndexNode, MetadataMode
from llama_index.core.utils import iter_batch

from compllm_rag.errors import CompLLMError, ConfigurationError
from compllm_rag.library import EnsureReport
from compllm_rag.llamaindex.corpus import IngestReport, Progress
from compllm_rag.llamaindex.heeded import refuse_options, update_options
from compllm_rag.llamaindex.index_base import IndexBase
from compllm_rag.llamaindex.ingest import changed_documents, ingest_documents
from compllm_rag.llamaindex.settling import complete, is_due, open_price, settle
from compllm_rag.llamaindex.sound import sound_documents, sound_nodes
from compllm_rag.llamaindex.stock import bar
from compllm_rag.llamaindex.tracing import traced_ensure
from compllm_rag.llamaindex.tracked_store import TrackedVectorStore
from compllm_rag.llamaindex.uploads import UploadQueue, UploadReceipt

logger = logging.getLogger(__name__)


class IndexWriting(IndexBase):
    """What of a `ConceptIndex` changes its storage."""

    def ingest(
        self,
        documents: Iterable[Document],
        *,
        progress: Progress | None = None,
        within: Iterable[str | Path] = (),
        prune: bool = False,
        show_progress: bool = False,
    ) -> IngestReport:
        """Bring documents into the storage: new ones added, changed ones replaced, others left alone.

        Only chunks that changed are embedded again, only segments that changed are compressed again. Work is
        committed about once a minute and at the end; an interrupted run is taken up by calling this again.

        Args:
            documents: A stream, consumed batch by batch; or a single document.
            progress: Called with a running report after each batch.
            within: The files and folders that the documents come from, as given to `load_documents`; where each came
                from is remembered for `prune`.
            prune: At the end, delete documents that came from within these paths and are not there any more.
            show_progress: Show a bar on standard error.

        Raises:
            ConfigurationError: `prune` without `within`, or a document that cannot be kept (see `llamaindex.metadata`).
            EmptyCorpusError: There are no documents at all; nothing is pruned then.
            PruneRefusedError: Not every file could be looked at; what was read is kept, and nothing is deleted.
            StoreLockedError: Another process writes, or compacts.
        """
        with bar(self, documents, progress, show_progress) as report:
            return ingest_documents(self, documents, progress=report, within=within, prune=prune)

    async def aingest(self, documents: Iterable[Document], **options: Any) -> IngestReport:
        """`ingest` in a thread; options as of it."""
        return await asyncio.to_thread(self.ingest, documents, **options)

    @property
    def uploads(self) -> UploadQueue:
        """The queue of this index; started on first use, with what earlier processes left to do."""
        if self._uploads is None:
            UploadQueue(self)
        return cast(UploadQueue, self._uploads)

    def attach(self, queue: UploadQueue) -> None:
        """Make a queue the one of this index; it does so itself.

        Raises:
            ConfigurationError: There is another.
        """
        if self._uploads is not None:
            raise ConfigurationError("this index has an upload queue already", next_step="use `index.uploads`")
        self._uploads = queue

    def upload(self, documents: Iterable[Document]) -> UploadReceipt:
        """Bring documents in without waiting for their concepts; see `UploadQueue.put`."""
        return self.uploads.put(documents)

    async def aupload(self, documents: Iterable[Document]) -> UploadReceipt:
        """`upload` in a thread."""
        return await asyncio.to_thread(self.upload, documents)

    def _add_nodes_to_index(
        self,
        index_struct: IndexDict,
        nodes: Sequence[BaseNode],
        show_progress: bool = False,
        later: bool = False,
        **insert_kwargs: Any,
    ) -> None:
        """Concepts first, unless they are there already or to be made `later`; then vector and text."""
        if not isinstance(self.faiss, TrackedVectorStore):  # other stores have options of their own
            refuse_options("an insertion", insert_kwargs, ("show_progress",))
        nodes = list({node.node_id: node for node in sound_nodes(nodes)}.values())
        with self.bulk():
            if nodes:
                self.faiss.catalog.claim()  # see `ingest._ingest_batch`
            if not later:
                self.complete_at_end()
            if not later and not self.library.chooser.budgeted:
                traced_ensure(self.library, (node.get_content(MetadataMode.NONE) for node in nodes))
            # Not by LlamaIndex's own method: it keeps some kinds of nodes in the document store as well, where nothing
            # deletes them, and has its retriever look among those alone from then on.
            for batch in iter_batch(nodes, self._insert_batch_size):
                self._vector_store.add(self._get_node_with_embedding(batch, show_progress), **insert_kwargs)

    def embedded(self, nodes: Sequence[BaseNode]) -> list[BaseNode]:
        """Copies of nodes with their embeddings, which are made where they have none.

        Raises:
            ConfigurationError: A node cannot be kept; see `llamaindex.metadata`.
        """
        return self._get_node_with_embedding(sound_nodes(nodes))

    def _get_node_with_embedding(self, nodes: Sequence[BaseNode], show_progress: bool = False) -> list[BaseNode]:
        """Copies of nodes with their embeddings, made where they have none; see `embedding_texts`."""
        lacking = [node for node in nodes if node.embedding is None]
        if not lacking:
            return [node.model_copy() for node in nodes]
        made = self._embed_model.get_text_embedding_batch(self._texts.of(lacking), show_progress=show_progress)
        fresh = {node.node_id: vector for node, vector in zip(lacking, made, strict=True)}
        return [node.model_copy(update={"embedding": fresh.get(node.node_id, node.embedding)}) for node in nodes]

    async def _async_add_nodes_to_index(
        self, index_struct: IndexDict, nodes: Sequence[BaseNode], show_progress: bool = False, **insert_kwargs: Any
    ) -> None:
        await asyncio.to_thread(self._add_nodes_to_index, index_struct, nodes, show_progress, **insert_kwargs)

    def insert(self, document: Document, **insert_kwargs: Any) -> None:
        """Insert a document; one of the same id is replaced.

        Raises:
            ConfigurationError: It is no document, or cannot be kept; see `llamaindex.metadata`.
        """
        (document,) = sound_documents([document])
        with self.bulk():
            nodes = self.splitting.nodes([document], show_progress=self._show_progress)
            with self._callback_manager.as_trace("insert"):
                nodes = self.embedded(nodes)  # what can go wrong does so before the former one is gone
                self._forget(document.id_)
                self.insert_nodes(nodes, **insert_kwargs)
            self.docstore.set_document_hash(document.id_, self.splitting.hash_of(document))
            self.splitting.note(document)
            self.splitting.remember()

    async def ainsert(self, document: Document, **insert_kwargs: Any) -> None:
        """`insert` in a thread."""
        await asyncio.to_thread(self.insert, document, **insert_kwargs)

    def delete_nodes(self, node_ids: list[str], delete_from_docstore: bool = False, **delete_kwargs: Any) -> None:
        """Delete nodes: vector and text are gone; concepts that others share stay."""
        given: Any = node_ids
        node_ids = [given] if isinstance(given, str) else node_ids
        with self.bulk():
            self._vector_store.delete_nodes(node_ids, **delete_kwargs)
            for node_id in node_ids:
                kept = self.docstore.get_document(node_id, raise_error=False)
                # LlamaIndex's own methods put these two kinds there; a storage may have them from before this class.
                if kept is not None and (delete_from_docstore or isinstance(kept, ImageNode | IndexNode)):
                    self.docstore.delete_document(node_id, raise_error=False)

    async def adelete_nodes(
        self, node_ids: list[str], delete_from_docstore: bool = False, **delete_kwargs: Any
    ) -> None:
        """`delete_nodes` in a thread."""
        await asyncio.to_thread(self.delete_nodes, node_ids, delete_from_docstore, **delete_kwargs)

    def delete_ref_doc(self, ref_doc_id: str, delete_from_docstore: bool = False, **delete_kwargs: Any) -> None:
        """Delete a document, its nodes, and the memory of its hash (so that it can be refreshed back in).

        One that is not there is no error, but logged as a warning.

        Raises:
            ConfigurationError: An option that is not heeded.
        """
        refuse_options("deleting a document", delete_kwargs, ("delete_from_docstore",))
        if not isinstance(ref_doc_id, str):
            raise ConfigurationError("this is no id of a document", got=repr(ref_doc_id), expected="a text")
        with self.bulk():
            if not self._forget(ref_doc_id):
                logger.warning("there is no document %r, so none was deleted", ref_doc_id)

    async def adelete_ref_doc(self, ref_doc_id: str, delete_from_docstore: bool = False, **delete_kwargs: Any) -> None:
        """`delete_ref_doc` in a thread."""
        await asyncio.to_thread(self.delete_ref_doc, ref_doc_id, delete_from_docstore, **delete_kwargs)

    def update_ref_doc(self, document: Document, **update_kwargs: Any) -> None:
        """Replace a document, in one step: where the new one cannot be kept, the former one stays.

        Args:
            document: The new one.
            **update_kwargs: `insert_kwargs`, and `delete_kwargs`, of which `delete_from_docstore` makes no difference.

        Raises:
            ConfigurationError: It cannot be kept, or an option is not heeded.
        """
        self.insert(document, **update_options("an update", update_kwargs))

    async def aupdate_ref_doc(self, document: Document, **update_kwargs: Any) -> None:
        """`update_ref_doc` in a thread."""
        await asyncio.to_thread(self.update_ref_doc, document, **update_kwargs)

    def refresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """Insert new documents and replace changed ones; tells for each whether it was.

        Raises:
            ConfigurationError: One cannot be kept, or an option is not heeded; they are those of `update_ref_doc`.
        """
        insert_kwargs = update_options("a refresh", update_kwargs)
        sound = list(sound_documents(documents))
        with self.bulk():
            refreshed = []
            for document in sound:  # one after the other: an id may come twice
                changed = changed_documents(self, [document])
                for each in changed:
                    self.insert(each, **insert_kwargs)
                refreshed.append(bool(changed))
            return refreshed

    async def arefresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """`refresh_ref_docs` in a thread."""
        return await asyncio.to_thread(self.refresh_ref_docs, documents, **update_kwargs)

    def _forget(self, doc_id: str) -> bool:
        """Delete a document; tells whether there was one."""
        gone = self.faiss.node_ids(doc_id)
        known = bool(gone) or self.docstore.get_document_hash(doc_id) is not None
        if gone:
            self.delete_nodes(gone)
        self.docstore.delete_document(doc_id, raise_error=False)
        self.origins.forget(doc_id)
        self.splitting.forget(doc_id)
        return known

    @contextlib.contextmanager
    def bulk(self) -> Iterator[None]:
        """Commit once for everything inside; on an error nothing since the last commit is kept, concepts excepted.

        Concepts are known by their content, so those made before an error or a Ctrl-C are right, and save the next
        run their work. Threads take turns; what is called from within the block belongs to it.
        """
        with self._writing.acquired() as outermost, self.faiss.catalog.private():
            if outermost:
                self._texts.begin()
                self.settled = EnsureReport(0, 0, 0, 0, 0, 0.0)
            try:
                yield
                if outermost:
                    self._settle()
                    self.commit()
            except BaseException:
                if outermost:
                    self.faiss.rollback()
                    self._completing = False
                    with contextlib.suppress(CompLLMError):
                        open_price(self.library, self.faiss.catalog)
                    with contextlib.suppress(CompLLMError):
                        self.store.flush()
                raise

    def complete_at_end(self) -> None:
        """What the storage's budget leaves is known at the end of the `bulk` block only; have all concepts then."""
        self._completing = self.library.chooser.budgeted

    def _settle(self) -> None:
        """Bring a storage that has a budget within it; only what is uploaded gets its concepts later."""
        due = is_due(self)
        completing, self._completing = self._completing or due, False
        waiting = settle(self) if due or self.faiss.catalog.pending else []
        if completing:
            self.settled = complete(self)
        elif waiting and self._uploads is not None:
            self._uploads.add(self.faiss.get_nodes(waiting))

    def commit(self) -> None:
        """Make everything durable: concepts first, then vectors and text together, in one step."""
        if self.faiss.catalog.pending:
            settle(self)
        self.store.flush()
        work = self.metrics.work
        if self.faiss.catalog.pending and work != self._kept:
            self.accounts.measures.add(work.plus(self._kept, -1))
            self.accounts.choices.note_times()
        self.faiss.commit()
        self._kept = work

    def _keep_work(self) -> None:
        """Note what workers did since the last commit, if nobody is in the way: it is worth no error."""
        work = self.metrics.work
        with contextlib.suppress(CompLLMError), self.faiss.catalog.own_transaction() as connection:
            if connection is not None and work != self._kept:
                self.accounts.measures.add(work.plus(self._kept, -1))
                self.accounts.choices.note_times()
                self._kept = work
