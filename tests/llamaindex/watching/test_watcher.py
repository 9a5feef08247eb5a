"""A watched folder and its index say the same, whatever is done to the files; real files, real events."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from llama_index.core import Document

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.catalog.catalog import Catalog
from compllm_rag.errors import (
    ConfigurationError,
    CorpusPathError,
    InvalidConceptsError,
    PruneRefusedError,
    StoreLockedError,
    UnreadableFileError,
)
from compllm_rag.llamaindex.watching.batch import WatchBatch
from compllm_rag.llamaindex.watching.watcher import Watcher
from tests.faults.fault_samples import check_whole, create, sound, texts
from tests.processes import join

LIMIT_S = 120.0
ANIMALS = ("otter", "heron", "badger", "magpie", "lynx", "weasel", "bittern", "marten", "stoat", "plover")


def page(n: int = 40, **changed: str) -> str:
    """A text of many chunks; `s3="..."` puts another sentence in the place of the third."""
    sentences = [f"Room {i} is where the {ANIMALS[i % 10]} number {i * i + 7} sleeps in winter." for i in range(n)]
    for name, sentence in changed.items():
        sentences[int(name[1:])] = sentence
    return " ".join(sentences)


def says(index: ConceptIndex, doc_id: str, text: str) -> bool:
    """Whether the chunks of a document, put into the text's order, are that text."""
    parts = [node.text for node in index.faiss.iter_nodes() if node.ref_doc_id == doc_id]
    return "".join(sorted(parts, key=text.find)) == text


