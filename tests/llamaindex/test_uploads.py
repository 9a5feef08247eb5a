"""Uploads: searchable at once, compressed in the background, nothing lost. Real threads, and a real killed process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from llama_index.core import Document
from llama_index.core.schema import TextNode

import toy
from compllm_rag import Compressor, ConceptIndex
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.errors import (
    ConfigurationError,
    InvalidConceptsError,
    StoreReadOnlyError,
    UploadQueueFullError,
)
from compllm_rag.llamaindex.uploads import UploadQueue
from tests.faults.fault_samples import check_whole, create, documents, load, said, sound, talking, tell
from tests.processes import errors

WORDS = ("otter", "heron", "badger", "magpie", "lynx", "weasel", "bittern", "marten")


TEXTS = {word: f"The {word} sleeps under stair {i}. Nobody saw {i} come." for i, word in enumerate(WORDS)}


def upload_documents(n: int = 4) -> list[Document]:
    return [Document(id_=f"u{i}", text=TEXTS[word]) for i, word in enumerate(WORDS[:n])]


class Gate:
    """A compressor that waits, in whatever thread it is used, until it may go on."""

    def __init__(self, compressor: Compressor | DeepCompressor | None = None) -> None:
        self.compressor = compressor or Compressor(toy.llm())
        self.opened, self.reached = threading.Event(), threading.Event()
        self.opened.set()
        self._compress = self.compressor.compress
        self.compressor.compress = self.compress  # type: ignore[method-assign]

    def compress(self, segments, n_concepts):  # noqa: ANN201
        self.reached.set()
        if not self.opened.wait(60):
            raise TimeoutError("the test never opened the gate")
        return self._compress(segments, n_concepts)

    @contextmanager
    def closed(self) -> Iterator[None]:
        self.opened.clear()
        self.reached.clear()
        try:
            yield
        finally:
            self.opened.set()


@pytest.fixture
def gate() -> Gate:
    return Gate()


def ask(index: ConceptIndex, word: str, **options) -> tuple[str, str]:
    """Which document is found first, and what it was read as."""
    response = index.as_query_engine(similarity_top_k=1, **options).query(TEXTS[word])
    (node,) = response.source_nodes
    return node.node.ref_doc_id, response.metadata["compllm"]["nodes"][node.node.node_id]["used"]


@pytest.mark.parametrize("missing", ["recompress", "error"])
def test_text_at_once_and_concepts_next_time(tmp_path: Path, gate: Gate, missing: str) -> None:
    with create(tmp_path / "s", gate.compressor) as index:
        index.ingest(documents())
        with gate.closed():
            receipt = index.upload(upload_documents())
            assert (receipt.documents, receipt.documents_changed, receipt.chunks_queued) == (4, 4, 4)
            assert ask(index, "heron", missing=missing) == ("u1", "text")
            assert index.uploads.status().documents == len(index.pending) == 4
            assert not index.uploads.wait(0)
            with load(tmp_path / "s", gate.compressor, read_only=True) as reader:
                assert ask(reader, "badger", missing=missing) == ("u2", "text")
            check = sound(tmp_path / "s")
            assert check.segments_awaiting > 0
        assert index.uploads.wait(60)
        assert ask(index, "heron", missing="error") == ("u1", "concepts")
        assert len(index.pending) == 0
        assert index.uploads.status().chunks_done == 4
        check_whole(index)
        again = index.upload(upload_documents())
        assert (again.documents, again.documents_changed, again.chunks_queued) == (4, 0, 0)
    assert sound(tmp_path / "s").segments_awaiting == 0


def test_what_shares_all_its_segments_is_not_queued(gate: Gate) -> None:
    index = create(None, gate.compressor)
    index.ingest([Document(id_="a", text=upload_documents(1)[0].text)])
    with gate.closed():
        assert index.upload(upload_documents(1)).chunks_queued == 0
        assert ask(index, "otter")[1] == "concepts"
    index.close()


def test_a_full_queue_says_so(gate: Gate) -> None:
    index = create(None, gate.compressor)
    queue = UploadQueue(index, workers=2, max_documents=3)
    assert index.uploads is queue
    with gate.closed():
        index.upload(upload_documents(2))
        with pytest.raises(UploadQueueFullError, match="2 documents while 2 wait.*at most 3.*Next step: upload again"):
            index.upload(upload_documents(4))
        assert index.stats()["documents"] == 2
        index.upload(upload_documents(3))
        assert index.stats()["documents"] == 3
    assert queue.wait(60)
    index.upload(upload_documents(4))
    queue.close(drain=True)
    check_whole(index)
    assert len(index.pending) == 0
    with pytest.raises(ConfigurationError, match="closed"):
        index.upload(upload_documents(5))
    index.close()


@pytest.mark.parametrize("drain", [True, False])
def test_close_drains_or_stops(tmp_path: Path, gate: Gate, drain: bool) -> None:
    index = create(tmp_path / "s", gate.compressor)
    with gate.closed():
        index.upload(upload_documents(2))
        assert gate.reached.wait(60)
        index.upload(upload_documents(8))
        closing = threading.Thread(target=index.close, kwargs={"drain": drain}, daemon=True)
        closing.start()
    closing.join(60)
    assert not closing.is_alive()
    sound(tmp_path / "s")
    with load(tmp_path / "s", gate.compressor, resume=False) as index:
        assert len(index.pending) == (0 if drain else 6)
        assert index.stats()["documents"] == 8
    with load(tmp_path / "s", gate.compressor) as index:
        assert index.uploads.wait(60)
        check_whole(index)
        assert {ask(index, word) for word in WORDS} == {(f"u{i}", "concepts") for i in range(8)}


_UPLOADER = """
import threading
compressor, seen = Compressor(toy.llm()), []
compress = compressor.compress
def slow(segments, ks):
    seen.append(len(segments))
    if len(seen) > 1:
        print("compressing", flush=True)
        threading.Event().wait()
    return compress(segments, ks)
