"""What ingestion needs of an index, and what it tells of its work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from llama_index.core.schema import BaseNode
from llama_index.core.storage.docstore.types import BaseDocumentStore

from compllm_rag.catalog.accounts import Accounts
from compllm_rag.catalog.origins import Origins
from compllm_rag.catalog.pending import PendingChunks
from compllm_rag.library import ConceptLibrary, EnsureReport
from compllm_rag.llamaindex.readers.found import FileNote, SkippedFile
from compllm_rag.llamaindex.splitting import Splitting
from compllm_rag.llamaindex.tracked_store import NodeStore
from compllm_rag.store.base import ConceptStore


@dataclass(frozen=True)
class IngestReport:
    """What an ingest met and did.

    Attributes:
        documents: Documents met.
        documents_changed: Those that were new or differed.
        documents_deleted: Documents that were pruned: their files are gone, or empty.
        documents_moved: Documents that came from a file other than before, which is not there any more.
        chunks: Chunks of all documents met.
        chunks_added: Chunks of those that were not there before; only they are embedded.
        segments: Their segments.
        segments_compressed: Segments that went through the compressor.
        segments_reused: Segments whose concepts were in the store already.
        source_tokens: Tokens of all documents met.
        concepts: Concepts of all documents met.
        seconds: Wall time so far, model loading excluded.
        skipped: Files that gave no document, and why; complete at the end, where `load_documents` read them.
        notes: What was assumed about those that did, such as their encoding.
    """

    documents: int = 0
    documents_changed: int = 0
    documents_deleted: int = 0
    documents_moved: int = 0
    chunks: int = 0
    chunks_added: int = 0
    segments: int = 0
    segments_compressed: int = 0
    segments_reused: int = 0
    source_tokens: int = 0
    concepts: int = 0
    seconds: float = 0.0
    skipped: tuple[SkippedFile, ...] = ()
    notes: tuple[FileNote, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Source tokens per second, reused ones included."""
        return self.source_tokens / self.seconds if self.seconds else 0.0

    def fields(self) -> dict[str, Any]:
        """Plain values, as `ingest --json` prints them."""
        counts = "chunks chunks_added segments segments_compressed segments_reused"
        documents = "documents documents_changed documents_deleted documents_moved"
        return {name: getattr(self, name) for name in f"{documents} {counts}".split()} | {
            "source_tokens": self.source_tokens,
            "seconds": round(self.seconds, 4),
            "tokens_per_s": round(self.tokens_per_s, 2),
            "skipped": [one.fields() for one in self.skipped],
            "notes": [one.fields() for one in self.notes],
        }


Progress = Callable[[IngestReport], None]


class Corpus(Protocol):
    """What documents are brought into: the parts of a `ConceptIndex` that this takes."""

    origins: Origins

    @property
    def faiss(self) -> NodeStore:
        """Vectors and text."""
        ...

    @property
    def docstore(self) -> BaseDocumentStore:
        """Hashes of documents."""
        ...

    @property
    def library(self) -> ConceptLibrary:
        """Concepts."""
        ...

    @property
    def splitting(self) -> Splitting:
        """Cuts documents into chunks."""
        ...

    @property
    def accounts(self) -> Accounts:
        """Counts by document."""
        ...

    @property
    def pending(self) -> PendingChunks:
        """Chunks that lack concepts."""
        ...

    @property
    def store(self) -> ConceptStore:
        """Keeps concepts."""
        ...

    @property
    def settled(self) -> EnsureReport:
        """What the last budget took to compress."""
        ...

    def bulk(self) -> AbstractContextManager[None]:
        """One commit for a block."""
        ...

    def complete_at_end(self) -> None:
        """Have all concepts at the end of the block, once it is known what a budget leaves."""
        ...

    def commit(self) -> None:
        """Make everything durable."""
        ...

    def embedded(self, nodes: Sequence[BaseNode]) -> list[BaseNode]:
        """Copies of chunks with their embeddings."""
        ...

    def insert_nodes(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:
        """Add chunks."""
        ...

    def delete_nodes(self, node_ids: list[str]) -> None:
        """Delete chunks."""
        ...

    def delete_ref_doc(self, ref_doc_id: str) -> None:
        """Delete a document."""
        ...
