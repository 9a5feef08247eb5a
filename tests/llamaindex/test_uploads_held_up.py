"""Uploads while the concept store is away or full: a real Redis that is killed or has no memory, a real full disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.errors import StoreFullError, StoreUnavailableError
from compllm_rag.llamaindex import uploads
from tests.faults.fault_samples import check_whole, create, load, said, sound, talking, tell
from tests.llamaindex.test_uploads import Gate, ask, upload_documents
from tests.processes import join
from tests.redis_servers import RedisProcess


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits tries again soon."""
    monkeypatch.setattr(uploads, "_RETRY_S", 0.05)
    monkeypatch.setattr(uploads, "_LONGEST_RETRY_S", 0.2)


def until(done: Callable[[], object], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def beside(server: RedisProcess, folder: Path, compressor: Compressor) -> ConceptIndex:
    index = create(folder, compressor, concept_store=server.url)
    index.store.server._retry_s = 0.1
    return index


def away(server: RedisProcess) -> None:
    server.kill()


def back(server: RedisProcess) -> None:
    server.start()


def full(server: RedisProcess) -> None:
    with server.client() as client:
        client.config_set("maxmemory", "1")


def roomy(server: RedisProcess) -> None:
    with server.client() as client:
        client.config_set("maxmemory", "0")


OUTAGES = [
    pytest.param(away, back, StoreUnavailableError, id="away"),
    pytest.param(full, roomy, StoreFullError, id="full"),
]


@pytest.mark.parametrize(("begins", "ends", "kind"), OUTAGES)
def test_chunks_wait_and_go_on_when_the_store_is_back(
    tmp_path: Path,
    gate: Gate,
    redis_server: RedisProcess,
    begins: Callable[[RedisProcess], None],
    ends: Callable[[RedisProcess], None],
    kind: type[Exception],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with beside(redis_server, tmp_path / "s", gate.compressor) as index:
        with gate.closed():
            index.upload(upload_documents(8))
            begins(redis_server)
        until(lambda: index.uploads.status().held_up)
        assert not index.uploads.wait(0.5)
        status = index.uploads.status()
        assert isinstance(status.held_up, kind)
        # Not one was given up, and each of them was tried often by now.
        assert (status.documents, status.chunks, status.chunks_done, status.failed) == (8, 8, 0, {})
        with pytest.raises(kind, match="Next step"):
            index.uploads.wait(60, patient=False)
        ends(redis_server)
        assert index.uploads.wait(60)
        status = index.uploads.status()
        assert (status.chunks, status.chunks_done, status.failed, status.held_up) == (0, 8, {}, None)
        assert ask(index, "marten", missing="error") == ("u7", "concepts")
        check_whole(index)
    assert caplog.text.count("uploads wait for the concept store") == 1
    assert caplog.text.count("takes concepts again") == 1
    assert sound(tmp_path / "s").segments_awaiting == 0


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.mark.parametrize("drain", [True, False])
def test_close_ends_the_wait_and_the_next_open_goes_on(
    tmp_path: Path, gate: Gate, redis_server: RedisProcess, drain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "_RETRY_S", 300.0)
    monkeypatch.setattr(uploads, "_LONGEST_RETRY_S", 300.0)
    index = beside(redis_server, tmp_path / "s", gate.compressor)
    with gate.closed():
        index.upload(upload_documents(8))
        redis_server.kill()
    until(lambda: index.uploads.status().held_up)
    closing = threading.Thread(target=index.close, kwargs={"drain": drain}, daemon=True)
    closing.start()
    join([closing])
    assert not index.uploads.wait(1)  # it does not say that they have their concepts
    redis_server.start()
    with load(tmp_path / "s", gate.compressor) as index:
        assert index.uploads.wait(60)
        assert index.uploads.status().chunks_done == 8
        check_whole(index)


def test_a_drained_queue_tries_once_more(
    tmp_path: Path, gate: Gate, redis_server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "_RETRY_S", 300.0)
    index = beside(redis_server, tmp_path / "s", gate.compressor)
    with gate.closed():
        index.upload(upload_documents())
        full(redis_server)
    until(lambda: index.uploads.status().held_up)
    roomy(redis_server)
    closing = threading.Thread(target=index.close, kwargs={"drain": True}, daemon=True)
    closing.start()
    join([closing])
    assert index.uploads.status().chunks_done == 4
    assert sound(tmp_path / "s").segments_awaiting == 0


_ON_A_FULL_DISK = """
import resource
from compllm_rag.llamaindex import uploads
from tests.llamaindex.test_uploads import Gate, upload_documents
uploads._RETRY_S = uploads._LONGEST_RETRY_S = 0.1
gate = Gate()
index = create(Path(sys.argv[1]), gate.compressor)
with gate.closed():
    index.upload(upload_documents(8))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
print("full", flush=True)
while not index.uploads.status().held_up:
    time.sleep(0.02)
time.sleep(0.5)
status = index.uploads.status()
print(type(status.held_up).__name__, status.chunks, status.chunks_done, len(status.failed), flush=True)
sys.stdin.readline()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(index.uploads.wait(60), index.uploads.status().chunks_done, len(index.pending), flush=True)
index.close()
"""


def test_a_full_disk_is_waited_for(tmp_path: Path, compressor: Compressor) -> None:
    with talking(_ON_A_FULL_DISK, tmp_path / "s") as process:
        assert said(process) == "full"
        assert said(process) == "StoreFullError 8 0 0"
        tell(process)
        assert said(process) == "True 8 0"
        assert process.wait(60) == 0
    assert sound(tmp_path / "s").segments_awaiting == 0
    with load(tmp_path / "s", compressor) as index:
        check_whole(index)