compressor.compress = slow
from compllm_rag.llamaindex import uploads
uploads._BATCH_CHUNKS = 2
index = create(Path(sys.argv[1]), compressor)
index.upload(documents(6))
print("uploaded", len(index.pending), flush=True)
sys.stdin.readline()
"""


def test_a_killed_process_loses_nothing(tmp_path: Path, compressor: Compressor) -> None:
    with talking(_UPLOADER, tmp_path / "s") as process:
        lines = {said(process).split()[0] for _ in range(2)}
        assert lines == {"compressing", "uploaded"}
        process.kill()
        assert process.wait(60) == -9
    check = sound(tmp_path / "s")
    assert check.documents == 6
    assert check.segments_awaiting > 0
    with load(tmp_path / "s", compressor, resume=False) as index:
        left = len(index.pending)
        assert 0 < left < index.faiss.n_nodes
    with load(tmp_path / "s", compressor) as index:
        assert index.uploads.wait(60)
        assert index.uploads.status().chunks_done == left
        check_whole(index)
    assert sound(tmp_path / "s").segments_awaiting == 0


def test_an_exit_without_close_loses_nothing(tmp_path: Path, compressor: Compressor) -> None:
    script = "index = create(Path(sys.argv[1])); index.upload(documents(6)); print('bye', flush=True)"
    with talking(script, tmp_path / "s") as process:
        assert said(process) == "bye"
        assert process.wait(60) == 0
    sound(tmp_path / "s")
    with load(tmp_path / "s", compressor) as index:
        assert index.uploads.wait(60)
        check_whole(index)


def test_a_worker_that_hangs_does_not_keep_its_process_from_ending(tmp_path: Path, compressor: Compressor) -> None:
    script = _UPLOADER.replace("sys.stdin.readline()", "uploads._EXIT_S = 0.2; sys.stdin.readline()")
    with talking(script, tmp_path / "s") as process:
        assert {said(process).split()[0] for _ in range(2)} == {"compressing", "uploaded"}
        tell(process)
        assert process.wait(60) == 0
        assert "still being compressed" in errors(process)
    assert sound(tmp_path / "s").segments_awaiting > 0
    with load(tmp_path / "s", compressor) as index:
        assert index.uploads.wait(60)
        check_whole(index)


_HOLDER = """
from compllm_rag.catalog.catalog import Catalog
catalog = Catalog.open(sys.argv[1])
for line in sys.stdin:
    catalog.claim() if line.strip() == "claim" else catalog.rollback()
    print("done", flush=True)
