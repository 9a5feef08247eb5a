"""Ingestion in batches: unchanged documents are skipped, changed ones touch only what changed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from llama_index.core.schema import BaseNode, Document, MetadataMode

from compllm_rag.catalog.kv import KeyValues
from compllm_rag.catalog.origins import Origins
from compllm_rag.errors import ConfigurationError, CorruptRecordError, EmptyCorpusError, PruneRefusedError
from compllm_rag.llamaindex.corpus import Corpus, IngestReport, Progress
from compllm_rag.llamaindex.documents import FileDocuments, empty_corpus
from compllm_rag.llamaindex.naming import Names
from compllm_rag.llamaindex.node_parser import layout_of
from compllm_rag.llamaindex.pruning import prunable
from compllm_rag.llamaindex.readers.found import FileDocument
from compllm_rag.llamaindex.readers.walk import roots_of
from compllm_rag.llamaindex.sound import sound_documents
from compllm_rag.llamaindex.tracing import traced_ensure
from compllm_rag.models.device_memory import release_unused

logger = logging.getLogger(__name__)

# Characters of the documents worked on together; bounds memory and fills the compressor's batches.
_BATCH_CHARS = 400_000
# The first batches are smaller, so that it soon shows how long all of them will take.
_FIRST_BATCH_CHARS = 50_000
# Seconds between commits: each one waits for the disk, and lets others write; what lies after it is lost in a crash.
_COMMIT_EVERY_S = 60.0
# From so many segments on, compressing takes so long that the time to tidy memory up does not count beside it.
_MANY_SEGMENTS = 256
# In place of the hash of a document whose nodes are being replaced; no document has it.
_UNDER_WAY = ""


def ingest_documents(
    index: Corpus,
    documents: Iterable[Document],
    *,
    progress: Progress | None = None,
    within: Iterable[str | Path] = (),
    prune: bool = False,
    may_be_empty: bool = False,
) -> IngestReport:
    """Ingest documents; see `ConceptIndex.ingest`.

    Args:
        index: Where they go.
        documents: See there, as for what follows.
        progress: See there.
        within: See there.
        prune: See there.
        may_be_empty: No documents at all are no error; what they were pruned for is known to be gone.

    Raises:
        ConfigurationError: `prune` without `within`.
        EmptyCorpusError: There are no documents at all, unless `may_be_empty`.
        PruneRefusedError: Not every file could be looked at; what was read is kept, and nothing is deleted.
    """
    begun = last = time.perf_counter()
    report, refused = IngestReport(), None
    reading = documents if isinstance(documents, FileDocuments) else None
    roots, met = _roots(within, prune), dict[str, str | None]()
    index.origins = Origins(KeyValues(index.faiss.catalog), roots)
    names = Names(index)
    with index.bulk():
        for batch in _batches(names.settled(sound_documents(documents))):
            report = _ingest_batch(index, batch, report)
            met.update((document.id_, origin_of(index, document)) for document in batch)
            now = time.perf_counter()
            report = replace(report, documents_moved=names.moved, seconds=now - begun)
            if now - last > _COMMIT_EVERY_S:
                index.commit()
                _log_commit(report)
                last = time.perf_counter()
            if progress:
                progress(report)
        if not report.documents and not may_be_empty:
            # Nor is anything pruned then: a folder that is not mounted looks the same.
            raise _no_documents(reading)
        if prune:
            try:
                gone = prunable(index.origins, met, reading, index.origins.roots)
            except PruneRefusedError as error:  # to be told once what was read is committed
                gone, refused = [], error
            for doc_id in gone:
                index.delete_ref_doc(doc_id)
            report = replace(report, documents_deleted=len(gone))
    if index.library.chooser.budgeted:
        report = _with_settled(index, report)
    if reading is None or reading.logs:
        names.log()
    if refused is not None:
        raise refused
    if reading is not None:
        report = replace(report, skipped=tuple(reading.skipped), notes=(*reading.notes, *names.notes))
    report = replace(report, seconds=time.perf_counter() - begun)
    _log_commit(report)
    return report


def _with_settled(index: Corpus, report: IngestReport) -> IngestReport:
    """What was compressed, and how much is kept, once a budget was shared out."""
    done = index.settled.compressed
    reused = max(0, report.segments - done)
    return replace(report, segments_compressed=done, segments_reused=reused, concepts=index.accounts.choices.concepts())


def _roots(within: Iterable[str | Path], prune: bool) -> list[Path]:
    """Where the documents come from."""
    roots = roots_of(within)
    if prune and not roots:
        raise ConfigurationError(
            "nothing says where pruned documents came from", got="prune without paths", expected="the paths ingested"
        )
    return roots


def _log_commit(report: IngestReport) -> None:
    """What is durable now, in numbers: logs are kept elsewhere than documents."""
    logger.info(
        "committed: %d documents so far, %d changed, %d deleted, %d of %d units compressed, %.1f s",
        report.documents,
        report.documents_changed,
        report.documents_deleted,
        report.segments_compressed,
        report.segments,
        report.seconds,
    )


def _no_documents(reading: FileDocuments | None) -> EmptyCorpusError:
    if reading is not None:
        return empty_corpus(reading.skipped)
    return EmptyCorpusError(
        "there are no documents to ingest",
        got="none",
        expected="at least one",
        next_step="pass some; ConceptIndex.create(storage_dir) makes an index without any",
    )


def origin_of(index: Corpus, document: Document) -> str | None:
    """The file of a document: its own, or the one that its metadata names if that is within the paths told."""
    if isinstance(document, FileDocument) and document.file:
        return document.file
    return index.origins.file(str(document.metadata.get("source") or ""))


def _ingest_batch(index: Corpus, documents: list[Document], report: IngestReport) -> IngestReport:
    changed = changed_documents(index, documents)
    if changed:
        # Before anything is compressed: a compaction must not take concepts away that are about to be referred to.
        index.faiss.catalog.claim()
    nodes = index.splitting.nodes(changed)
    budgeted = index.library.chooser.budgeted
    if budgeted:
        index.complete_at_end()  # what each chunk may keep is known when all are there
    ensured = () if budgeted else nodes
    made = traced_ensure(index.library, (node.get_content(MetadataMode.NONE) for node in ensured))
    added = replace_documents(index, changed, nodes, later=True)  # they are there by now
    remember_origins(index, documents, changed)
    if made.compressed >= _MANY_SEGMENTS:
        release_unused(index.library.llm.device)
    totals = [index.accounts.of_document(d.id_) for d in documents]
    segments = sum(t.segments for t in totals)
    return replace(
        report,
        documents=report.documents + len(documents),
        documents_changed=report.documents_changed + len(changed),
        chunks=report.chunks + sum(t.chunks for t in totals),
        chunks_added=report.chunks_added + added,
        segments=report.segments + segments,
        segments_compressed=report.segments_compressed + made.compressed,
        segments_reused=report.segments_reused + segments - made.compressed,
        source_tokens=report.source_tokens + sum(t.source_tokens for t in totals),
        concepts=report.concepts + sum(t.concepts for t in totals),
    )


def remember_origins(index: Corpus, documents: Iterable[Document], changed: Sequence[Document]) -> None:
    """Remember which files documents came from; one that came in by hand is no file's any more."""
    for document in documents:
        file = origin_of(index, document)
        if file is not None:
            index.origins.put(document.id_, file)
    for document in changed:
        if origin_of(index, document) is None:
            index.origins.forget(document.id_)


