"""What one step of a watch brought in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compllm_rag.llamaindex.corpus import IngestReport
from compllm_rag.llamaindex.documents import FileDocuments
from compllm_rag.llamaindex.readers.found import FileNote


@dataclass(frozen=True)
class WatchBatch:
    """What was brought in in one step.

    Attributes:
        full: Whether all files were looked at, not only those that changed.
        files: Files that were read.
        documents_changed: Documents that were new or differed.
        documents_deleted: Documents whose files are gone, or left out now.
        chunks_added: Chunks that were embedded and got their concepts; the others of these documents stayed.
        chunks: Chunks of all documents that were read.
        segments_compressed: Units that went through the compressor.
        chunks_total: Chunks of the whole index, afterwards.
        seconds: Wall time of the step.
        edit_s: From the first edit of the step, as the file's time tells, to the commit that makes it answerable; None
            for the first step, whose edits are of before.
        problems: What could not be read or brought in, and stays as it was; it is tried again when it changes.
    """

    full: bool = False
    files: int = 0
    documents_changed: int = 0
    documents_deleted: int = 0
    chunks_added: int = 0
    chunks: int = 0
    segments_compressed: int = 0
    chunks_total: int = 0
    seconds: float = 0.0
    edit_s: float | None = None
    problems: tuple[FileNote, ...] = ()

    @classmethod
    def of(cls, report: IngestReport, reading: FileDocuments, problems: Iterable[FileNote] = ()) -> WatchBatch:
        """What an ingest brought.

        Args:
            report: Of the ingest.
            reading: What it read.
            problems: More of them than the reading met.
        """
        missed = [FileNote(one.path, one.reason) for one in reading.skipped if one.problem and one.kind != "vanished"]
        return cls(
            files=len(reading.listing.files),
            documents_changed=report.documents_changed,
            documents_deleted=report.documents_deleted,
            chunks_added=report.chunks_added,
            chunks=report.chunks,
            segments_compressed=report.segments_compressed,
            problems=(*problems, *missed),
        )

    @classmethod
    def sum(cls, batches: Sequence[WatchBatch]) -> WatchBatch:
        """What several brought together; times and the total are left out."""
        counts = ("files", "documents_changed", "documents_deleted", "chunks_added", "chunks", "segments_compressed")
        return cls(
            **{name: sum(getattr(one, name) for one in batches) for name in counts},
            problems=tuple(problem for one in batches for problem in one.problems),
        )

    @property
    def empty(self) -> bool:
        """Whether nothing came of it."""
        return not (self.documents_changed or self.documents_deleted or self.problems)

    def fields(self) -> dict[str, Any]:
        """Plain values, as `watch --json` prints them."""
        return asdict(self) | {
            "seconds": round(self.seconds, 4),
            "edit_s": None if self.edit_s is None else round(self.edit_s, 4),
            "problems": [one.fields() for one in self.problems],
        }
