"""Making a damaged storage whole again from its text, which is always kept.

Three steps, each of them one commit, so that a repair that is killed can be run again: rows of text that fail their
digest go, and vectors that are damaged or do not belong to the rows are made again; documents that lost rows go
wholly, so that the next ingest brings them back; concept records that are damaged or missing are compressed again,
and everything is counted anew. What is not damaged is left as it is.
"""

from __future__ import annotations

import functools
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import MetadataMode

from compllm_rag.catalog import rows as node_rows
from compllm_rag.catalog.database import claimed, connected, read_state, write_state
from compllm_rag.catalog.flat_vectors import FlatVectors, unit_vector
from compllm_rag.catalog.generations import GenerationFiles, VectorGeneration
from compllm_rag.catalog.rows import StoredNode
from compllm_rag.catalog.tracked import STORE_KEY
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.errors import CorruptRecordError, StorageMismatchError, StorageNotFoundError
from compllm_rag.llamaindex.embedding_texts import EmbeddingTexts
from compllm_rag.llamaindex.index import ConceptIndex
from compllm_rag.llamaindex.nodes import decode_node
from compllm_rag.llamaindex.observer import passages_of
from compllm_rag.llamaindex.opening import load_index
from compllm_rag.llamaindex.storage_parts import load_embedder_of, load_own_compressor
from compllm_rag.storage.manifest import CATALOG, CONCEPTS, Manifest, read_manifest
from compllm_rag.storage.stores import open_store
from compllm_rag.storage.verification import StorageCheck, verify_storage

Progress = Callable[[str, float | None], None]
_ASIDE = "concepts.damaged"
_BATCH_CHUNKS = 64


@dataclass(frozen=True)
class RepairReport:
    """What a repair found and did.

    Attributes:
        findings: How many things were wrong.
        chunks_lost: Rows whose text was damaged.
        documents_lost: Ids of the documents they belonged to, which are gone as a whole; ingest them again.
        chunks_reembedded: Vectors made again.
        records_dropped: Concept records that were damaged.
        segments_compressed: Segments compressed again.
        sound: Whether a (fast) verification finds nothing now.
        seconds: Wall time.
    """

    findings: int
    chunks_lost: int = 0
    documents_lost: tuple[str, ...] = ()
    chunks_reembedded: int = 0
    records_dropped: int = 0
    segments_compressed: int = 0
    sound: bool = True
    seconds: float = 0.0

    def fields(self) -> dict[str, Any]:
        """Plain values, as `repair --json` prints them."""
        return {**asdict(self), "documents_lost": list(self.documents_lost)}


def repair_storage(
    folder: str | Path,
    *,
    llm: str | None = None,
    embedder: str | BaseEmbedding | None = None,
    compressor: ConceptCompressor | None = None,
    progress: Progress | None = None,
    **model_options: Any,
) -> RepairReport:
    """Verify a storage deeply and repair what is damaged. A sound one is left alone, and no model is loaded for it.

    Args:
        folder: The storage.
        llm: Where the target LLM lies now; None takes the name the storage keeps.
        embedder: The same for the embedder, or a LlamaIndex embedder.
        compressor: The storage's compressor, if it is loaded already.
        progress: Called with a message and a share from 0 to 1.
        **model_options: `dtype`, `device`, `cache_dir`, `offline` of `TargetLLM.from_pretrained`.

    Raises:
        CorruptRecordError: The database with the text, or the manifest in it, is damaged: nothing can be made from it.
        FingerprintMismatchError, UnsupportedFormatError: The adapters in the storage are damaged, or of another LLM.
        StoreLockedError: Another process writes.
        StoreReadOnlyError: The storage cannot be written.
    """
    begun, path = time.perf_counter(), Path(folder).absolute()
    check = verify_storage(path, deep=True, progress=progress)
    if check.sound:
        return RepairReport(0, seconds=time.perf_counter() - begun)
    _refuse_hopeless(path, check)
    _refuse_elsewhere(path)
    manifest = read_manifest(path)
    own = compressor or load_own_compressor(path, manifest, llm, progress, model_options)
    manifest.check_compressor(own.fingerprint, own.llm.source)
    embed = functools.partial(load_embedder_of, manifest, embedder, progress, model_options)
    with _rows(path) as connection:
        chunks_lost, reembedded = _repair_rows(path, manifest, connection, embed, progress)
    known = {name: value for name, value in model_options.items() if name in ("device", "cache_dir", "offline")}
    dropped = _repair_store(path, manifest)
    parts = load_index(path, compressor=own, embedder=embedder, progress=progress, complete=False, **known)
    with ConceptIndex.of(parts) as index:
        lost, compressed = _complete(index, progress)
    for aside in path.glob(f"{_ASIDE}*"):
        shutil.rmtree(aside)
    return RepairReport(
        findings=check.n_findings,
        chunks_lost=chunks_lost,
        documents_lost=tuple(lost),
        chunks_reembedded=reembedded,
        records_dropped=dropped,
        segments_compressed=compressed,
        sound=verify_storage(path, progress=progress).sound,
        seconds=time.perf_counter() - begun,
    )


