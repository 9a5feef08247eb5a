"""Kills, damage, full disks, forbidden folders and planted pickles: the store refuses, and gives no wrong data."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import sqlite3
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diskcache
import pytest
import torch

from compllm_rag.errors import (
    CorruptRecordError,
    InvalidConceptsError,
    StorageMismatchError,
    StoreFullError,
    UnsupportedFormatError,
)
from compllm_rag.store import DiskStore
from compllm_rag.store.index_database import PlainDisk
from compllm_rag.store.packs import PackWriter, pack_header
from tests.processes import run, said, started
from tests.store.store_samples import HIDDEN, key, python, records, same


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A closed store of records 0 to 19 in one pack."""
    with DiskStore(tmp_path / "store", hidden_size=HIDDEN) as store:
        store.put(records(range(20)))
    return tmp_path / "store"


def _reader(folder: Path) -> DiskStore:
    return DiskStore(folder, hidden_size=HIDDEN, read_only=True)


def _place(folder: Path, number: int) -> tuple[Path, int]:
    with _reader(folder) as store:
        location = dict(store.iter_records())[key(number)]
    return folder / "packs" / f"{location.pack:06d}.pack", location.offset


def _overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _change_row(folder: Path, statement: str, values: tuple[object, ...]) -> None:
    connection = sqlite3.connect(folder / "index" / "cache.db")
    with connection:
        assert connection.execute(statement, values).rowcount == 1
    connection.close()


def test_killed_writer_loses_no_flushed_record(tmp_path: Path) -> None:
    script = (
        "store = DiskStore(sys.argv[1], hidden_size=HIDDEN, pack_bytes=20_000); start = int(sys.argv[2])\n"
        "for number in range(start, start + 100_000, 7):\n"
        "    store.put(records(range(number, number + 7)))\n"
        "    if number % 3 == 0: store.flush(); print(number + 6, flush=True)\n"
    )
    chance, start, promised = random.Random(5), 0, set[int]()
    for _ in range(4):
        with started(python(script, tmp_path / "store", start)) as child:
            first = said(child)
            time.sleep(chance.uniform(0, 0.15))
            child.kill()
            last = max(int(line) for line in [first, *child.stdout.read().split("\n")[:-1]])
        promised |= set(range(start, last + 1))
        with DiskStore(tmp_path / "store", hidden_size=HIDDEN, pack_bytes=20_000) as store:
            indexed = [name for name, _ in store.iter_records()]
            assert all(store.check(name) for name in indexed)
            assert {key(number) for number in promised} <= set(indexed)
            assert store.stats().records == len(indexed) == len(set(indexed))
        start = last + 1000
    with _reader(tmp_path / "store") as store:
        assert all(same(store.get([key(number)])[0], number) for number in promised)


def test_tail_of_a_killed_writer_is_left_and_written_behind(folder: Path) -> None:
    pack, _ = _place(folder, 0)
    with pack.open("ab") as file:
        file.write(b"half a record")
    before = pack.read_bytes()
    with DiskStore(folder, hidden_size=HIDDEN) as store:
        store.put(records([100]))
    assert pack.read_bytes()[: len(before)] == before
    with _reader(folder) as store:
        assert same(store.get([key(100)])[0], 100)
        assert same(store.get([key(19)])[0], 19)


def test_pack_cut_off_in_its_header_is_left_for_the_next(folder: Path) -> None:
    (folder / "packs" / "000002.pack").write_bytes(b"CLLM")
    with DiskStore(folder, hidden_size=HIDDEN) as store:
        store.put(records([100]))
    assert _place(folder, 100)[0].name == "000003.pack"
    assert (folder / "packs" / "000002.pack").read_bytes() == b"CLLM"


