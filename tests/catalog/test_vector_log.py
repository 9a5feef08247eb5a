"""Vectors in a file and a log: answers as of one index, whatever was folded when; torn tails, damage, full disks."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compllm_rag.catalog import generations, vector_log
from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.flat_vectors import FlatVectors
from compllm_rag.catalog.generations import GenerationFiles
from compllm_rag.errors import CorruptRecordError, StoreFullError
from compllm_rag.llamaindex.vector_store import FaissTextVectorStore
from tests import processes
from tests.catalog.catalog_samples import DIM, axis, filled, find, node, python
from tests.processes import join


def state(path: Path) -> tuple[int, int]:
    """Format version and generation."""
    connection = sqlite3.connect(path / "catalog.db")
    try:
        return connection.execute("SELECT format_version, generation FROM state").fetchone()
    finally:
        connection.close()


def files(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.name.startswith("vectors-"))


def logged(path: Path) -> Path:
    """A store with three nodes in its file, and three commits in its log; gives the log."""
    with filled(path) as store:
        store.add([node("a", axis(3)), node("b", axis(3, 0.1))])
        store.commit()
        store.delete("d1")
        store.commit()
        store.add([node("c", axis(0, 0.1))])
        store.delete_nodes(["a"])
        store.commit()
    return path / "vectors-1.log"


def check(path: Path, **options) -> None:
    with FaissTextVectorStore.open(path, **options) as store:
        assert find(store, axis(0), 9) == ["n0", "c", "b", "n2"]
        assert find(store, axis(3), 1) == ["b"]


def test_small_commits_go_into_a_log(tmp_path: Path) -> None:
    log = logged(tmp_path)
    assert files(tmp_path) == ["vectors-1.faiss", "vectors-1.log"]
    assert state(tmp_path) == (2, 4)  # a release that does not see the log refuses the storage by its version
    assert log.stat().st_mode & 0o777 == 0o600
    for read_only in (True, False):
        check(tmp_path, read_only=read_only)


def test_a_compaction_folds_the_log_and_removed_vectors_leave_the_disk(tmp_path: Path) -> None:
    logged(tmp_path)
    with Catalog.open(tmp_path) as catalog:
        catalog.reclaim()
    assert (files(tmp_path), state(tmp_path)) == (["vectors-5.faiss"], (1, 5))  # as earlier releases know it
    check(tmp_path)
    held = FlatVectors.from_bytes((tmp_path / "vectors-5.faiss").read_bytes(), DIM, "")
    assert len(held) == 4
    with Catalog.open(tmp_path) as catalog:
        catalog.reclaim()
    assert state(tmp_path) == (1, 5)  # nothing to do


def test_a_log_that_grows_too_long_is_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "LEAST_LOG", 400)
    monkeypatch.setattr(generations, "LOG_SHARE", 0.0)
    seen = set()
    with filled(tmp_path) as store, FaissTextVectorStore.open(tmp_path, read_only=True) as reader:
        for step in range(20):
            store.add([node(f"s{step}", axis(step, 0.01 * step))])
            store.commit()
            seen.add(tuple(files(tmp_path)))
            assert sorted(find(reader, axis(0), 99)) == sorted(find(store, axis(0), 99))
            assert len(find(reader, axis(0), 99)) == step + 4
    assert len({name for names in seen for name in names if name.endswith(".faiss")}) > 3
    assert max(map(len, seen)) <= 4  # the former file and its log stay for readers that are at it


def test_a_reader_reads_what_was_appended_and_not_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, load = [], GenerationFiles.load
    monkeypatch.setattr(GenerationFiles, "load", lambda self, of: loads.append(of.number) or load(self, of))
    with filled(tmp_path) as store, FaissTextVectorStore.open(tmp_path, read_only=True) as reader:
        for step in range(5):
            store.add([node(f"s{step}", axis(step))])
            store.commit()
            assert len(find(reader, axis(0), 99)) == step + 4
    assert loads == [0, 1]  # of the store that was made, and of the reader that opened it


def test_clearing_writes_a_file(tmp_path: Path) -> None:
    logged(tmp_path)
    with FaissTextVectorStore.open(tmp_path) as store:
        store.clear()
        store.add([node("only", axis(1))])
        store.commit()
    assert state(tmp_path) == (1, 5)
    with FaissTextVectorStore.open(tmp_path) as store:
        assert find(store, axis(0), 9) == ["only"]
        store.delete_nodes(["only"])
        store.commit()
    with FaissTextVectorStore.open(tmp_path) as store:
        assert find(store, axis(0), 9) == []


def test_what_a_killed_commit_left_behind_the_log_is_written_over(tmp_path: Path) -> None:
    log = logged(tmp_path)
    whole = log.read_bytes()
    for tail in (b"\0", whole[:50], whole, random.Random(1).randbytes(999)):
        log.write_bytes(whole + tail)
        check(tmp_path, read_only=True)
    with FaissTextVectorStore.open(tmp_path) as store:
        store.add([node("d", axis(0, 0.05))])
        store.commit()
    assert log.read_bytes().startswith(whole)
    with FaissTextVectorStore.open(tmp_path) as store:
        assert find(store, axis(0), 3) == ["n0", "d", "c"]


def test_sigkill_between_the_log_and_rows_leaves_the_former_state(tmp_path: Path) -> None:
    log = logged(tmp_path)
    size = log.stat().st_size
    done = processes.run(
        python(
            "append = GenerationFiles.append\n"
            "GenerationFiles.append = lambda *a: (append(*a), die())\n"
            "store = FaissTextVectorStore.open(sys.argv[1])\n"
            "store.add([node('half', axis(3))]); store.delete('d0'); store.commit()",
            tmp_path,
        )
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert log.stat().st_size > size
    for read_only in (True, False):
        check(tmp_path, read_only=read_only)


def swapped(data: bytes) -> bytes:
    """The first two records the other way round."""
    first, second = vector_log.nbytes(DIM, 0, 2), vector_log.nbytes(DIM, 1, 0)
    return data[first : first + second] + data[:first] + data[first + second :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped head": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "flipped dimensions": lambda data: data[:8] + bytes([data[8] ^ 1]) + data[9:],
    "flipped count": lambda data: data[:15] + b"\x40" + data[16:],
    "flipped id": lambda data: data[:21] + bytes([data[21] ^ 1]) + data[22:],
    "flipped vector": lambda data: data[:45] + bytes([data[45] ^ 1]) + data[46:],
    "flipped close": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "cut": lambda data: data[:-1],
    "a record less": lambda data: data[: len(data) // 2],
    "swapped": swapped,
    "empty": lambda data: b"",
    "random": lambda data: random.Random(3).randbytes(len(data)),
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_log_is_refused(tmp_path: Path, damage: str) -> None:
    log = logged(tmp_path)
    before = log.read_bytes()
    assert DAMAGE[damage](before) != before
    log.write_bytes(DAMAGE[damage](before))
    for read_only in (True, False):
        with pytest.raises(CorruptRecordError, match="vector log.*repair"):
            FaissTextVectorStore.open(tmp_path, read_only=read_only)
    log.write_bytes(before)
    check(tmp_path)


def test_a_log_that_is_gone_or_a_link_or_of_another_catalog_is_refused(tmp_path: Path) -> None:
    log, other = logged(tmp_path / "s"), logged(tmp_path / "other")
    assert log.stat().st_size == other.stat().st_size
    with filled(tmp_path / "third") as store:
        for step in range(3):
            store.add([node(f"t{step}", axis(step))])
            store.commit()
    log.unlink()
    with pytest.raises(CorruptRecordError, match="not there"):
        FaissTextVectorStore.open(tmp_path / "s", read_only=True)
    log.symlink_to(other)
    with pytest.raises(Exception, match="catalog"):
        FaissTextVectorStore.open(tmp_path / "s")
    log.unlink()
    log.write_bytes((tmp_path / "third" / "vectors-1.log").read_bytes() * 3)
    with pytest.raises(CorruptRecordError):
        FaissTextVectorStore.open(tmp_path / "s")


def test_a_full_disk_under_the_log_leaves_the_former_state_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logged(tmp_path)
    size, fsync = log.stat().st_size, os.fsync

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with FaissTextVectorStore.open(tmp_path) as store:
        store.add([node("d", axis(0, 0.05))])
        monkeypatch.setattr(generations.os, "fsync", full)
        with pytest.raises(StoreFullError):
            store.commit()
        assert (store.catalog.pending, log.stat().st_size) == (True, size)
        check(tmp_path, read_only=True)
        monkeypatch.setattr(generations.os, "fsync", fsync)
        store.commit()
    with FaissTextVectorStore.open(tmp_path) as store:
        assert find(store, axis(0), 3) == ["n0", "d", "c"]


def reference(held: dict[int, np.ndarray], vector: np.ndarray, k: int) -> list[tuple[int, float]]:
    """What one FAISS index of all vectors says: all scores, sorted."""
    if not held:
        return []
    index = faiss.IndexFlatIP(len(vector))
    index.add(np.stack(list(held.values())))
    (scores,), (places,) = index.search(vector[None], len(held))
    ids = list(held)
    return sorted(((ids[p], float(s)) for p, s in zip(places, scores, strict=True)), key=lambda hit: (-hit[1], hit[0]))[
        :k
    ]


@given(
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2**16), st.booleans()), max_size=25),
    share=st.sampled_from([0.0, 0.3, 9.0]),
)
@settings(max_examples=60, deadline=None)
def test_answers_are_those_of_one_index_to_the_last_bit(steps: list, share: float) -> None:
    """Equal vectors included: few directions, so that ties stand at the end of many answers."""
    dim, held, next_id = 5, {}, 1
    files_, now = GenerationFiles(None), FlatVectors(5)
    former = generations.VectorGeneration(0, dim)
    pool = np.random.default_rng(7).standard_normal((6, dim)).astype(np.float32)
    pool /= np.linalg.norm(pool, axis=1, keepdims=True)
    least, portion = generations.LEAST_LOG, generations.LOG_SHARE
    generations.LEAST_LOG, generations.LOG_SHARE = 0, share
    try:
        for n, seed, twice in steps:
            chance, changed = random.Random(seed), now.copy()
            for _ in range(1 + twice):
                gone = [i for i in held if chance.random() < 0.3]
                ids = list(range(next_id, next_id + n))
                next_id += n
                rows = pool[[chance.randrange(len(pool)) for _ in ids]].reshape(n, dim)
                changed.remove([*gone, 10**9])
                changed.add(ids, rows)
                held = {i: v for i, v in held.items() if i not in gone} | dict(zip(ids, rows, strict=True))
            before = now.search(pool[0], 4)
            made = files_.append(former, changed, now) or files_.save(former.number + 1, changed)
            assert now.search(pool[0], 4) == before  # who still searches the former ones is not disturbed
            followed = files_.follow(former, now, made)
            loaded = files_.load(made)
            for vectors in (changed, loaded, loaded.merged(), *([] if followed is None else [followed])):
                assert vectors.ids().tolist() == sorted(held)
                assert (len(vectors), vectors.last) == (len(held), max(held, default=0))
                for k in (1, 3, 99):
                    assert vectors.search(pool[1], k) == reference(held, pool[1], k)
                some = {i: v for i, v in held.items() if i % 3}
                among = np.array([*some, 10**9], dtype=np.int64)
                assert vectors.search(pool[2], 3, among) == reference(some, pool[2], 3)
                found = vectors.get([*held, 10**9])
                assert all(np.array_equal(found[i], v) for i, v in held.items()) and len(found) == len(held)
            former, now = made, loaded
    finally:
        generations.LEAST_LOG, generations.LOG_SHARE = least, portion


class Held:
    """Stops writers where they make vectors durable, until `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go, append = threading.Event(), threading.Event(), GenerationFiles.append

        def stop(*given: object) -> object:
            self.reached.set()
            assert self.go.wait(60)
            return append(*given)

        monkeypatch.setattr(GenerationFiles, "append", stop)


def test_searches_do_not_wait_for_a_commit_of_another_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path).close()
    with FaissTextVectorStore.open(tmp_path) as store:
        find(store, axis(0))
        held = Held(monkeypatch)

        def upload() -> None:
            with store.catalog.private():
                store.add([node("new", axis(3))])
                store.delete("d0")
                assert find(store, axis(3)) == ["new"]  # its own work
                store.commit()

        writer = threading.Thread(target=upload, daemon=True)
        writer.start()
        assert held.reached.wait(60)
        answers: list[list[str]] = []
        searches = [
            threading.Thread(target=lambda: answers.append(find(store, axis(0), 9)), daemon=True) for _ in "1234"
        ]
        for search in searches:
            search.start()
        join(searches)  # while the commit stands still
        assert [sorted(answer) for answer in answers] == [["n0", "n1", "n2"]] * 4
        held.go.set()
        join([writer])
        assert sorted(find(store, axis(0), 9)) == ["n1", "n2", "new"]


def test_searches_beside_a_writer_are_of_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "LEAST_LOG", 5_000)
    filled(tmp_path, 0).close()
    stop, torn, seen = threading.Event(), [], set()
    with FaissTextVectorStore.open(tmp_path) as store:
        store.add([node(f"0-{j}", axis(j)) for j in range(8)])
        store.commit()

        def search() -> None:
            while not stop.is_set():
                steps = {id_.split("-")[0] for id_ in find(store, axis(0), 99)}
                if len(steps) != 1:
                    torn.append(steps)
                seen.update(steps)

        threads = [threading.Thread(target=search, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for step in range(1, 60):
            with store.catalog.private():
                store.delete_nodes([f"{step - 1}-{j}" for j in range(8)])
                store.add([node(f"{step}-{j}", axis(j)) for j in range(8)])
                if step % 7 == 0:
                    store.rollback()
                    store.delete_nodes([f"{step - 1}-{j}" for j in range(8)])
                    store.add([node(f"{step}-{j}", axis(j)) for j in range(8)])
                store.commit()
        stop.set()
        join(threads)
    assert not torn
    assert len(seen) > 2


def test_work_without_a_context_of_its_own_is_seen_at_once_by_all(tmp_path: Path) -> None:
    with filled(tmp_path) as store:
        store.add([node("new", axis(3))])
        answers: list[list[str]] = []
        other = threading.Thread(target=lambda: answers.append(find(store, axis(3))), daemon=True)
        other.start()
        join([other])
        assert answers == [["new"]]
        store.rollback()
        assert find(store, axis(3), 9) != ["new"]