class Watching:
    """A watcher in a thread, and what it told."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher, self.batches, self.waits = watcher, list[WatchBatch](), list[str]()
        self.stop, self.error = threading.Event(), None
        self._news = threading.Condition()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.watcher.run(self.stop, self._told, on_wait=lambda error: self.waits.append(str(error)))
        except Exception as error:
            self.error = error
        with self._news:
            self._news.notify_all()

    def _told(self, batch: WatchBatch) -> None:
        with self._news:
            self.batches.append(batch)
            self._news.notify_all()

    def until(self, done: Callable[[], object]) -> None:
        with self._news:
            assert self._news.wait_for(lambda: done() or self.error, LIMIT_S), self.batches
        assert self.error is None or done(), self.error

    def after(self, change: Callable[[], object], done: Callable[[], object]) -> list[WatchBatch]:
        """The batches that a change brings until the index is as it should be."""
        before = len(self.batches)
        change()
        self.until(lambda: len(self.batches) > before and done())
        return self.batches[before:]


@contextmanager
def watching(index: ConceptIndex, folder: Path, **options: object) -> Iterator[Watching]:
    with Watcher(index, folder, quiet_s=0.05, **options) as watcher:
        made = Watching(watcher)
        made.thread.start()
        try:
            made.until(lambda: made.batches)
            yield made
        finally:
            made.stop.set()
            join([made.thread], LIMIT_S)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / "page.md").write_text(page())
    (folder / "sub" / "ferry.md").write_text("The ferry leaves at seven.")
    return folder


def test_only_what_changed_is_encoded(tmp_path: Path, docs: Path, compressor: Compressor) -> None:
    with create(tmp_path / "s", compressor) as index, watching(index, docs) as watch:
        (first,) = watch.batches
        assert (first.full, first.files, first.documents_changed, first.edit_s) == (True, 2, 2, None)
        assert first.chunks_added == first.chunks == first.chunks_total > 8

        encoded = index.metrics.work.segments
        change = page(s20="Room 20 is empty since the flood.")
        (edit,) = watch.after(
            lambda: (docs / "page.md").write_text(change), lambda: "since the flood" in texts(index)["page.md"]
        )
        assert says(index, "page.md", change)
        assert (edit.full, edit.files, edit.documents_changed, edit.documents_deleted) == (False, 1, 1, 0)
        assert 1 <= edit.chunks_added <= 3 < edit.chunks
        assert edit.segments_compressed == index.metrics.work.segments - encoded <= 6
        assert 0 < edit.edit_s < LIMIT_S and edit.chunks_total == index.stats()["chunks"]

        (new,) = watch.after(lambda: (docs / "new.txt").write_text("A new owl."), lambda: "new.txt" in texts(index))
        assert (new.files, new.documents_changed, new.chunks_added) == (1, 1, 1)

        def rename() -> None:
            (docs / "page.md").rename(docs / "sub" / "moved.md")

        moved = watch.after(rename, lambda: "sub/moved.md" in texts(index) and "page.md" not in texts(index))
        assert sum(batch.segments_compressed for batch in moved) == 0  # concepts are known by their text
        assert sum(batch.documents_deleted for batch in moved) == 1

        watch.after(lambda: (docs / "new.txt").unlink(), lambda: "new.txt" not in texts(index))
        watch.after(lambda: shutil.move(docs / "sub", tmp_path / "away"), lambda: not texts(index))
        back = watch.after(lambda: shutil.move(tmp_path / "away", docs / "sub"), lambda: len(texts(index)) == 2)
        assert sum(batch.segments_compressed for batch in back) == 0
        assert says(index, "sub/moved.md", change)
        check_whole(index)
    sound(tmp_path / "s")


def test_many_fast_edits_of_one_file(tmp_path: Path, docs: Path, compressor: Compressor) -> None:
    edits = 60
    with create(tmp_path / "s", compressor) as index, watching(index, docs) as watch:
        path, before = docs / "page.md", len(watch.batches)
        told = [f"Room {n % 40} got its new door at the {n}th try." for n in range(edits)]
        now: dict[str, str] = {}
        for number, sentence in enumerate(told):
            now[f"s{number % 40}"] = sentence
            if number % 3:
                path.write_text(page(**now))
            else:  # as editors save
                (docs / "page.md.tmp").write_text(page(**now))
                os.replace(docs / "page.md.tmp", path)
            time.sleep(0.01)
        last = page(**now)
        watch.until(lambda: says(index, "page.md", last))
        made = watch.batches[before:]
        assert len(made) < edits
        assert all(batch.files == 1 and batch.documents_changed <= 1 for batch in made)  # nothing else was touched
        assert sum(batch.chunks_added for batch in made) <= sum(batch.chunks for batch in made)
        assert sorted(texts(index)) == ["page.md", "sub/ferry.md"]
        assert not any(batch.problems for batch in made)
        check_whole(index)
        # One more edit of one sentence costs a few chunks again, and nothing of the former states is left.
        now["s3"] = "Room 3 is the last."
        # Put in place at once: of a file that is written in place, a step may see the beginning alone.
        (docs / "page.md.tmp").write_text(page(**now))
        watch.after(lambda: os.replace(docs / "page.md.tmp", path), lambda: says(index, "page.md", page(**now)))
        assert watch.batches[-1].chunks_added <= 3
        check_whole(index)


def test_a_file_that_is_being_written_is_waited_for(tmp_path: Path, docs: Path, compressor: Compressor) -> None:
    with create(tmp_path / "s", compressor) as index, Watcher(index, docs, quiet_s=0.5) as watcher:
        watcher.sync()
        path = docs / "sub" / "ferry.md"
        with path.open("w") as file:  # emptied, as by every program that writes
            writing = threading.Timer(0.1, lambda: (file.write("The ferry leaves at ten."), file.flush()))
            writing.start()
            made = watcher.step({str(path.resolve()): time.time()})
            writing.join()
        assert (made.documents_changed, made.documents_deleted) == (1, 0)
        assert texts(index)["sub/ferry.md"] == "The ferry leaves at ten."
        path.write_text("")
        os.utime(path, (1e9, 1e9))
        assert watcher.step({str(path.resolve()): time.time()}).documents_deleted == 1  # empty since long ago


def test_what_is_ignored(tmp_path: Path, docs: Path, compressor: Compressor) -> None:
    (docs / ".gitignore").write_text("secret*\n")
    (docs / "secret.md").write_text("The vault opens at midnight.")
    for name in ("page.md~", ".#page.md", "skip.md"):
        (docs / name).write_text("no")
    with create(tmp_path / "s", compressor) as index, watching(index, docs, ignore=["skip.md"]) as watch:
        assert sorted(texts(index)) == ["page.md", "sub/ferry.md"]
        (docs / "secret2.md").write_text("no")
        (docs / "page.md~").write_text("still no")
        (docs / ".git").mkdir()
        (docs / ".git" / "COMMIT_EDITMSG.md").write_text("no")
        (docs / "node_modules" / "left-pad").mkdir(parents=True)
        (docs / "node_modules" / "left-pad" / "index.js").write_text("no")
        (docs / "node_modules" / "left-pad" / ".gitignore").write_text("*.log")
        (docs / "photo.png").write_bytes(b"\x89PNG")
        watch.after(lambda: (docs / "a.md").write_text("Yes."), lambda: "a.md" in texts(index))
        assert sorted(texts(index)) == ["a.md", "page.md", "sub/ferry.md"]
        assert [(batch.full, batch.files) for batch in watch.batches[1:]] == [(False, 1)]
        watch.after(lambda: (docs / ".gitignore").write_text("sub/\n"), lambda: "secret2.md" in texts(index))
        assert sorted(texts(index)) == ["a.md", "page.md", "secret.md", "secret2.md"]
        assert watch.batches[-1].full and watch.batches[-1].documents_deleted == 1
        check_whole(index)


def test_one_bad_file_keeps_nothing_else_out(
    tmp_path: Path, docs: Path, compressor: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (docs / "rows.jsonl").write_text('{"id": "r1", "text": "One row."}\n{"id": "r2", "text": "Another row."}\n')
    compress = compressor.compress

    def fails(segments, ks):  # noqa: ANN202
        if any("poison" in compressor.llm.tokenizer.decode(list(segment)) for segment in segments):
            raise InvalidConceptsError("not today")
        return compress(segments, ks)

    with create(tmp_path / "s", compressor) as index, watching(index, docs) as watch:
        monkeypatch.setattr(compressor, "compress", fails)

        def spoil() -> None:
            (docs / "rows.jsonl").write_text('{"id": "r1", "text": "One row, changed."}\n{"id": "r2", "te\n')
            (docs / "bad.md").write_text("The poison is in the well.")
            (docs / "good.md").write_text("The water is in the well.")

        watch.after(spoil, lambda: "good.md" in texts(index) and "changed" in texts(index)["r1"])
        watch.until(lambda: {note.path.split("/")[-1].split(":")[0] for b in watch.batches for note in b.problems}
                    == {"bad.md", "rows.jsonl"})  # fmt: skip
        assert texts(index)["r2"] == "Another row."  # what cannot be read stays as it was
        assert "bad.md" not in texts(index)
        assert any("not today" in note.what for batch in watch.batches for note in batch.problems)
        monkeypatch.undo()
        watch.after(lambda: (docs / "good.md").write_text("Better water."), lambda: "bad.md" in texts(index))
        watch.after(
            lambda: (docs / "rows.jsonl").write_text('{"id": "r1", "text": "One row again."}\n'),
            lambda: "r2" not in texts(index),
        )
        assert texts(index)["r1"] == "One row again."
        check_whole(index)


def test_others_write_in_turns_with_it(tmp_path: Path, docs: Path, compressor: Compressor) -> None:
    with create(tmp_path / "s", compressor) as index, watching(index, docs) as watch:
        with pytest.raises(StoreLockedError, match="another watcher"), Watcher(index, docs):
            pass
        with Catalog.open(tmp_path / "s") as other:
            other.claim()
            (docs / "a.md").write_text("Who waits?")
            deadline = time.monotonic() + LIMIT_S
            while not watch.waits and time.monotonic() < deadline:
                time.sleep(0.05)
            assert "a.md" not in texts(index)
            other.rollback()
        watch.until(lambda: "a.md" in texts(index))
        assert watch.waits and watch.batches[-1].edit_s > 0
        index.insert(Document(id_="own", text="By somebody else."))
        watch.after(lambda: (docs / "a.md").unlink(), lambda: "a.md" not in texts(index))
        assert "own" in texts(index)  # what came from no file is nobody's to delete
        shutil.rmtree(docs)
        watch.until(lambda: watch.error)
        assert isinstance(watch.error, UnreadableFileError)
        assert "its documents stay" in str(watch.error)
    # Of a folder that goes away file by file, some deletions may be seen before the folder is gone: never the others.
    sound(tmp_path / "s")


def test_once(tmp_path: Path, docs: Path, compressor: Compressor) -> None:
    with create(tmp_path / "s", compressor) as index:
        with Watcher(index, docs) as watcher:
            assert watcher.sync().documents_changed == 2
            (docs / "sub" / "ferry.md").unlink()
            (docs / "sub" / "other.md").write_text("Another.")
            again = watcher.sync(strict=True)
            assert (again.documents_changed, again.documents_deleted, again.chunks_added) == (1, 1, 1)
            assert watcher.sync().empty
            shutil.rmtree(docs)
            docs.mkdir()  # as if its disk were not mounted
            with pytest.raises(PruneRefusedError, match="not one document was found there"):
                watcher.sync(strict=True)
            assert "nothing was deleted" in watcher.sync().problems[0].what
        assert len(texts(index)) == 2
        for folder, error in ((docs / "no", CorpusPathError), (tmp_path / "s" / "concepts", ConfigurationError)):
            with pytest.raises(error):
                Watcher(index, folder)
        (docs / "a.md").write_text("A file.")
        with pytest.raises(ConfigurationError, match="only folders"):
            Watcher(index, docs / "a.md")
        with pytest.raises(ConfigurationError, match="quiet_s"):
            Watcher(index, docs, quiet_s=0)


def test_the_storage_may_lie_in_the_folder(docs: Path, compressor: Compressor) -> None:
    with create(docs / "s", compressor) as index, watching(index, docs) as watch:
        watch.after(lambda: (docs / "a.md").write_text("Who?"), lambda: "a.md" in texts(index))
        before = len(watch.batches)
        time.sleep(0.5)  # its own commits are no changes
        assert len(watch.batches) == before
        assert sorted(texts(index)) == ["a.md", "page.md", "sub/ferry.md"]
