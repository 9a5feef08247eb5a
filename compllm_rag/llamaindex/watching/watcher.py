"""Keeps an index as the files of some folders are: at first all of them, then only what changes."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from compllm_rag.catalog.kv import KeyValues
from compllm_rag.catalog.origins import Origins
from compllm_rag.errors import (
    BudgetError,
    CompLLMError,
    ConfigurationError,
    CorruptRecordError,
    PruneRefusedError,
    StorageMismatchError,
    StoreFullError,
    StoreLockedError,
    StoreReadOnlyError,
    StoreUnavailableError,
    UnreadableFileError,
    UnsupportedFormatError,
)
from compllm_rag.llamaindex.corpus import Corpus, IngestReport, Progress
from compllm_rag.llamaindex.documents import FileDocuments
from compllm_rag.llamaindex.ingest import ingest_documents
from compllm_rag.llamaindex.pruning import prunable
from compllm_rag.llamaindex.readers.found import FileNote, SkippedFile, shown
from compllm_rag.llamaindex.readers.walk import Listing, as_paths
from compllm_rag.llamaindex.watching.batch import WatchBatch
from compllm_rag.llamaindex.watching.edits import first_edit, is_being_written
from compllm_rag.llamaindex.watching.folders import WatchedFolders
from compllm_rag.llamaindex.watching.ignoring import FILE
from compllm_rag.llamaindex.watching.listener import Listener
from compllm_rag.store.lock import WriterLock

logger = logging.getLogger(__name__)

LOCK = "watch.lock"
_LOOK_S = 0.5  # how often the loop looks whether it should end
_RETRY_S = 1.0  # another process writes: it will be done some time
# What no file is to blame for: it passes, so the step waits for it ...
_PASSES = (StoreLockedError, StoreFullError, StoreUnavailableError)
# ... or the storage itself can take none of them, so the watch ends.
_LASTS = (StorageMismatchError, StoreReadOnlyError, CorruptRecordError, UnsupportedFormatError, BudgetError)
_MANY = 1000  # changes from which on everything is looked at, as when a branch is checked out
_MOST_NAMED = 3  # files that an error names


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
        self._again = dict[str, FileNote]()  # files that could not be brought in, and why
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

        What fails with one file is among the `problems`, and the others are brought in.

        Args:
            progress: Called with a running report.
            strict: Raise where a file could not be brought in, or documents cannot be deleted, since not everything
                could be looked at; the rest is done first.

        Raises:
            UnreadableFileError, PruneRefusedError: See `strict`.
            StoreLockedError: Another process writes.
            StoreFullError, StoreUnavailableError: No space, or the shared concept store is away.
        """
        begun, listing = time.perf_counter(), self._folders.all_files()
        self._again.clear()
        try:
            made, refused = self._all(listing, progress)
        except (*_PASSES, *_LASTS):
            raise
        except Exception:  # whose fault it is will be found
            logger.debug("not all files could be brought in together", exc_info=True)
            made, refused = self._piecewise(listing)
        if strict and self._again:
            raise UnreadableFileError(
                f"{len(self._again)} files could not be brought in; the others were",
                got="; ".join(f"{one.path}: {one.what}" for one in list(self._again.values())[:_MOST_NAMED]),
                next_step="see what is wrong with them, and run the same again",
            )
        if strict and refused is not None:
            raise refused
        if refused is not None:
            note = FileNote(str(refused.got), "nothing was deleted: not everything could be looked at")
            made = replace(made, problems=(note, *made.problems))
        return self._finished(replace(made, full=True), begun)

    def _all(self, listing: Listing, progress: Progress | None) -> tuple[WatchBatch, PruneRefusedError | None]:
        """Bring all files in, and delete what is gone or left out; one commit. Tells why nothing was deleted."""
        last, refused = IngestReport(), None

        def told(report: IngestReport) -> None:
            nonlocal last
            last = report
            if progress:
                progress(report)

        named = self._folders.named
        reading = FileDocuments(named, on_skip=lambda skipped: None, listing=listing)
        reading.logs = False
        with self._index.bulk():
            try:
                last = ingest_documents(
                    self._index, reading, progress=told, within=named, prune=True, may_be_empty=True
                )
            except PruneRefusedError as error:
                refused = error
            left_out = self._delete(self._left_out(listing))
        made = WatchBatch.of(last, reading)
        return replace(made, documents_deleted=last.documents_deleted + left_out), refused

    def _piecewise(self, listing: Listing) -> tuple[WatchBatch, PruneRefusedError | None]:
        """The same in several commits, without the files that fail; those keep the documents that they had."""
        files, skipped, refused = {found.file: found for found in listing.files}, list[SkippedFile](), None

        def look(paths: Collection[str]) -> Listing:
            return Listing(files=[files[path] for path in paths])

        made = self._brought(list(files), lambda paths: self._bring(paths, look, skipped.append))
        reading = FileDocuments(self._folders.named, on_skip=lambda skipped: None, listing=listing)
        reading.skipped += [*listing.skipped, *skipped]  # one doubt, and nothing is deleted
        origins = Origins(KeyValues(self._index.faiss.catalog), self._folders.named)
        with self._index.bulk():
            met = {id_: file for id_, file in origins.not_met(()).items() if file in files}
            try:
                gone = prunable(origins, met, reading, origins.roots)
            except PruneRefusedError as error:
                gone, refused = [], error
            deleted = self._delete([*gone, *self._left_out(listing)])
        missed = [FileNote(one.path, one.reason) for one in listing.skipped if one.problem]
        problems = (*made.problems, *missed)
        return replace(made, documents_deleted=made.documents_deleted + deleted, problems=problems), refused

    def _delete(self, doc_ids: Sequence[str]) -> int:
        for doc_id in doc_ids:
            self._index.delete_ref_doc(doc_id)
        return len(doc_ids)

    def step(self, changes: Mapping[str, float]) -> WatchBatch:
        """Bring in what changed: one commit, or where something in it fails, several, without the files that fail.

        Args:
            changes: Paths, absolute, links of the folders followed, with the time at which each was heard of.

        Raises:
            StoreLockedError: Another process writes; nothing was brought in.
            StoreFullError: No space; nothing was brought in.
            StoreUnavailableError: The shared concept store is away; nothing was brought in.
        """
        begun, first = time.perf_counter(), first_edit(changes)
        if len(changes) > _MANY or any(os.path.basename(path) == FILE for path in changes):  # noqa: PTH119
            made = self.sync()
        else:
            if is_being_written(changes, self._quiet_s):
                time.sleep(self._quiet_s)
            made = self._brought(sorted({*changes, *self._again} - self._folders.roots.keys()), self._bring)
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
            on_wait: Called when a step has to wait, since another process writes, the disk is full, or the shared
                concept store is away.

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
            except _PASSES as error:
                if on_wait and not told:
                    on_wait(error)
                told = True
                stop.wait(_RETRY_S)
        return None

    def _brought(self, paths: Sequence[str], bring: Callable[[Sequence[str]], WatchBatch]) -> WatchBatch:
        """Bring some files in, and where something fails, their halves: down to the file that does."""
        if not paths:
            return WatchBatch()
        try:
            made = bring(paths)
        except (*_PASSES, *_LASTS):
            raise
        except Exception as error:  # one bad file must not keep the others out, nor end the watch
            if len(paths) > 1:
                return WatchBatch.sum([self._brought(half, bring) for half in _halves(paths)])
            logger.debug("a change could not be brought in", exc_info=True)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self._again[paths[0]] = FileNote(shown(paths[0]), reason)
            return WatchBatch(problems=(self._again[paths[0]],))
        for path in paths:
            self._again.pop(path, None)
        return made

    def _bring(
        self,
        paths: Sequence[str],
        look: Callable[[Collection[str]], Listing] | None = None,
        on_skip: Callable[[SkippedFile], None] = lambda skipped: None,
    ) -> WatchBatch:
        """Read some files, and delete what was read from them before and is not there any more; one commit."""
        look = look or self._folders.files_of
        reading = FileDocuments((), on_skip=on_skip, listing=look(paths))
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
                [
                    replace(made, files=0, chunks=0, problems=()),
                    *(self._bring(half, look, on_skip) for half in _halves(paths)),
                ]
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


def _halves(paths: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    middle = len(paths) // 2
    return paths[:middle], paths[middle:]
