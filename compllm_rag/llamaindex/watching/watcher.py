"""Keeps an index as the files of some folders are: at first all of them, then only what changes."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from compllm_rag.catalog.kv import KeyValues
from compllm_rag.catalog.origins import Origins
from compllm_rag.errors import (
    CompLLMError,
    ConfigurationError,
    PruneRefusedError,
    StoreFullError,
    StoreLockedError,
)
from compllm_rag.llamaindex.documents import FileDocuments
from compllm_rag.llamaindex.ingest import Corpus, IngestReport, Progress, ingest_documents
from compllm_rag.llamaindex.readers.found import FileNote, shown
from compllm_rag.llamaindex.readers.walk import Listing, as_paths
from compllm_rag.llamaindex.watching.batch import WatchBatch
from compllm_rag.llamaindex.watching.folders import WatchedFolders
from compllm_rag.llamaindex.watching.ignoring import FILE
from compllm_rag.llamaindex.watching.listener import Listener
from compllm_rag.store.lock import WriterLock

logger = logging.getLogger(__name__)

LOCK = "watch.lock"
_LOOK_S = 0.5  # how often the loop looks whether it should end
_RETRY_S = 1.0  # another process writes: it will be done some time
_MANY = 1000  # changes from which on everything is looked at, as when a branch is checked out
_FRESH_S = 60.0  # a file whose time lies further back was not edited just now, but moved here


class Watched(Corpus, Protocol):
    """What is kept up to date: a `ConceptIndex`."""

    storage_dir: Path | None


class Watcher:
    """Brings the files of some folders into an index, and then what changes in them, one step a commit.

    A step reads the files that changed, and no others: only their new chunks are embedded and compressed. Documents of
    files that are gone, or that `.gitignore` leaves out now, are deleted. What cannot be read keeps the documents that
    it had.

    A `with` block makes it the one watcher of the storage; others may write in turns with it.

    Args:
        index: Where documents go.
        folders: What is watched.
        ignore: Patterns as in a `.gitignore`, stronger than those of the files; `!PATTERN` lets something in.
        gitignore: Whether to heed `.gitignore` and `.git/info/exclude`.
        quiet_s: A step begins once nothing has changed for so long, so that the halves of a save are one step.

    Raises:
        ConfigurationError: No folder is named, or a file, or a pattern makes no sense.
        CorpusPathError: A folder does not exist.
    """

    def __init__(
        self,
        index: Watched,
        folders: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        ignore: Iterable[str] = (),
        gitignore: bool = True,
        quiet_s: float = 0.3,
    ) -> None:
        self._index, self._quiet_s = index, quiet_s
        self._folders = WatchedFolders(as_paths(folders), ignore, gitignore=gitignore, storage=index.storage_dir)
        if not 0 < quiet_s <= 3600:
            raise ConfigurationError("quiet_s makes no sense", got=quiet_s, expected="seconds, more than 0")
        self._again = set[str]()  # files that could not be brought in
        self._lock: WriterLock | None = None

    def __enter__(self) -> Self:
        """Become the watcher.

        Raises:
            StoreLockedError: There is another.
            StoreReadOnlyError: The storage cannot be written.
        """
        if self._index.storage_dir is not None:
            try:
                self._lock = WriterLock(Path(self._index.storage_dir) / LOCK)
            except StoreLockedError as error:
                raise StoreLockedError(
                    "another watcher keeps this storage up to date",
                    got=error.got,
                    next_step="name all folders to one watcher, or stop that process first",
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def sync(self, *, progress: Progress | None = None, strict: bool = False) -> WatchBatch:
        """Look at all files; those that did not change cost no more than being read.

        Args:
            progress: Called with a running report.
            strict: Raise where documents cannot be deleted, since not everything could be looked at.

        Raises:
            PruneRefusedError: See `strict`; what was read is kept.
            StoreLockedError: Another process writes.
        """
        begun, last = time.perf_counter(), IngestReport()

        def told(report: IngestReport) -> None:
            nonlocal last
            last = report
            if progress:
                progress(report)

        listing, named = self._folders.all_files(), self._folders.named
        reading = FileDocuments(named, on_skip=lambda skipped: None, listing=listing)
        reading.logs = False
        problems, refused = [], None
        with self._index.bulk():
            try:
                last = ingest_documents(
                    self._index, reading, progress=told, within=named, prune=True, may_be_empty=True
                )
            except PruneRefusedError as error:
                refused = error
                problems.append(FileNote(str(error.got), "nothing was deleted: not everything could be looked at"))
            left_out = self._left_out(listing)
            for doc_id in left_out:
                self._index.delete_ref_doc(doc_id)
        if refused is not None and strict:
            raise refused
        self._again.clear()
        made = WatchBatch.of(last, reading, problems)
        deleted = last.documents_deleted + len(left_out)
        return self._finished(replace(made, full=True, documents_deleted=deleted), begun)

    def step(self, changes: Mapping[str, float]) -> WatchBatch:
        """Bring in what changed: one commit, or where something in it fails, one for each file.

        Args:
            changes: Paths, absolute, links of the folders followed, with the time at which each was heard of.

        Raises:
            StoreLockedError: Another process writes; nothing was brought in.
            StoreFullError: No space; nothing was brought in.
        """
        begun, first = time.perf_counter(), _first_edit(changes)
        if len(changes) > _MANY or any(os.path.basename(path) == FILE for path in changes):  # noqa: PTH119
            made = self.sync()
        else:
            if _is_being_written(changes, self._quiet_s):
                time.sleep(self._quiet_s)
            made = self._changed(sorted({*changes, *self._again} - self._folders.roots.keys()))
        return replace(self._finished(made, begun), edit_s=max(0.0, time.time() - first))

    def run(
        self,
        stop: threading.Event,
        on_batch: Callable[[WatchBatch], None],
        *,
        progress: Progress | None = None,
        on_wait: Callable[[CompLLMError], None] | None = None,
    ) -> None:
        """Watch until told to stop; a step that was begun is finished.

        Args:
            stop: Set it to end, from another thread or a signal handler.
            on_batch: Called after the first look at all files, and after each step of which something came.
            progress: Called during the first look.
            on_wait: Called when a step has to wait, since another process writes or the disk is full.

        Raises:
            UnreadableFileError: A folder is gone, or cannot be watched. Its documents stay.
        """
        with Listener(list(self._folders.roots), self._folders.matters, self._quiet_s) as listener:
            first = self._patiently(stop, lambda: self.sync(progress=progress), on_wait)
            if first is not None:
                on_batch(first)
            while not stop.is_set():
                changes = listener.take(_LOOK_S)
                self._folders.check()
                if not changes:
                    continue
                made = self._patiently(stop, lambda changes=changes: self.step(changes), on_wait)  # type: ignore[misc]
                if made is not None and not made.empty:
                    on_batch(made)

    def _patiently(
        self, stop: threading.Event, call: Callable[[], WatchBatch], on_wait: Callable[[CompLLMError], None] | None
    ) -> WatchBatch | None:
        """Do something that others may be in the way of; None when told to stop first."""
        told = False
        while not stop.is_set():
            try:
                return call()
            except (StoreLockedError, StoreFullError) as error:
                if on_wait and not told:
                    on_wait(error)
                told = True
                stop.wait(_RETRY_S)
        return None

    def _changed(self, paths: Sequence[str]) -> WatchBatch:
        if not paths:
            return WatchBatch()
        try:
            made = self._bring(paths)
        except (StoreLockedError, StoreFullError):
            raise
        except Exception as error:  # one bad file must not keep the others out, nor end the watch
            if len(paths) > 1:
                return WatchBatch.sum([self._changed([path]) for path in paths])
            logger.debug("a change could not be brought in", exc_info=True)
            self._again.add(paths[0])
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            return WatchBatch(problems=(FileNote(shown(paths[0]), reason),))
        self._again -= {*paths}
        return made

    def _bring(self, paths: Sequence[str]) -> WatchBatch:
        """Read some files, and delete what was read from them before and is not there any more; one commit."""
        reading = FileDocuments((), on_skip=lambda skipped: None, listing=self._folders.files_of(paths))
        reading.logs = False
        last = IngestReport()

        def told(report: IngestReport) -> None:
            nonlocal last
            last = report

        try:
            last = ingest_documents(self._index, reading, progress=told, within=paths, prune=True, may_be_empty=True)
        except PruneRefusedError as error:  # what was read is in
            made = WatchBatch.of(last, reading)
            if len(paths) == 1:
                note = FileNote(shown(paths[0]), f"kept as it was: {error.got}")
                return made if made.problems else replace(made, problems=(note,))
            return WatchBatch.sum(
                [replace(made, files=0, chunks=0, problems=()), *(self._bring([path]) for path in paths)]
            )
        return WatchBatch.of(last, reading)

    def _finished(self, made: WatchBatch, begun: float) -> WatchBatch:
        with self._index.faiss.catalog.reading() as connection:
            (total,) = connection.execute("SELECT count(*) FROM nodes").fetchone()
        return replace(made, chunks_total=total, seconds=time.perf_counter() - begun)

    def _left_out(self, listing: Listing) -> list[str]:
        """Ids of documents whose files are there, and are no part of the corpus any more."""
        found = {file.file for file in listing.files}
        known = Origins(KeyValues(self._index.faiss.catalog), self._folders.named).not_met(())
        return [id_ for id_, file in known.items() if file not in found and self._folders.leaves_out(file)]


def _is_being_written(paths: Iterable[str], quiet_s: float) -> bool:
    """Whether one was emptied just now, as programs do before they write; else its documents would be deleted first."""
    for path in paths:
        try:
            found = os.stat(path)  # noqa: PTH116
        except OSError:
            continue
        if not found.st_size and time.time() - found.st_mtime < quiet_s:
            return True
    return False


def _first_edit(changes: Mapping[str, float]) -> float:
    """When the first of some changes was made: the file's own time where it is new, else when it was heard of."""
    first = min(changes.values())
    for path, heard in changes.items():
        try:
            edited = os.stat(path).st_mtime  # noqa: PTH116
        except OSError:
            continue
        if heard - _FRESH_S < edited:
            first = min(first, edited)
    return first
