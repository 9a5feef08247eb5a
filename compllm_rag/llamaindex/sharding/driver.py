"""The driver: plans parts, has workers encode them, and commits all of it in one step.

It alone touches the storage. From the first look at the documents to the commit it holds the storage's write lock, as
an ordinary ingest does, so names and hashes that decide what is to be done cannot change under it; readers see the
former state until the end.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_index.core.schema import BaseNode, Document, MetadataMode

from compllm_rag.catalog.kv import KeyValues
from compllm_rag.catalog.origins import Origins
from compllm_rag.errors import ConfigurationError, WorkersFailedError
from compllm_rag.llamaindex.corpus import IngestReport
from compllm_rag.llamaindex.documents import FileDocuments, empty_corpus
from compllm_rag.llamaindex.index import ConceptIndex
from compllm_rag.llamaindex.ingest import changed_documents, remember_origins, replace_documents
from compllm_rag.llamaindex.naming import Names
from compllm_rag.llamaindex.readers.walk import roots_of
from compllm_rag.llamaindex.sharding.shards import Shard, ShardManifest, damaged_shard, read_shard, shard_store
from compllm_rag.llamaindex.sharding.staging import Job, Staging
from compllm_rag.llamaindex.sound import sound_documents
from compllm_rag.store import DiskStore

logger = logging.getLogger(__name__)

PART_CHARS = 400_000

# What workers tell of a part, by name: see `PartEncoder.__call__`.
Receipt = Mapping[str, Any]
# Has parts encoded by their keys, in any order, and tells of each as it is done.
Encode = Callable[[list[str]], Iterator[Receipt]]


@dataclass(frozen=True)
class PartsReport:
    """What an ingest by many workers did.

    Attributes:
        ingest: What the documents became, counted as an ordinary ingest counts.
        parts: Parts of what was new or changed.
        parts_reused: Those that an earlier run had encoded.
        workers: Processes that encoded parts; one that was started again counts twice.
        plan_s: Seconds the driver read documents and wrote parts.
        encode_s: Seconds it waited for workers, their start included.
        merge_s: Seconds it took to merge shards and to commit.
        driver_cpu_s: Seconds of a CPU the driver took to plan and to merge.
        workers_s: Seconds that workers worked, all of them together, their start left out.
        workers_cpu_s: Seconds of a CPU they took for it.
    """

    ingest: IngestReport
    parts: int = 0
    parts_reused: int = 0
    workers: int = 0
    plan_s: float = 0.0
    encode_s: float = 0.0
    merge_s: float = 0.0
    driver_cpu_s: float = 0.0
    workers_s: float = 0.0
    workers_cpu_s: float = 0.0

    def fields(self) -> dict[str, Any]:
        """Plain values."""
        names = ("plan_s", "encode_s", "merge_s", "driver_cpu_s", "workers_s", "workers_cpu_s")
        seconds = {name: round(getattr(self, name), 3) for name in names}
        counts = {name: getattr(self, name) for name in ("parts", "parts_reused", "workers")}
        return self.ingest.fields() | counts | seconds


@dataclass
class _Plan:
    keys: list[str]
    unchanged: list[str]  # ids of documents that are there already
    met: int = 0


class PartsIngest:
    """One ingest by many workers.

    Args:
        index: Open for writing, its concepts in its own folder.
        staging: Shared with the workers, driven by this process.
        part_chars: Characters of the documents of a part, about: what a worker does at once, and what a kill can lose.
        tell: Called with a line about how far it is.
    """

    def __init__(
        self,
        index: ConceptIndex,
        staging: Staging,
        *,
        part_chars: int = PART_CHARS,
        tell: Callable[[str], None] = logger.info,
    ) -> None:
        check_supported(index)
        if part_chars < 1:
            raise ConfigurationError("parts cannot be that small", got=part_chars, expected="at least 1 character")
        self._index, self._staging, self._part_chars, self._tell = index, staging, part_chars, tell
        self._encoding = frozenset[str]()  # parts that had no shard when this run began
        self._made = list[ShardManifest]()  # their shards

    def run(
        self, documents: Iterable[Document], encode: Encode, job: Job, *, within: Iterable[Path] = ()
    ) -> PartsReport:
        """Ingest documents.

        Args:
            documents: A stream.
            encode: Has parts encoded.
            job: What workers need to know.
            within: The files and folders that the documents come from; see `ConceptIndex.ingest`.

        Raises:
            EmptyCorpusError: There are no documents.
            WorkersFailedError: Not all parts were encoded; those that were are kept.
            CorruptRecordError: A shard is damaged.
            StoreLockedError, StoreFullError: See `ConceptIndex.ingest`.
        """
        index, staging = self._index, self._staging
        begun, busy = time.perf_counter(), time.process_time()
        reading = documents if isinstance(documents, FileDocuments) else None
        index.origins = Origins(KeyValues(index.faiss.catalog), roots_of(within))
        names = Names(index)
        with index.bulk():
            plan = self._planned(names.settled(sound_documents(documents)), job)
            if not plan.met:
                raise empty_corpus(reading.skipped if reading else ())
            planned, busy = time.perf_counter(), time.process_time() - busy
            missing = [key for key in dict.fromkeys(plan.keys) if not staging.has_shard(key)]
            self._tell(f"{plan.met} documents: {len(plan.keys)} parts to ingest, {len(missing)} of them to encode")
            self._encoding = frozenset(missing)
            if missing:
                staging.put_job(job, index._folder())
                self._encode(missing, encode)
            encoded, merging = time.perf_counter(), time.process_time()
            report = self._merged(plan)
        merged, busy = time.perf_counter(), busy + time.process_time() - merging
        names.log()
        report = replace(
            report,
            documents_moved=names.moved,
            seconds=merged - begun,
            skipped=tuple(reading.skipped) if reading else (),
            notes=(*(reading.notes if reading else ()), *names.notes),
        )
        workers = {(made.host, made.pid) for made in self._made}
        seconds = (planned - begun, encoded - planned, merged - encoded, busy)
        working = (sum(made.seconds for made in self._made), sum(made.cpu_s for made in self._made))
        return PartsReport(report, len(plan.keys), len(plan.keys) - len(missing), len(workers), *seconds, *working)

    def _planned(self, documents: Iterable[Document], job: Job) -> _Plan:
        """Write what is new or changed into parts; the order of the documents is that of the parts."""
        plan, coming = _Plan([], []), set[str]()
        batch: dict[str, Document] = {}
        size = 0
        identity = _identity(self._index, job)

        def write() -> None:
            nonlocal size
            if batch:
                plan.keys.append(self._staging.put_part(batch.values(), identity))
                batch.clear()
                size = 0

        for document in documents:
            plan.met += 1
            # One that comes again in this run is compared when the first is in.
            if document.id_ not in coming and not changed_documents(self._index, [document]):
                plan.unchanged.append(document.id_)
                remember_origins(self._index, [document], [])
                continue
            if not coming:
                # Before anything is encoded: see `ingest._ingest_batch`.
                self._index.faiss.catalog.claim()
            coming.add(document.id_)
            if document.id_ in batch:
                write()
            batch[document.id_] = document
            size += len(document.text)
            if size >= self._part_chars:
                write()
        write()
        return plan

    def _encode(self, keys: list[str], encode: Encode) -> None:
        """Have parts encoded; what goes wrong with one is told at the end, once the others are done."""
        begun, tokens = time.perf_counter(), 0
        failed, seen = list[Receipt](), set[tuple[str, int]]()
        for number, made in enumerate(encode(keys), 1):
            if made["error"]:
                failed.append(made)
                self._tell(f"part {str(made['part'])[:16]} could not be encoded: {made['error']}")
            tokens += int(made["tokens"])
            seen.add((str(made["host"]), int(made["pid"])))
            rate = tokens / (time.perf_counter() - begun)
            self._tell(f"part {number} of {len(keys)}: {tokens} tokens by {len(seen)} workers, {rate:.0f} a second")
        lost = [key for key in keys if not self._staging.has_shard(key)]
        if failed or lost:
            first = f", the first: {failed[0]['error']}" if failed else ""
            raise WorkersFailedError(
                "not all parts of the corpus were encoded, so nothing was committed",
                got=f"{len(lost)} of {len(keys)} missing{first}",
                next_step="look at what went wrong, then run the same command again: the others are kept",
            )

    def _merged(self, plan: _Plan) -> IngestReport:
        """Bring all shards into the storage, in the order of the documents."""
        report = IngestReport(documents=plan.met)
        for number, key in enumerate(plan.keys, 1):
            report = self._merge(key, report)
            if number % 100 == 0:
                self._tell(f"merged {number} of {len(plan.keys)} parts")
        totals = [self._index.accounts.of_document(doc_id) for doc_id in plan.unchanged]
        segments = report.segments + sum(t.segments for t in totals)
        return replace(
            report,
            chunks=report.chunks + sum(t.chunks for t in totals),
            segments=segments,
            segments_reused=max(0, segments - report.segments_compressed),
            source_tokens=report.source_tokens + sum(t.source_tokens for t in totals),
            concepts=report.concepts + sum(t.concepts for t in totals),
        )

    def _merge(self, key: str, report: IngestReport) -> IngestReport:
        index, folder = self._index, self._staging.shards / key
        documents = self._staging.part(key)
        # An id that came twice may be back at what it was.
        changed = changed_documents(index, documents)
        shard = read_shard(folder, key, index.faiss.dim)
        nodes = self._nodes(changed, documents, shard, folder)
        with shard_store(folder, index.manifest, read_only=True) as store:
            _merge_concepts(index, store)
        self._check_complete(nodes, folder)
        added = replace_documents(index, changed, nodes, later=True)  # their concepts are there by now
        remember_origins(index, documents, changed)
        totals = [index.accounts.of_document(document.id_) for document in documents]
        # By the shard, not by what workers told: one that was killed at the end of a part told nothing.
        made = shard.manifest if changed and key in self._encoding else None
        if made is not None:
            self._made.append(made)
        return replace(
            report,
            documents_changed=report.documents_changed + len(changed),
            chunks=report.chunks + sum(t.chunks for t in totals),
            chunks_added=report.chunks_added + added,
            segments=report.segments + sum(t.segments for t in totals),
            segments_compressed=report.segments_compressed + (made.compressed if made else 0),
            source_tokens=report.source_tokens + sum(t.source_tokens for t in totals),
            concepts=report.concepts + sum(t.concepts for t in totals),
        )

    def _nodes(self, changed: list[Document], documents: list[Document], shard: Shard, folder: Path) -> list[BaseNode]:
        """The chunks of the changed documents, with the vectors that a worker made for them."""
        vectors = dict(zip(shard.manifest.nodes, shard.vectors, strict=True))
        nodes = self._index.splitting.nodes(changed)
        absent = sum(node.node_id not in vectors for node in nodes)
        if absent or (len(changed) == len(documents) and len(nodes) != len(vectors)):
            raise damaged_shard(folder, f"{len(vectors)} chunks, {absent} of {len(nodes)} missing")
        for node in nodes:
            node.embedding = vectors[node.node_id].tolist()
        return nodes

    def _check_complete(self, nodes: list[BaseNode], folder: Path) -> None:
        library = self._index.library
        keys = [
            key for node in nodes for key in library.passage(node.get_content(metadata_mode=MetadataMode.NONE)).all_keys
        ]
        missing = library.store.contains(keys).count(False)
        if missing:
            raise damaged_shard(folder, f"{missing} of {len(keys)} records missing")


def check_supported(index: ConceptIndex) -> None:
    """Refuse storages that only an ordinary ingest can fill.

    Raises:
        ConfigurationError: Naming what stands in the way.
    """
    if index.storage_dir is None or not isinstance(index.store, DiskStore):
        raise ConfigurationError(
            "workers cannot fill this storage",
            got="concepts kept in memory or on a shared server",
            expected="concepts kept in the storage folder",
            next_step="use `compllm-rag ingest`, or a storage without concept_store",
        )
    if index.library.chooser.budgeted:
        raise ConfigurationError(
            "a budget is shared out once all chunks are known, which workers do not",
            got="a storage with a budget",
            expected="a rate, or a policy that looks at each text alone",
            next_step="use `compllm-rag ingest`, or a storage with --rate",
        )


def job_of(index: ConceptIndex, *, llm: str | None, embedder: str | None, **settings: Any) -> Job:
    """What workers of an index need to know.

    Args:
        index: The index.
        llm: Where its LLM lies for workers; None takes the name the storage keeps.
        embedder: The same for the embedder.
        **settings: `dtype`, `device` and `threads` of the `Job`.
    """
    manifest = index.manifest
    return Job(manifest=manifest.to_json(), llm=llm or manifest.llm, embedder=embedder or manifest.embedder, **settings)


def _identity(index: ConceptIndex, job: Job) -> str:
    """What beside its documents decides what becomes of a part, as text."""
    manifest = index.manifest
    return json.dumps(
        {
            "fingerprint": manifest.fingerprint,
            "embedder": manifest.embedder_identity,
            "encoding": manifest.encoding,
            "ingest": manifest.ingest.model_dump(mode="json"),
            # No identity of a concept, but of this job: one storage should not get some of each.
            "dtype": job.dtype or f"default of {job.device}",
        },
        sort_keys=True,
    )


def _merge_concepts(index: ConceptIndex, store: DiskStore) -> None:
    if isinstance(index.store, DiskStore):
        index.store.merge(store)