def test_flipped_bit_names_the_key_and_gives_no_data(folder: Path) -> None:
    pack, offset = _place(folder, 7)
    original = pack.read_bytes()
    size = (1 + 7 % 5) * HIDDEN * 2
    for bit in (0, size * 4 + 3, size * 8 - 1):
        _overwrite(pack, offset + bit // 8, bytes([original[offset + bit // 8] ^ (1 << bit % 8)]))
        with _reader(folder) as store:
            for read in (
                lambda store=store: store.get([key(6), key(7)]),
                lambda store=store: store.get_joined([key(number) for number in range(20)]),
                lambda store=store: store.check(key(7)),
            ):
                with pytest.raises(CorruptRecordError, match=key(7)):
                    read()
            assert same(store.get([key(6)])[0], 6)
        _overwrite(pack, 0, original)


def test_truncated_pack_names_the_key_even_under_an_open_reader(folder: Path) -> None:
    pack, offset = _place(folder, 12)
    with _reader(folder) as store:
        assert same(store.get([key(12)])[0], 12)
        os.truncate(pack, offset + 5)
        with pytest.raises(CorruptRecordError, match=key(12)):
            store.get_joined([key(number) for number in range(20)])
        assert same(store.get([key(11)])[0], 11)
    with _reader(folder) as store, pytest.raises(CorruptRecordError, match=key(13)):
        store.get([key(13)])
    os.truncate(pack, 10)
    with _reader(folder) as store, pytest.raises(CorruptRecordError, match=key(0)):
        store.get([key(0)])
    pack.unlink()
    with _reader(folder) as store, pytest.raises(CorruptRecordError, match=key(0)):
        store.get([key(0)])


def test_pack_cut_by_pages_under_an_open_reader_ends_no_process(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store", hidden_size=HIDDEN) as store:
        store.put(records(range(1000)))
    script = (
        "import os; from compllm_rag.errors import CorruptRecordError\n"
        "store = DiskStore(sys.argv[1], hidden_size=HIDDEN, read_only=True)\n"
        "print(same(store.get([key(999)])[0], 999))\n"
        "os.truncate(sys.argv[1] + '/packs/000001.pack', 5000)\n"
        "try: store.get([key(999)])\n"
        "except CorruptRecordError as error: print(key(999) in str(error))\n"
    )
    done = subprocess.run(python(script, tmp_path / "store"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\nTrue\n"), done.stderr


def test_rows_of_two_keys_swapped_give_no_data(folder: Path) -> None:
    with sqlite3.connect(folder / "index" / "cache.db") as connection:
        rows = dict(connection.execute("SELECT key, value FROM Cache").fetchall())
    _change_row(folder, "UPDATE Cache SET value = ? WHERE key = ?", (rows[key(5)], key(10)))
    with _reader(folder) as store, pytest.raises(CorruptRecordError, match=key(10)):
        store.get([key(10)])


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xff" * 24,
        b"\x01\0\0\0" + b"\xff" * 20,
        b"\x01\0\0\0" + bytes(20),
        b"\x01\0\0\0" + bytes(8) + b"\x01" * 12,
    ],
    ids=["empty", "ones", "far", "zero-concepts", "in-the-header"],
)
def test_senseless_index_row_is_refused_before_allocation(folder: Path, value: bytes) -> None:
    _change_row(folder, "UPDATE Cache SET value = ? WHERE key = ?", (value, key(3)))
    with _reader(folder) as store, pytest.raises(CorruptRecordError, match=key(3)):
        store.get([key(3)])


def test_planted_pickle_is_never_loaded(folder: Path, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"

    class Planted:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(sentinel),)

    with diskcache.Cache(str(folder / "index")) as cache:
        row = cache.disk.store(Planted(), False, key=key(3))
    _change_row(folder, "UPDATE Cache SET mode = ?, value = ? WHERE key = ?", (row[1], row[3], key(3)))
    with DiskStore(folder, hidden_size=HIDDEN) as store:
        reads = [
            lambda: store.get([key(3)]),
            lambda: store.contains([key(3)]),
            lambda: store.get_joined([key(3)]),
            lambda: store.put(records([3])),
            lambda: list(store.iter_records()),
            lambda: store._index._cache[key(3)],
        ]
        for read in reads:
            with pytest.raises(CorruptRecordError):
                read()
        assert same(store.get([key(4)])[0], 4)
    _change_row(folder, "UPDATE Cache SET key = ?, raw = 0 WHERE key = ?", (pickle.dumps(Planted()), key(4)))
    with DiskStore(folder, hidden_size=HIDDEN) as store:
        assert store.get([key(4)]) == [None]
        with pytest.raises(CorruptRecordError):
            list(store._index._cache)
    assert not sentinel.exists()
    pickle.loads(row[3])  # the plant does work: where pickles are loaded, it goes off
    assert sentinel.exists()


def test_planted_file_name_is_never_opened(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(24))
    values = (2, "../../secret", key(3))
    _change_row(folder, "UPDATE Cache SET mode = ?, filename = ?, value = NULL WHERE key = ?", values)
    with DiskStore(folder, hidden_size=HIDDEN) as store:
        for read in (lambda: store.get([key(3)]), lambda: store._index._cache[key(3)]):
            with pytest.raises(CorruptRecordError):
                read()


def test_index_writes_no_pickle() -> None:
    disk = PlainDisk("unused", min_file_size=100)
    for bad in (("a",), b"a", 1):
        with pytest.raises(UnsupportedFormatError):
            disk.put(bad)
    for bad in ({"a": 1}, "text", 1, bytes(100)):
        with pytest.raises(UnsupportedFormatError):
            disk.store(bad, False)


def test_index_is_durable_and_evicts_nothing(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store", hidden_size=HIDDEN) as store:
        cache = store._index._cache
        assert cache._sql("PRAGMA synchronous").fetchone() == (2,)
        assert cache._sql("PRAGMA mmap_size").fetchone() == (0,)
        assert (cache.eviction_policy, cache.cull_limit, cache.statistics) == ("none", 0, 0)


def test_pack_is_synced_before_its_rows_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = os.fsync

    def counting(file: int) -> None:
        if stat.S_ISREG(os.fstat(file).st_mode):  # SQLite's own syncs do not come by here
            with _reader(tmp_path / "store") as reader:
                rows.append(reader.stats().records)
        real(file)

    with DiskStore(tmp_path / "store", hidden_size=HIDDEN) as store:
        monkeypatch.setattr(os, "fsync", counting)
        store.put(records([1, 2]))
        store.flush()
        store.put(records([3]))
        store.flush()
    assert rows == [0, 2]


def test_failed_sync_forgets_what_it_did_not_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def failing(file: int) -> None:
        raise OSError(28, "No space left on device")

    with DiskStore(folder, hidden_size=HIDDEN) as store:
        store.put(records([100]))
        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(StoreFullError):
            store.flush()
        monkeypatch.setattr(os, "fsync", real)
        assert store.contains([key(100), key(19)]) == [False, True]
        store.flush()
        assert store.put(records([100])) == 1
    assert _place(folder, 100)[0].name == "000002.pack"
    with _reader(folder) as store:
        assert same(store.get([key(100)])[0], 100)


@pytest.mark.parametrize("damage", [b"no database at all" * 300, b"", None], ids=["random", "empty", "gone"])
@pytest.mark.parametrize("read_only", [True, False])
def test_damaged_index_is_never_taken_for_an_empty_one(folder: Path, damage: bytes | None, read_only: bool) -> None:
    if damage is None:
        (folder / "index" / "cache.db").unlink()
    else:
        (folder / "index" / "cache.db").write_bytes(damage)
    with pytest.raises(CorruptRecordError, match="index"):
        DiskStore(folder, hidden_size=HIDDEN, read_only=read_only)


def test_pack_of_another_width_or_version_is_refused(folder: Path) -> None:
    pack, _ = _place(folder, 0)
    good = pack.read_bytes()
    _overwrite(pack, 0, pack_header(HIDDEN * 2, "fp16"))
    with _reader(folder) as store, pytest.raises(StorageMismatchError):
        store.get([key(0)])
    _overwrite(pack, 0, good[:9])
    _overwrite(pack, 12, b"\x01")
    with _reader(folder) as store, pytest.raises(CorruptRecordError, match="header"):
        store.get([key(0)])


def test_values_that_are_no_concepts_are_refused_on_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("compllm_rag.store.codec.check_finite", lambda half: None)
        with DiskStore(tmp_path / "store", hidden_size=HIDDEN) as store:
            store.put([*records([1]), (key(2), torch.full((1, HIDDEN), float("nan")))])
    with _reader(tmp_path / "store") as store:
        assert same(store.get([key(1)])[0], 1)
        with pytest.raises(InvalidConceptsError, match=key(2)):
            store.get_joined([key(1), key(2)])


def _limited(folder: Path, limit: int, body: str) -> str:
    script = (
        "import resource; from compllm_rag.errors import StoreFullError\n"
        "store = DiskStore(sys.argv[1], hidden_size=HIDDEN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))\n"
    )
    done = run(python(script + body, folder))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_interrupt_behind_the_commit_counts_nothing_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python raises what a signal brought as soon as SQLite's COMMIT returns: the rows are there by then."""
    real, fired = diskcache.Cache._sql.fget, []

    def interrupted(cache: diskcache.Cache) -> Callable[..., object]:
        execute = real(cache)

        def run(statement: str, *values: object) -> object:
            done = execute(statement, *values)
            if statement == "COMMIT" and not fired:
                fired.append(True)
                raise KeyboardInterrupt
            return done

        return run

    with DiskStore(folder, hidden_size=HIDDEN) as store:
        store.put(records(range(20, 30)))
        monkeypatch.setattr(diskcache.Cache, "_sql", property(interrupted))
        with pytest.raises(KeyboardInterrupt):
            store.flush()
        store.flush()  # as whoever is interrupted does, so that what was made stays
        store.put(records(range(30, 33)))
    with _reader(folder) as store:
        assert store.stats().records == 33 and store.verify(deep=True).damage == []


def test_an_interrupt_while_a_pack_is_digested_calls_nothing_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DiskStore(folder, hidden_size=HIDDEN) as store:
        store.put(records(range(20, 30)))
        with monkeypatch.context() as patched:

            def interrupted(self: PackWriter, start: int, data: bytes) -> None:
                raise KeyboardInterrupt

            patched.setattr(PackWriter, "_note", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.put(records(range(30, 40)))
        store.put(records(range(40, 50)))
    with _reader(folder) as store:
        found = store.verify(deep=True)
        assert found.damage == [] and found.sound.records == 40 and found.dead_bytes > 0


def test_who_finds_no_room_does_not_keep_others_from_making_some(folder: Path) -> None:
    pack = _place(folder, 0)[0]
    output = _limited(
        folder,
        pack.stat().st_size + 10,
        "try: store.put(records(range(100, 130)))\n"
        "except StoreFullError: print('full')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "other = DiskStore(sys.argv[1], hidden_size=HIDDEN)\n"
        "print(other.compact(lambda keys: [k != key(3) for k in keys]).records_dropped)",
    )
    assert output == "full\n1"


def test_full_disk_under_a_pack(folder: Path) -> None:
    pack = _place(folder, 0)[0]
    size = pack.stat().st_size
    output = _limited(
        folder,
        size + 100,
        "import os\n"
        "try: store.put(records(range(100, 130)))\n"
        "except StoreFullError: print('full')\n"
        f"print(os.path.getsize({str(pack)!r}))\n"
        "print(all(same(store.get([key(n)])[0], n) for n in range(20)), store.contains([key(100)]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "print(store.put(records(range(100, 130)))); store.close()",
    )
    assert output == f"full\n{size}\nTrue [False]\n30"
    with _reader(folder) as store:
        assert store.stats().records == 50
        assert all(store.check(name) for name, _ in store.iter_records())


def test_full_disk_under_the_index(tmp_path: Path) -> None:
    output = _limited(
        tmp_path / "store",
        2_000_000,
        "store.put(records(range(20))); store.flush()\n"
        "store.put(records(range(20, 2000)))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, resource.RLIM_INFINITY))\n"
        "for _ in range(2):\n"
        "    try: store.flush()\n"
        "    except StoreFullError: print('full')\n"
        "print(same(store.get([key(5)])[0], 5), same(store.get([key(1999)])[0], 1999))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "store.close()",
    )
    assert output == "full\nfull\nTrue True"
    with _reader(tmp_path / "store") as store:
        assert store.stats().records == 2000
        assert all(store.check(name) for name, _ in store.iter_records())


def test_forbidden_folder_is_a_clear_error_and_still_reads() -> None:
    base = Path(tempfile.mkdtemp())  # unlike tmp_path, one that another user can reach
    try:
        with DiskStore(base / "store", hidden_size=HIDDEN) as store:
            store.put(records(range(3)))
        for path in [base, *base.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        script = (
            "import os; from compllm_rag.errors import StoreReadOnlyError\n"
            "if os.getuid() == 0: os.setuid(65534)\n"
            "for path in (sys.argv[1], sys.argv[1] + '2'):\n"
            "    try: DiskStore(path, hidden_size=HIDDEN)\n"
            "    except StoreReadOnlyError as error: print('refused', path in str(error))\n"
            "store = DiskStore(sys.argv[1], hidden_size=HIDDEN, read_only=True)\n"
            "print([same(store.get([key(n)])[0], n) for n in range(3)], store.stats().records)\n"
        )
        done = subprocess.run(python(script, base / "store"), capture_output=True, text=True, check=False)
        assert done.stdout == "refused True\nrefused True\n[True, True, True] 3\n", done.stderr
        assert not (base / "store" / "index" / "cache.db-shm").exists()
    finally:
        for path in [base, *base.rglob("*")]:
            path.chmod(0o700)
        shutil.rmtree(base)