def changed_documents(index: Corpus, documents: Iterable[Document]) -> list[Document]:
    """Documents that are new or differ from what is there, in their text, their metadata, or how they are split.

    Raises:
        StorageMismatchError: See `Splitting.check`.
    """
    index.splitting.check()  # else all of them would count as changed
    return [d for d in documents if not index.splitting.knows(d, index.docstore.get_document_hash(d.id_))]


def replace_documents(
    index: Corpus, changed: Sequence[Document], nodes: Sequence[BaseNode], *, later: bool = False
) -> int:
    """Put nodes in the place of those their documents had, and remember the documents' hashes.

    Nodes of a changed document that are as they were are left alone. Where the store cannot take back what was done
    (a vector store of somebody else's), a failure leaves the documents without a hash, so that the next run mends them.

    Args:
        index: Where they lie.
        changed: The documents, new or changed.
        nodes: Their nodes.
        later: Leave the concepts to be made later.

    Returns:
        How many nodes were not there before.
    """
    present = {node_id for d in changed for node_id in index.faiss.node_ids(d.id_)}
    stay = _unchanged(index, [node for node in nodes if node.node_id in present])
    going, coming = sorted(present - stay), [node for node in nodes if node.node_id not in stay]
    if going and coming:
        _keep_embeddings(index, going, coming)
    ready = index.embedded(coming)  # whatever can go wrong does so before something is deleted
    if going:
        for document in changed:
            index.docstore.set_document_hash(document.id_, _UNDER_WAY)
        index.delete_nodes(going)
    index.insert_nodes(ready, later=later)
    for document in changed:
        index.docstore.set_document_hash(document.id_, index.splitting.hash_of(document))
        index.splitting.note(document)
    if changed:
        index.splitting.remember()
    return sum(node.node_id not in present for node in coming)


def _unchanged(index: Corpus, nodes: Sequence[BaseNode]) -> set[str]:
    """Ids of nodes that are there as they are now.

    A chunk of the default parser carries the identity of its text and metadata, but not how they are laid out; what
    ids of somebody's own carry nobody knows.
    """
    try:
        found = {node.node_id: _state(node) for node in index.faiss.get_nodes([node.node_id for node in nodes])}
    except ConfigurationError:  # a store that cannot give nodes by their ids: what those of the parser say must do
        return set() if index.splitting.own else {node.node_id for node in nodes}
    except CorruptRecordError:  # what is damaged is written anew, whatever it was
        return set()
    return {node.node_id for node in nodes if found.get(node.node_id) == _state(node)}


def _state(node: BaseNode) -> tuple[str, str, str]:
    metadata = json.dumps(node.metadata, sort_keys=True, default=str)
    return node.get_content(MetadataMode.NONE), metadata, json.dumps(layout_of(node), sort_keys=True)


def _keep_embeddings(index: Corpus, going: Sequence[str], coming: Sequence[BaseNode]) -> None:
    """Give nodes the embeddings of those that go and that the embedder would read alike.

    Metadata that it does not read, such as the path of the file, is part of a node's id: a folder that was moved brings
    new nodes, and nothing to embed.
    """
    try:
        former = {n.get_content(MetadataMode.EMBED): n.embedding for n in index.faiss.embedded_nodes(going)}
    except CorruptRecordError:
        return  # all of them are embedded anew
    for node in coming:
        if node.embedding is None:
            node.embedding = former.get(node.get_content(MetadataMode.EMBED))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: dict[str, Document] = {}
    size, room = 0, min(_FIRST_BATCH_CHARS, _BATCH_CHARS)
    for document in documents:
        if document.id_ in batch:
            # An id that comes again is a change of the document, to be made once the first is in.
            yield list(batch.values())
            batch, size = {}, 0
        batch[document.id_] = document
        size += len(document.text)
        if size >= room:
            yield list(batch.values())
            batch, size, room = {}, 0, min(2 * room, _BATCH_CHARS)
    if batch:
        yield list(batch.values())
