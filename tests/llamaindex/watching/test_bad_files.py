"""Where all files are looked at, what fails with one keeps no other out; what is no file's fault is waited for."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from llama_index.core.node_parser import SentenceSplitter

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.errors import InvalidConceptsError, StorageMismatchError, UnreadableFileError
from compllm_rag.llamaindex import documents
from compllm_rag.llamaindex.watching import watcher as module
from compllm_rag.llamaindex.watching.batch import WatchBatch
from compllm_rag.llamaindex.watching.watcher import Watcher
from tests.faults.fault_samples import check_whole, create, load, sound, texts
from tests.redis_servers import RedisProcess
from toy_embedder import HashEmbedder


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for number in range(6):
        (folder / f"room{number}.md").write_text(f"In room {number} the otter sleeps.")
    (folder / "well.md").write_text("The water of the well is clean.")
    return folder


def spoil(docs: Path) -> None:
    """One file becomes one that cannot be compressed, and all else that may happen to files happens as well."""
    (docs / "well.md").write_text("The poison is in the well.")
    (docs / "room0.md").write_text("In room 0 the heron sleeps.")
    (docs / "room1.md").unlink()
    (docs / "new.md").write_text("There is a new room.")
    (docs / "worse.md").write_text("More poison.")
    (docs / "room2.md").rename(docs / "room9.md")


AFTER = {
    "room0.md": "In room 0 the heron sleeps.",
    "new.md": "There is a new room.",
    "well.md": "The water of the well is clean.",  # as it was
    "room9.md": "In room 2 the otter sleeps.",
    **{f"room{number}.md": f"In room {number} the otter sleeps." for number in (3, 4, 5)},
}


@pytest.fixture
def poisoned(compressor: Compressor, monkeypatch: pytest.MonkeyPatch) -> Compressor:
    """A compressor that cannot compress one word."""
    compress = compressor.compress

    def fails(segments, ks):  # noqa: ANN202
        if any("poison" in compressor.llm.tokenizer.decode(list(segment)) for segment in segments):
            raise InvalidConceptsError("not today")
        return compress(segments, ks)

    monkeypatch.setattr(compressor, "compress", fails)
    return compressor


def at_start(watcher: Watcher, docs: Path) -> WatchBatch:
    told, stop = list[WatchBatch](), threading.Event()
    watcher.run(stop, lambda batch: (told.append(batch), stop.set()))
    return told[0]


def rules_changed(watcher: Watcher, docs: Path) -> WatchBatch:
    return watcher.step({str((docs / ".gitignore").resolve()): time.time()})


def many_changes(watcher: Watcher, docs: Path) -> WatchBatch:
    return watcher.step({str(path.resolve()): time.time() for path in docs.iterdir()})


@pytest.mark.parametrize("looked", [at_start, rules_changed, many_changes])
def test_where_all_files_are_looked_at(
    tmp_path: Path,
    docs: Path,
    poisoned: Compressor,
    looked: Callable[[Watcher, Path], WatchBatch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MANY", 3)
    with create(tmp_path / "s", poisoned) as index, Watcher(index, docs) as watcher:
        watcher.sync()
        spoil(docs)
        made = looked(watcher, docs)
        assert texts(index) == AFTER
        assert (made.full, made.documents_changed, made.documents_deleted, made.chunks_total) == (True, 3, 2, 7)
        assert {Path(note.path).name: note.what for note in made.problems} == dict.fromkeys(
            ("well.md", "worse.md"), "not today"
        )
        check_whole(index)
        monkeypatch.undo()  # they are tried again with what changes next
        (docs / "room3.md").unlink()
        watcher.step({str((docs / "room3.md").resolve()): time.time()})
        changed = {"well.md": "The poison is in the well.", "worse.md": "More poison."}
        assert texts(index) == {id_: text for id_, text in (AFTER | changed).items() if id_ != "room3.md"}
        assert watcher.sync(strict=True).empty
    sound(tmp_path / "s")


def test_once_says_which_failed_when_the_others_are_in(tmp_path: Path, docs: Path, poisoned: Compressor) -> None:
    with create(tmp_path / "s", poisoned) as index, Watcher(index, docs) as watcher:
        watcher.sync(strict=True)
        spoil(docs)
        with pytest.raises(UnreadableFileError, match="2 files could not be brought in.*well.md: not today"):
            watcher.sync(strict=True)
        assert texts(index) == AFTER
        for name in ("well.md", "worse.md"):
            (docs / name).unlink()
        assert watcher.sync(strict=True).documents_deleted == 1
        check_whole(index)


def test_a_reader_that_fails_in_a_way_of_its_own(
    tmp_path: Path, docs: Path, compressor: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader_of = documents.reader_of

    def fails(source: object) -> None:
        raise KeyError("/Root")

    monkeypatch.setattr(documents, "reader_of", lambda path: fails if path.name == "well.md" else reader_of(path))
    with create(tmp_path / "s", compressor) as index, Watcher(index, docs) as watcher:
        made = watcher.sync()
        assert len(texts(index)) == 6
        assert [Path(note.path).name for note in made.problems] == ["well.md"]


def test_where_one_file_fails_a_folder_that_is_empty_now_keeps_its_documents(
    tmp_path: Path, docs: Path, poisoned: Compressor
) -> None:
    (docs / "disk").mkdir()
    (docs / "disk" / "far.md").write_text("Far away.")
    with create(tmp_path / "s", poisoned) as index, Watcher(index, docs) as watcher:
        watcher.sync()
        spoil(docs)
        (docs / "disk" / "far.md").unlink()  # as if its disk were not mounted
        made = watcher.sync()
        kept = {f"room{number}.md": f"In room {number} the otter sleeps." for number in (1, 2)}
        assert texts(index) == AFTER | kept | {"disk/far.md": "Far away."}
        assert "nothing was deleted" in made.problems[0].what


def test_what_no_file_is_to_blame_for_ends_the_watch(tmp_path: Path, docs: Path, compressor: Compressor) -> None:
    splitter = SentenceSplitter(chunk_size=100, chunk_overlap=0)
    with (
        ConceptIndex.create(
            tmp_path / "s", compressor=compressor, embedder=HashEmbedder(), transformations=[splitter]
        ) as index,
        Watcher(index, docs) as watcher,
    ):
        watcher.sync()
    with load(tmp_path / "s", compressor) as index, Watcher(index, docs) as watcher:
        (docs / "room0.md").write_text("Changed.")
        path = os.path.realpath(docs / "room0.md")
        for look in (watcher.sync, lambda: watcher.step({path: time.time()})):
            with pytest.raises(StorageMismatchError):
                look()


def test_a_shared_store_that_is_away_is_waited_for(
    tmp_path: Path, docs: Path, compressor: Compressor, redis_server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 0.1)
    told, waits, stop = list[WatchBatch](), list[str](), threading.Event()

    def waited(error: Exception) -> None:
        waits.append(str(error))
        redis_server.start()

    def came(batch: WatchBatch) -> None:
        told.append(batch)
        if len(told) == 2:
            stop.set()
            return
        redis_server.kill()
        (docs / "new.md").write_text("There is a new room.")

    with create(tmp_path / "s", compressor, concept_store=redis_server.url) as index:
        index.store.server._retry_s = 0.1
        redis_server.kill()
        with Watcher(index, docs, quiet_s=0.05) as watcher:
            ending = threading.Timer(60.0, stop.set)
            ending.start()
            watcher.run(stop, came, on_wait=waited)
            ending.cancel()
        assert [(batch.full, batch.documents_changed, batch.problems) for batch in told] == [
            (True, 7, ()),
            (False, 1, ()),
        ]
        assert len(waits) == 2 and all("Redis" in text for text in waits)
        check_whole(index)