"""


def test_workers_wait_for_other_writers(tmp_path: Path, gate: Gate) -> None:
    with create(tmp_path / "s", gate.compressor) as index, talking(_HOLDER, tmp_path / "s") as process:
        with gate.closed():
            index.upload(upload_documents())
            tell(process, "claim")
            said(process)
        assert index.uploads.wait(60)
        assert ask(index, "otter", missing="error") == ("u0", "concepts")
        assert len(index.pending) == 4  # the catalog could not be told
        tell(process, "rollback")
        said(process)
        assert index.uploads.wait(60)
        assert len(index.pending) == 0
        check_whole(index)


def test_changes_while_the_queue_works(gate: Gate) -> None:
    index = create(None, gate.compressor)
    with gate.closed():
        index.upload(upload_documents())
        assert gate.reached.wait(60)
        index.delete_ref_doc("u0")
        index.upload([Document(id_="u1", text="The heron sleeps on the roof now.")])
        with index.bulk():
            index.insert_nodes([TextNode(id_="own", text="A heron of somebody's own.")], later=True)
        index.upload(upload_documents()[:1])
    assert index.uploads.wait(60)
    assert list(index.pending.nodes()) == ["own"]
    assert not {"u0", "u1"} - {node.ref_doc_id for node in index.faiss.iter_nodes()}
    own = index.as_query_engine(similarity_top_k=1).query("A heron of somebody's own.")
    assert own.metadata["compllm"]["nodes"]["own"]["used"] == "text"
    index.library.ensure(["A heron of somebody's own."])
    check_whole(index)
    index.close()


def test_what_cannot_be_compressed_is_text_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    compress = gate._compress

    def fails(segments, ks):  # noqa: ANN202
        if any("magpie" in gate.compressor.llm.tokenizer.decode(list(s)) for s in segments):
            raise InvalidConceptsError("not today")
        return compress(segments, ks)

    gate._compress = fails
    index = create(tmp_path / "s", gate.compressor)
    index.upload(upload_documents())
    assert not index.uploads.wait(60)
    status = index.uploads.status()
    assert (status.documents, status.chunks_done, len(status.failed)) == (0, 3, 1)
    assert "could not be made" in caplog.text
    assert ask(index, "magpie", missing="error") == ("u3", "text")
    assert ask(index, "otter", missing="error") == ("u0", "concepts")
    index.close()
    sound(tmp_path / "s")
    with load(tmp_path / "s", Gate().compressor) as index:
        assert index.uploads.wait(60)
        assert ask(index, "magpie", missing="error") == ("u3", "concepts")


async def test_uploads_from_many_threads_and_tasks(tmp_path: Path, compressor: Compressor) -> None:
    with create(tmp_path / "s", compressor) as index:
        UploadQueue(index, workers=3)
        docs = upload_documents(8)
        await asyncio.gather(
            *(asyncio.to_thread(index.upload, [doc]) for doc in docs),
            *(index.ainsert(doc) for doc in documents(3)),
        )
        with index.bulk():
            await index.ainsert(Document(id_="inside", text="Inserted by a thread, within our own turn."))
        assert await asyncio.to_thread(index.uploads.wait, 60)
        assert index.stats()["documents"] == 12
        check_whole(index)
    sound(tmp_path / "s")


def test_what_it_refuses(tmp_path: Path, compressor: Compressor) -> None:
    index = create(tmp_path / "s", compressor)
    for wrong in ({"workers": 0}, {"max_documents": 0}):
        with pytest.raises(ConfigurationError, match="makes no sense"):
            UploadQueue(index, **wrong)
    UploadQueue(index)
    with pytest.raises(ConfigurationError, match="already"):
        UploadQueue(index)
    index.close()
    with load(tmp_path / "s", compressor, read_only=True) as reader, pytest.raises(StoreReadOnlyError):
        reader.upload(upload_documents())
