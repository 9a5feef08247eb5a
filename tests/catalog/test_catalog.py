"""The catalog: commits, crashes, damage, several processes."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import faiss
import numpy as np
import pytest

from compllm_rag.catalog import generations
from compllm_rag.catalog.catalog import Catalog
from compllm_rag.errors import (
    CompLLMError,
    ConfigurationError,
    CorruptRecordError,
    StorageNotFoundError,
    StoreLockedError,
    StoreReadOnlyError,
    UnsupportedFormatError,
)
from compllm_rag.llamaindex.vector_store import FaissTextVectorStore
from tests import processes
from tests.catalog.catalog_samples import DIM, axis, filled, find, node, python
from tests.processes import said, tell


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return processes.run(python(script, *arguments))


def talking(script: str, *arguments: object) -> AbstractContextManager[subprocess.Popen[str]]:
    """A process that one can talk to line by line; it is killed at the end."""
    return processes.started(python(script, *arguments))


def vector_files(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.name.startswith("vectors-"))


def change_database(path: Path, statement: str, *values: object) -> None:
    connection = sqlite3.connect(path / "catalog.db")
    with connection:
        assert connection.execute(statement, values).rowcount > 0
    connection.close()


def test_reopen_after_commit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "s"
    store = filled(path)
    store.catalog.set_meta("rate", "2")
    store.commit()
    store.close()
    with FaissTextVectorStore.open(path) as again:
        assert (find(again, axis(1)), again.dim, again.catalog.get_meta("rate")) == (["n1"], DIM, "2")
        assert again.catalog.get_meta("never set") is None
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in [path, *path.iterdir()]}
    assert modes == {"s": 0o700, "catalog.db": 0o600, "catalog.lock": 0o600, "vectors-1.faiss": 0o600}


def test_uncommitted_work_is_seen_here_and_nowhere_else(tmp_path: Path) -> None:
    with filled(tmp_path) as store, FaissTextVectorStore.open(tmp_path, read_only=True) as reader:
        store.add([node("more", axis(3))])
        store.delete("d0")
        store.catalog.set_meta("k", "v")
        assert find(store, axis(3)) == ["more"]
        assert sorted(find(reader, axis(0), 9)) == ["n0", "n1", "n2"]
        assert reader.catalog.get_meta("k") is None
        store.commit()
        assert sorted(find(reader, axis(0), 9)) == ["more", "n1", "n2"]
        assert (reader.catalog.get_meta("k"), reader.catalog.generation) == ("v", 2)


def test_close_and_rollback_give_up_what_was_not_committed(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.clear()
    store.rollback()
    assert sorted(find(store, axis(0), 9)) == ["n0", "n1", "n2"]
    store.delete("d1")
    store.close()
    with pytest.raises(ConfigurationError, match="closed"):
        find(store, axis(0))
    with pytest.raises(RuntimeError), FaissTextVectorStore.open(tmp_path) as store:
        assert store.n_nodes == 3
        store.clear()
        raise RuntimeError("the caller's own")
    with FaissTextVectorStore.open(tmp_path) as store:
        assert store.n_nodes == 3
        store.delete("d1")
    with FaissTextVectorStore.open(tmp_path) as store:
        assert store.n_nodes == 2


def test_files_of_older_generations_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "LEAST_LOG", 0)
    monkeypatch.setattr(generations, "LOG_SHARE", 0.0)
    with filled(tmp_path) as store:
        for step in range(4):
            store.add([node(f"s{step}", axis(step))])
            store.commit()
        (tmp_path / "vectors-77.faiss").touch()
        (tmp_path / "vectors-9.faiss.tmp").touch()
        (tmp_path / "vectors-mine.txt").touch()
        store.delete("d0")
        store.commit()
        assert vector_files(tmp_path) == ["vectors-5.faiss", "vectors-6.faiss", "vectors-mine.txt"]
        # Nothing about vectors changes: their file stays as it is.
        before = (tmp_path / "vectors-6.faiss").stat().st_mtime_ns
        store.catalog.set_meta("rate", "4")
        store.commit()
        assert vector_files(tmp_path) == ["vectors-5.faiss", "vectors-6.faiss", "vectors-mine.txt"]
        assert (tmp_path / "vectors-6.faiss").stat().st_mtime_ns == before


def test_sigkill_before_commit_leaves_the_former_state(tmp_path: Path) -> None:
    filled(tmp_path).close()
    done = run(
        "store = FaissTextVectorStore.open(sys.argv[1])\n"
        "store.clear()\n"
        "store.add([node(f'x{i}', axis(i), text='long ' * 2000) for i in range(500)])\n"  # more than SQLite's cache
        "store.catalog.set_meta('rate', '9')\n"
        "die()",
        tmp_path,
    )
    assert done.returncode == -signal.SIGKILL
    with FaissTextVectorStore.open(tmp_path) as store:
        assert sorted(find(store, axis(0), 9)) == ["n0", "n1", "n2"]
        assert store.catalog.get_meta("rate") is None
        store.add([node("after", axis(3))])  # the dead process holds no lock


def test_sigkill_between_vectors_and_rows_leaves_the_former_state(tmp_path: Path) -> None:
    filled(tmp_path).close()
    done = run(
        "append = GenerationFiles.append\n"
        "def append_and_die(self, *arguments):\n"
        "    append(self, *arguments)\n"
        "    die()\n"
        "GenerationFiles.append = append_and_die\n"
        "store = FaissTextVectorStore.open(sys.argv[1])\n"
        "store.add([node('half', axis(3))])\n"
        "store.commit()",
        tmp_path,
    )
    assert done.returncode == -signal.SIGKILL
    assert vector_files(tmp_path) == ["vectors-1.faiss", "vectors-1.log"]
    with FaissTextVectorStore.open(tmp_path, read_only=True) as reader:
        assert sorted(find(reader, axis(0), 9)) == ["n0", "n1", "n2"]
    with FaissTextVectorStore.open(tmp_path) as store:
        store.add([node("whole", axis(3))])
        store.commit()
        assert (store.catalog.generation, find(store, axis(3))) == (2, ["whole"])


def test_sigkill_at_random_times(tmp_path: Path) -> None:
    filled(tmp_path, 0).close()
    script = (
        "store = FaissTextVectorStore.open(sys.argv[1])\n"
        "print('go', flush=True)\n"
        "for i in range(10**6):\n"
        "    store.add([node(f'{i}-{j}', axis(j), doc=str(i)) for j in range(3)])\n"
        "    if i > 2: store.delete(str(i - 2))\n"
        "    store.catalog.set_meta('last', str(i))\n"
        "    store.commit()\n"
    )
    rng = random.Random(7)
    for _ in range(3):
        with talking(script, tmp_path) as process:
            assert said(process) == "go"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=rng.uniform(0.01, 0.3))
            process.kill()
            process.wait(60)
        with FaissTextVectorStore.open(tmp_path, read_only=True) as store:
            last = store.catalog.get_meta("last")
            documents = sorted({n.ref_doc_id or "" for n in store.get_nodes()})
            assert len(find(store, axis(0), 99)) == store.n_nodes == 3 * len(documents)
            assert last is None or last in documents


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "cut": lambda data: data[:-7],
    "longer": lambda data: data + b"\0",
    "huge": lambda data: data + bytes(2**16),
    "empty": lambda data: b"",
    "random": lambda data: random.Random(1).randbytes(len(data)),
    # FAISS believes a header: with this count it would ask for 2^50 vectors.
    "count": lambda data: data[:8] + (2**50).to_bytes(8, "little") + data[16:],
}


def outcomes(folders: list[Path]) -> dict[str, str]:
    """What opening each folder ends in, told by a process of its own, which FAISS may end by a signal."""
    done = run(
        "for path in sys.argv[1:]:\n"
        "    try: FaissTextVectorStore.open(path, read_only=len(path) % 2 == 0)\n"
        "    except CompLLMError as error: print(type(error).__name__, 'repair' in str(error), flush=True)\n"
        "    else: print('opened', flush=True)",
        *folders,
    )
    assert done.returncode == 0, done
    return dict(zip([folder.name for folder in folders], done.stdout.splitlines(), strict=True))


def test_damaged_vector_files_are_refused(tmp_path: Path) -> None:
    folders = [tmp_path / kind for kind in DAMAGE]
    for folder, damage in zip(folders, DAMAGE.values(), strict=True):
        filled(folder, 9).close()
        file = folder / "vectors-1.faiss"
        file.write_bytes(damage(file.read_bytes()))
    assert outcomes(folders) == dict.fromkeys(DAMAGE, "CorruptRecordError True")


@pytest.mark.parametrize("read_only", [False, True])
def test_missing_vector_file_is_refused(tmp_path: Path, read_only: bool) -> None:
    filled(tmp_path).close()
    (tmp_path / "vectors-1.faiss").unlink()
    with pytest.raises(CorruptRecordError, match="not there"):
        FaissTextVectorStore.open(tmp_path, read_only=read_only)


def test_forgeries_with_the_right_checksum_do_not_end_the_process(tmp_path: Path) -> None:
    kinds = ["count", "random", "cut", "empty"]
    for kind in kinds:
        filled(tmp_path / kind, 9).close()
        file = tmp_path / kind / "vectors-1.faiss"
        data = DAMAGE[kind](file.read_bytes())
        file.write_bytes(data)
        change_database(tmp_path / kind, "UPDATE state SET sha256 = ?", hashlib.sha256(data).hexdigest())
    assert outcomes([tmp_path / kind for kind in kinds]) == dict.fromkeys(kinds, "CorruptRecordError True")


def test_other_indexes_in_place_of_ours_are_refused(tmp_path: Path) -> None:
    filled(tmp_path).close()
    plain = faiss.IndexFlatIP(DIM)
    plain.add(np.eye(3, DIM, dtype=np.float32))
    distances = faiss.IndexIDMap2(faiss.IndexFlatL2(DIM))
    distances.add_with_ids(np.eye(3, DIM, dtype=np.float32), np.arange(1, 4))
    narrow = faiss.IndexIDMap2(faiss.IndexFlatIP(3))
    narrow.add_with_ids(np.eye(3, dtype=np.float32), np.arange(1, 4))
    for other in (plain, distances, narrow):
        data = faiss.serialize_index(other).tobytes()
        (tmp_path / "vectors-1.faiss").write_bytes(data)
        change_database(tmp_path, "UPDATE state SET sha256 = ?", hashlib.sha256(data).hexdigest())
        with pytest.raises(CorruptRecordError, match="another kind"):
            FaissTextVectorStore.open(tmp_path)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM nodes WHERE node_id = 'n1'",
        "UPDATE nodes SET id = 40 WHERE node_id = 'n1'",  # equal counts, and a wrong passage at the best score
        "INSERT INTO nodes SELECT 50, 'n9', ref_doc_id, text, node, text_sha256, row_sha256 FROM nodes LIMIT 1",
    ],
)
def test_rows_that_disagree_with_vectors_are_refused(tmp_path: Path, statement: str) -> None:
    filled(tmp_path).close()
    change_database(tmp_path, statement)
    with pytest.raises(CorruptRecordError, match="do not belong together.*repair"):
        FaissTextVectorStore.open(tmp_path)


@pytest.mark.parametrize("column", ["node_id", "ref_doc_id", "text", "node", "text_sha256", "row_sha256"])
def test_damaged_rows_are_no_answer(tmp_path: Path, column: str) -> None:
    filled(tmp_path).close()
    change_database(tmp_path, f"UPDATE nodes SET {column} = {column} || 'x' WHERE id = 1")
    with FaissTextVectorStore.open(tmp_path) as store:
        assert find(store, axis(1)) == ["n1"]
        with pytest.raises(CorruptRecordError, match="checksum"):
            find(store, axis(0))


@pytest.mark.parametrize("kind", ["random", "cut", "empty"])
def test_damaged_database_is_refused(tmp_path: Path, kind: str) -> None:
    filled(tmp_path).close()
    file = tmp_path / "catalog.db"
    data = file.read_bytes()
    file.write_bytes(
        {"random": random.Random(2).randbytes(len(data)), "cut": data[: len(data) // 2], "empty": b""}[kind]
    )
    for read_only in (True, False):
        with pytest.raises((CorruptRecordError, StorageNotFoundError)):
            FaissTextVectorStore.open(tmp_path, read_only=read_only)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    filled(tmp_path).close()
    change_database(tmp_path, "UPDATE nodes SET text = CAST(x'ff00fe' AS TEXT) WHERE id = 1")
    with FaissTextVectorStore.open(tmp_path) as store, pytest.raises(CorruptRecordError):
        store.get_nodes()


def test_newer_format_is_refused(tmp_path: Path) -> None:
    filled(tmp_path).close()
    change_database(tmp_path, "UPDATE state SET format_version = 3")
    with pytest.raises(UnsupportedFormatError, match="got 3, expected 1 or 2"):
        FaissTextVectorStore.open(tmp_path)


def test_strange_state_is_refused(tmp_path: Path) -> None:
    for statement in (
        "UPDATE state SET file = '../vectors-1.faiss'",
        "UPDATE state SET dim = 'x'",
        "DELETE FROM state",
    ):
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        filled(tmp_path / "s").close()
        change_database(tmp_path / "s", statement)
        with pytest.raises(CorruptRecordError):
            FaissTextVectorStore.open(tmp_path / "s")


def test_nothing_there(tmp_path: Path) -> None:
    for read_only in (True, False):
        with pytest.raises(StorageNotFoundError):
            FaissTextVectorStore.open(tmp_path / "s", read_only=read_only)
    assert not (tmp_path / "s").exists()


def test_create_refuses_what_is_there_and_finishes_what_was_interrupted(tmp_path: Path) -> None:
    filled(tmp_path / "s").close()
    with pytest.raises(ConfigurationError, match="already"):
        FaissTextVectorStore.create(tmp_path / "s", DIM)
    with FaissTextVectorStore.open(tmp_path / "s") as store:
        assert store.n_nodes == 3
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "catalog.db").touch()
    with pytest.raises(StorageNotFoundError):
        FaissTextVectorStore.open(tmp_path / "half")
    with FaissTextVectorStore.create(tmp_path / "half", DIM) as store:
        assert store.n_nodes == 0


def test_links_lead_nowhere(tmp_path: Path) -> None:
    filled(tmp_path / "s").close()
    for name in ("catalog.db", "vectors-1.faiss"):
        shutil.copytree(tmp_path / "s", tmp_path / name)
        (tmp_path / name / name).unlink()
        (tmp_path / name / name).symlink_to(tmp_path / "s" / name)
        with pytest.raises(CompLLMError):
            FaissTextVectorStore.open(tmp_path / name)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    filled(tmp_path).close()
    script = (
        "store = FaissTextVectorStore.open(sys.argv[1])\n"
        "store.add([node('theirs', axis(3))])\n"
        "print(os.getpid(), flush=True)\n"
        "sys.stdin.readline(); store.commit(); print('committed', flush=True); sys.stdin.readline()"
    )
    with FaissTextVectorStore.open(tmp_path) as mine, talking(script, tmp_path) as other:
        pid = said(other)
        with pytest.raises(StoreLockedError, match=f"process {pid}"):
            mine.add([node("mine", axis(3, 0.5))])
        assert (sorted(find(mine, axis(0), 9)), mine.catalog.pending) == (["n0", "n1", "n2"], False)
        tell(other)
        assert said(other) == "committed"
        # The lock is free again, and what the other one wrote since this instance opened is not lost.
        mine.add([node("mine", axis(3, 0.5))])
        mine.commit()
        assert find(mine, axis(3), 2) == ["theirs", "mine"]


def test_instances_of_one_process_are_two_writers(tmp_path: Path) -> None:
    with filled(tmp_path) as one, FaissTextVectorStore.open(tmp_path) as two:
        one.delete("d0")
        with pytest.raises(StoreLockedError):
            two.catalog.set_meta("a", "b")
        one.rollback()
        two.catalog.set_meta("a", "b")


def test_reader_in_another_process_follows(tmp_path: Path) -> None:
    script = (
        "store = FaissTextVectorStore.open(sys.argv[1], read_only=True)\n"
        "while True:\n"
        "    print(*sorted(find(store, axis(0), 99)), flush=True)\n"
        "    sys.stdin.readline()"
    )
    with filled(tmp_path) as store, talking(script, tmp_path) as reader:
        assert said(reader) == "n0 n1 n2"
        store.delete("d1")
        tell(reader)
        assert said(reader) == "n0 n1 n2"
        for step in range(3):  # further than the file it has read
            store.add([node(f"s{step}", axis(step))])
            store.commit()
        tell(reader)
        assert said(reader) == "n0 n2 s0 s1 s2"


def test_reader_never_sees_half_a_commit(tmp_path: Path) -> None:
    filled(tmp_path, 0).close()
    script = (
        "store = FaissTextVectorStore.open(sys.argv[1])\n"
        "for i in range(60):\n"
        "    store.clear()\n"
        "    store.add([node(f'{i}-{j}', axis(j)) for j in range(8)])\n"
        "    store.commit()\n"
        "    if i == 0: print('go', flush=True)\n"
    )
    with talking(script, tmp_path) as writer, FaissTextVectorStore.open(tmp_path, read_only=True) as reader:
        assert said(writer) == "go"
        seen = set()
        while writer.poll() is None:
            (step,) = {id_.split("-")[0] for id_ in find(reader, axis(0), 99)}
            seen.add(step)
        assert writer.returncode == 0
        assert len(find(reader, axis(0), 99)) == 8
    assert len(seen) > 1


def test_readers_write_nothing(tmp_path: Path) -> None:
    filled(tmp_path).close()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with FaissTextVectorStore.open(tmp_path, read_only=True) as reader:
        for write in (lambda: reader.add([node("x", axis(0))]), reader.clear, lambda: reader.delete("d0")):
            with pytest.raises(StoreReadOnlyError, match="reading"):
                write()
        assert len(find(reader, axis(0), 9)) == 3
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir() if not p.name.endswith(("-wal", "-shm"))}
    assert after == before


def test_folder_without_the_right_to_write() -> None:
    # Not under tmp_path, whose parents another user may not enter; root may write everywhere, so it becomes that user.
    folder = Path(tempfile.mkdtemp())
    try:
        filled(folder / "s").close()
        for path in (folder, folder / "s"):
            path.chmod(0o555)
        for path in (folder / "s").iterdir():
            path.chmod(0o444)
        done = run(
            "os.geteuid() or os.setuid(65534)\n"
            "for call in (FaissTextVectorStore.open, lambda p: FaissTextVectorStore.create(p + '/new', 4)):\n"
            "    try: call(sys.argv[1])\n"
            "    except StoreReadOnlyError as error: print('refused')\n"
            "with FaissTextVectorStore.open(sys.argv[1], read_only=True) as store: print(find(store, axis(1)))",
            folder / "s",
        )
        assert done.stdout.split("\n")[:3] == ["refused", "refused", "['n1']"], done.stderr
    finally:
        for path in (folder, folder / "s"):
            path.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("limit", [2_000, 200_000])
def test_full_disk_leaves_the_former_state(tmp_path: Path, limit: int) -> None:
    filled(tmp_path).close()
    done = run(
        "import resource\n"
        "store = FaissTextVectorStore.open(sys.argv[1])\n"
        "store.add([node(f'x{i}', axis(i)) for i in range(100)])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "try:\n"
        "    store.add([node(f'y{i}', axis(i), text='long ' * 2000) for i in range(500)])\n"
        "    store.commit()\n"
        "except StoreFullError as error: print('full', error, flush=True)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "n = store.n_nodes\n"
        "print(n in (3, 103), len(find(store, axis(0), 999)) == n)\n"
        "store.rollback(); store.add([node('after', axis(3))]); store.commit(); print(store.n_nodes)",
        tmp_path,
        limit,
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("full"), done.stderr
    assert lines[1:] == ["True True", "4"], done.stderr
    with FaissTextVectorStore.open(tmp_path, read_only=True) as store:
        assert sorted(find(store, axis(3), 9)) == ["after", "n0", "n1", "n2"]


def test_full_disk_at_commit_can_be_tried_again(tmp_path: Path) -> None:
    filled(tmp_path).close()
    done = run(
        "import resource\n"
        "store = FaissTextVectorStore.open(sys.argv[1])\n"
        "store.add([node(f'x{i}', axis(i)) for i in range(4000)])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))\n"
        "try: store.commit()\n"
        "except StoreFullError: print('full', store.catalog.pending, len(os.listdir(sys.argv[1])))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "store.commit(); print(store.n_nodes)",
        tmp_path,
    )
    # The log that could not be written stays, empty; the next commit goes on with it.
    assert done.stdout.splitlines() == ["full True 6", "4003"], done.stderr
    with FaissTextVectorStore.open(tmp_path, read_only=True) as store:
        assert store.n_nodes == 4003


def test_a_step_is_all_or_nothing(tmp_path: Path) -> None:
    with Catalog.create(tmp_path / "s", DIM) as catalog:
        catalog.set_meta("a", "1")
        with pytest.raises(KeyError), catalog.writing() as connection:
            connection.execute("UPDATE meta SET value = '2'")
            raise KeyError("the caller's own")
        assert (catalog.get_meta("a"), catalog.pending) == ("1", True)
        with pytest.raises(ConfigurationError, match="Unicode"):
            catalog.set_meta("a", "\ud800")
        catalog.commit()
        with pytest.raises(KeyError), catalog.writing():
            raise KeyError("the caller's own")
        assert not catalog.pending  # nothing is left that would keep others out


def test_deleted_text_leaves_the_disk(tmp_path: Path) -> None:
    with filled(tmp_path) as store:
        store.add([node("s", axis(0), doc="s", text="a very secret passage " * 400)])
        store.commit()
        store.delete("s")
        store.commit()
    assert b"secret" not in b"".join(p.read_bytes() for p in tmp_path.iterdir())


def test_working_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    done = run(
        "import resource\n"
        "store = FaissTextVectorStore.create(sys.argv[1], DIM)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "grow = lambda r: [store.add([node(f'{r}-{i}', axis(i), text='x' * 100_000) for i in range(50)]) for r in r]\n"
        "grow(range(2)); before = peak(); grow(range(2, 22)); print((peak() - before) // 1024)",
        tmp_path / "s",
    )
    assert int(done.stdout) < 50, done.stderr  # MiB, while 100 MiB of text were added and none committed


def test_paths_may_hold_what_uris_may_not(tmp_path: Path) -> None:
    path = tmp_path / "50% of ?x=1#y ü"
    filled(path).close()
    with FaissTextVectorStore.open(os.fspath(path), read_only=True) as store:
        assert store.n_nodes == 3
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