def _refuse_elsewhere(folder: Path) -> None:
    with connected(folder / CATALOG, writing=False) as connection:
        row = connection.execute("SELECT value FROM meta WHERE key = ?", (STORE_KEY,)).fetchone()
        connection.close()
    if row is not None:
        raise StorageMismatchError(
            "only a storage that keeps its own text can be repaired from it",
            got=f"text in {row[0]}",
            next_step="delete the storage, open ConceptIndex.from_vector_store with a new storage_dir, and adopt()",
        )


def _refuse_hopeless(folder: Path, check: StorageCheck) -> None:
    for finding in check.findings:
        if finding.part in ("database", "manifest"):
            raise CorruptRecordError(
                "this storage cannot be repaired: what everything else is made from is damaged",
                got=f"{finding.part}: {finding.what}",
                next_step=f"restore {folder} from a copy, or delete it and ingest again",
            )


@contextmanager
def _rows(folder: Path) -> Iterator[sqlite3.Connection]:
    """The catalog's rows, to be written, whatever state its vectors are in; commits when the block ends well."""
    with claimed(folder), connected(folder / CATALOG, writing=True) as connection:
        connection.text_factory = node_rows.lenient_text
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            if connection.in_transaction:
                connection.execute("COMMIT")
        finally:
            connection.close()


def _repair_rows(
    folder: Path,
    manifest: Manifest,
    connection: sqlite3.Connection,
    load_embed: Callable[[], BaseEmbedding],
    progress: Progress | None,
) -> tuple[int, int]:
    """Drop damaged rows; make vectors again unless they belong to the rows. Gives how many of each."""
    files = GenerationFiles(folder)
    bad, ids = [], []
    for id_, row in node_rows.scan(connection):
        ids.append(id_)
        if row is None:
            bad.append(id_)
    vectors, number = _sound_vectors(files, connection, ids)
    if vectors is not None and not bad:
        return 0, 0
    node_rows.delete_rows(connection, bad)
    made = 0
    if vectors is None:
        vectors, embed = FlatVectors(manifest.dimension), load_embed()
        for page in _pages(connection):
            _embed(vectors, page, embed, manifest.dimension)
            made += len(page)
            if progress:
                progress("embedding chunks again", made / max(len(ids) - len(bad), 1))
    vectors.remove(bad)
    state = files.save(number + 1, vectors)
    write_state(connection, state)
    connection.execute("COMMIT")
    files.keep_only(number + 1)
    return len(bad), made


def _sound_vectors(
    files: GenerationFiles, connection: sqlite3.Connection, ids: list[int]
) -> tuple[FlatVectors | None, int]:
    """The vectors if they belong to these rows, else None; and the highest number a generation had."""
    number = files.highest()
    try:
        state: VectorGeneration = read_state(connection)
        number = max(number, state.number)
        vectors = files.load(state)
    except (CorruptRecordError, FileNotFoundError):
        return None, number
    # Where they disagree, nobody can tell which vector is whose: wrong passages would come at the best scores.
    return (vectors if np.array_equal(vectors.ids(), np.array(ids, dtype=np.int64)) else None), number


def _pages(connection: sqlite3.Connection) -> Iterator[list[StoredNode]]:
    page: list[StoredNode] = []
    for row in node_rows.read_all(connection):
        page.append(row)
        if len(page) == _BATCH_CHUNKS:
            yield page
            page = []
    if page:
        yield page


def _embed(vectors: FlatVectors, page: list[StoredNode], embed: BaseEmbedding, dimension: int) -> None:
    texts = EmbeddingTexts(embed).of([decode_node(row) for row in page])  # as an index embeds them
    made = [unit_vector(v, dimension, "a chunk") for v in embed.get_text_embedding_batch(texts)]
    vectors.add([row.id for row in page], np.stack(made))


def _repair_store(folder: Path, manifest: Manifest) -> int:
    """Drop damaged concept records; a store that cannot be opened is put aside for a new one."""
    concepts = folder / CONCEPTS
    try:
        with open_store(manifest, concepts, counted=False) as store:
            check = store.verify(deep=True)
            if check.index_damaged:
                raise CorruptRecordError("the index of the concept store is damaged")
            if check.damage:
                store.discard(check)
            return len(check.damaged_rows) or sum(damage.key is not None for damage in check.damage)
    except (CorruptRecordError, StorageNotFoundError, StorageMismatchError):
        if manifest.concept_store is not None:
            raise  # it is not this storage's alone to put aside
        number = len(list(folder.glob(f"{_ASIDE}*")))
        if concepts.exists():
            concepts.rename(folder / f"{_ASIDE}{number}")
        open_store(manifest, concepts).close()
        return 0


def _complete(index: ConceptIndex, progress: Progress | None) -> tuple[list[str], int]:
    """Take documents that lost rows away, compress what is missing, and count everything anew."""
    with index.bulk():
        index.faiss.catalog.claim()
        rows = index.faiss.chunks_by_document()
        lost = [id_ for id_, account in index.accounts.of_documents().items() if account.chunks > rows.get(id_, 0)]
        for doc_id in lost:
            index.delete_ref_doc(doc_id)
        total, done, compressed = index.faiss.n_nodes, 0, 0
        index.accounts.clear()
        index.pending.clear()
        for nodes in index.faiss.iter_pages():
            compressed += index.library.ensure(node.get_content(MetadataMode.NONE) for node in nodes).compressed
            index.accounts.change(passages_of(index.library, nodes), 1)
            done += len(nodes)
            if progress:
                progress("compressing what is missing", done / total)
        index.accounts.choices.prune()
    return lost, compressed
