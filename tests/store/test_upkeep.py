"""Verification and compaction of a disk store, under kills, damage, full disks and readers that are at it."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
from pathlib import Path

import pytest
import torch

from compllm_rag.errors import CorruptRecordError, StoreLockedError, StoreReadOnlyError
from compllm_rag.store import DiskStore, StoreCheck
from tests.processes import said, started
from tests.store.store_samples import HIDDEN, concepts, key, python, records, same

EVEN = {key(number) for number in range(0, 400, 2)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A closed store of records 0 to 99 in several packs."""
    with DiskStore(tmp_path / "store", hidden_size=HIDDEN, pack_bytes=2000) as store:
        for start in range(0, 100, 5):
            store.put(records(range(start, start + 5)))
            store.flush()
    return tmp_path / "store"


def live(keys) -> list[bool]:
    return [name in EVEN for name in keys]


def opened(folder: Path, **options) -> DiskStore:
    return DiskStore(folder, hidden_size=HIDDEN, pack_bytes=2000, **options)


def checked(folder: Path, *, deep: bool = True) -> StoreCheck:
    with opened(folder, read_only=True) as store:
        return store.verify(deep=deep)


def packs(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "packs").iterdir())


def holds(folder: Path, numbers: range) -> bool:
    with opened(folder, read_only=True) as store:
        found = store.get([key(number) for number in range(100)])
    return all(same(found[n], n) if n in numbers else found[n] is None for n in range(100))


def test_a_compaction_takes_dead_records_and_their_bytes(folder: Path) -> None:
    before = checked(folder)
    assert (before.damage, before.sound.records, before.dead_bytes) == ([], 100, 0)
    with opened(folder) as store:
        report = store.compact(live)
        assert (report.records, report.records_dropped) == (50, 50)
        assert report.bytes_after < 0.6 * report.bytes_before == 0.6 * before.pack_bytes
        assert store.stats().records == 50
        assert same(store.get([key(42)])[0], 42)
        joined = store.get_joined([key(number) for number in range(0, 100, 2)])
    assert torch.equal(joined.float(), torch.cat([concepts(number) for number in range(0, 100, 2)]))
    assert holds(folder, range(0, 100, 2))
    after = checked(folder)
    assert (after.damage, after.dead_bytes, after.sound.records) == ([], 0, 50)
    with opened(folder) as store:
        again = store.compact(live)
        assert (again.packs_rewritten, again.records_dropped, again.bytes_after) == (0, 0, report.bytes_after)
        assert store.put(records(range(100))) == 50


def test_a_compaction_keeps_the_order_of_putting(folder: Path) -> None:
    with opened(folder) as store:
        store.compact(live)
        places = list(store.iter_records())
    assert [name for name, _ in places] == [key(number) for number in range(0, 100, 2)]
    assert [(at.pack, at.offset) for _, at in places] == sorted((at.pack, at.offset) for _, at in places)


def test_nothing_that_was_dropped_stays_on_the_disk(folder: Path) -> None:
    payload = concepts(4).half().numpy().tobytes()
    assert any(payload in path.read_bytes() for path in (folder / "packs").iterdir())
    with opened(folder) as store:
        store.compact(lambda keys: [name != key(4) for name in keys])
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert payload not in everything
    assert key(4).encode() not in everything
    with opened(folder) as store:
        assert store.compact(lambda keys: [False] * len(keys)).records == 0
    assert packs(folder) == []
    with opened(folder) as store:
        assert store.put(records([7])) == 1
    assert same(opened(folder, read_only=True).get([key(7)])[0], 7)


def test_without_an_answer_what_is_live_only_dead_bytes_go(folder: Path) -> None:
    with (folder / "packs" / packs(folder)[0]).open("ab") as file:
        file.write(b"the tail of a killed writer")
    (folder / "packs" / "000999.pack").write_bytes(b"CLLM")
    assert checked(folder).dead_bytes > 0
    with opened(folder) as store:
        assert (store.compact().records, store.stats().records) == (100, 100)
    assert checked(folder).dead_bytes == 0
    assert holds(folder, range(100))


def test_a_reader_at_work_stays_right_across_compactions(folder: Path) -> None:
    keys = [key(number) for number in range(0, 100, 2)]
    with opened(folder, read_only=True) as fresh, opened(folder, read_only=True) as mapped:
        assert mapped.get_joined(keys) is not None
        with opened(folder) as store:
            store.compact(live)
        for reader in (fresh, mapped):
            assert all(same(found, 2 * n) for n, found in enumerate(reader.get(keys)))
            assert reader.get([key(1)]) == [None]
            assert reader.get_joined([key(0), key(1)]) is None
        with opened(folder) as store:
            store.compact(lambda keys: [False] * len(keys))
            store.put(records(range(0, 100, 2)))  # under the numbers of packs that the readers have mapped
        for reader in (fresh, mapped):
            assert all(same(found, 2 * n) for n, found in enumerate(reader.get(keys)))


def test_readers_in_another_process_never_miss_a_live_record(folder: Path) -> None:
    script = (
        "store = DiskStore(sys.argv[1], hidden_size=HIDDEN, read_only=True)\n"
        "keys = [key(number) for number in range(0, 100, 2)]\n"
        "print('go', flush=True)\n"
        "rounds = 0\n"
        "while not os.path.exists(sys.argv[2]):\n"
        "    found = store.get(keys)\n"
        "    assert all(same(found[n], 2 * n) for n in range(50))\n"
        "    rounds += 1\n"
        "print(rounds > 0)\n"
    )
    stop = folder.parent / "stop"
    with started(python("import os\n" + script, folder, stop)) as reader:
        assert said(reader) == "go"
        for number in range(25):
            with opened(folder) as store:
                store.put(records(range(101 + 20 * number, 121 + 20 * number)))
                store.compact(live)
        stop.touch()
        assert said(reader) == "True"
        assert reader.wait(60) == 0


@pytest.mark.parametrize(
    "point",
    ["PackWriter.append", "PackWriter.sync", "LocationIndex.add", "compaction._remove", "Path.unlink", "sync_folder"],
)
@pytest.mark.parametrize("before", [True, False])
def test_a_killed_compaction_loses_nothing(folder: Path, point: str, before: bool) -> None:
    script = (
        "import os, signal; from pathlib import Path\n"
        "from compllm_rag.store import compaction; from compllm_rag.store.compaction import *\n"
        "from compllm_rag.store.index import LocationIndex\n"
        "home, name = (compaction, sys.argv[2]) if '.' not in sys.argv[2] else sys.argv[2].split('.')\n"
        "home = globals().get(home, home)\n"
        "real = getattr(home, name)\n"
        "def dying(*args, **kwargs):\n"
        "    if sys.argv[3] == 'False': real(*args, **kwargs)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "store = DiskStore(sys.argv[1], hidden_size=HIDDEN, pack_bytes=2000)\n"
        "live = {key(number) for number in range(0, 100, 2)}\n"
        "setattr(home, name, dying)\n"
        "store.compact(lambda keys: [name in live for name in keys])\n"
    )
    done = subprocess.run(python(script, folder, point, before), capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checked(folder).damage == []
    with opened(folder, read_only=True) as store:
        assert all(same(store.get([key(number)])[0], number) for number in range(0, 100, 2))
    with opened(folder) as store:
        assert store.put(records([200])) == 1
        assert store.compact(live).records == 51
    assert holds(folder, range(0, 100, 2))
    after = checked(folder)
    assert (after.damage, after.dead_bytes, after.sound.records) == ([], 0, 51)


def test_a_full_disk_stops_a_compaction_and_nothing_else(folder: Path) -> None:
    script = (
        "import resource; from compllm_rag.errors import StoreFullError\n"
        "store = DiskStore(sys.argv[1], hidden_size=HIDDEN, pack_bytes=20_000)\n"
        "live = {key(number) for number in range(0, 100, 2)}\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2500, resource.RLIM_INFINITY))\n"
        "try: store.compact(lambda keys: [name in live for name in keys])\n"
        "except StoreFullError: print('full')\n"
        "print(all(same(store.get([key(n)])[0], n) for n in range(100)))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "print(store.compact(lambda keys: [name in live for name in keys]).records); store.close()"
    )
    done = subprocess.run(python(script, folder), capture_output=True, text=True, check=False)
    assert done.stdout == "full\nTrue\n50\n", done.stderr
    assert checked(folder).damage == []
    assert holds(folder, range(0, 100, 2))


def test_who_may_not_compact(folder: Path) -> None:
    with opened(folder, read_only=True) as reader, pytest.raises(StoreReadOnlyError):
        reader.compact(live)
    with opened(folder) as one, opened(folder) as two:
        one.put(records([300]))
        with pytest.raises(StoreLockedError, match=f"process {os.getpid()}"):
            two.compact(live)
        one.flush()
        assert two.compact(live).records == 51


def damaged(folder: Path, kind: str) -> None:
    pack = folder / "packs" / packs(folder)[1]
    data = bytearray(pack.read_bytes())
    if kind == "payload":
        data[-1] ^= 1
        pack.write_bytes(data)
    elif kind == "header":
        data[3] ^= 1
        pack.write_bytes(data)
    elif kind == "cut":
        pack.write_bytes(data[:-1])
    elif kind == "gone":
        pack.unlink()
    else:
        statements = {
            "row": "UPDATE Cache SET value = x'00' WHERE key = ?",
            "planted": "UPDATE Cache SET mode = 4 WHERE key = ?",
            "foreign": "UPDATE Cache SET key = 'letter' WHERE key = ?",
        }
        with sqlite3.connect(folder / "index" / "cache.db") as connection:
            assert connection.execute(statements[kind], (key(3),)).rowcount == 1
        connection.close()


@pytest.mark.parametrize(
    ("kind", "deep_only"),
    [
        ("payload", True),
        ("header", False),
        ("cut", False),
        ("gone", False),
        ("row", False),
        ("planted", False),
        ("foreign", False),
    ],
)
def test_verification_finds_damage_and_removal_ends_it(folder: Path, kind: str, deep_only: bool) -> None:
    damaged(folder, kind)
    assert bool(checked(folder, deep=False).damage) != deep_only
    found = checked(folder)
    assert found.damage
    assert 1 <= len(found.damaged_rows) < 50
    assert found.sound.records == 100 - len(found.damaged_rows)
    with opened(folder) as store:
        for number, there in enumerate(store.contains([key(n) for n in range(100)]) if kind == "foreign" else []):
            assert there == (number != 3)
        with pytest.raises(CorruptRecordError):
            store.compact(lambda keys: [False] * len(keys)) if kind == "foreign" else store.get(
                list(map(key, range(100)))
            )
        store.remove(found.damaged_rows, found.sound)
        missing = [n for n, there in enumerate(store.contains([key(n) for n in range(100)])) if not there]
        assert len(missing) == len(found.damaged_rows)
        assert store.put(records(missing)) == len(missing)
        store.compact()
    assert checked(folder).damage == []
    assert holds(folder, range(100))


def test_flipped_dead_bytes_fail_sha256_alone(folder: Path) -> None:
    with opened(folder) as store:
        place = dict(store.iter_records())[key(0)]
        check = store.verify()
        with sqlite3.connect(folder / "index" / "cache.db") as connection:
            (row,) = connection.execute("SELECT rowid FROM Cache WHERE key = ?", (key(0),)).fetchone()
        left = check.sound.__class__(
            check.sound.records - 1,
            check.sound.concepts - place.n_concepts,
            check.sound.payload_bytes - place.n_concepts * HIDDEN * 2,
        )
        store.remove([row], left)
    pack = folder / "packs" / f"{place.pack:06d}.pack"
    data = bytearray(pack.read_bytes())
    data[place.offset] ^= 1
    pack.write_bytes(data)
    assert checked(folder, deep=False).damage == []
    assert ["SHA-256" in damage.what for damage in checked(folder).damage] == [True]


def test_records_taken_away_behind_our_back_are_noticed_at_once(folder: Path) -> None:
    with sqlite3.connect(folder / "index" / "cache.db") as connection:
        connection.execute("DELETE FROM Cache WHERE key = ?", (key(3),))
    connection.close()
    for read_only in (True, False):
        with pytest.raises(CorruptRecordError, match="99 records where 100 were written"):
            opened(folder, read_only=read_only)


def test_verification_is_not_misled_by_a_writer(folder: Path) -> None:
    script = (
        "for start in range(200, 10**6, 20):\n"
        "    with DiskStore(sys.argv[1], hidden_size=HIDDEN, pack_bytes=2000) as store:\n"
        "        store.put(records(range(start, start + 20)))\n"
        "    if start == 200: print('go', flush=True)\n"
    )
    with started(python(script, folder)) as writer:
        assert said(writer) == "go"
        seen = []
        while len(seen) < 15 or seen[-1] == seen[0]:
            assert writer.poll() is None
            check = checked(folder)
            assert check.damage == []
            seen.append(check.sound.records)
        assert seen == sorted(seen)


def test_a_compaction_meanwhile_is_no_error_of_a_verification(folder: Path) -> None:
    """It is told as damage, and `verify_storage` looks again; that of a pack that is gone for good stays."""
    done: list[bool] = []

    def compact(message: str, share: float | None) -> None:
        if message == "checking packs" and not done:
            done.append(True)
            with opened(folder) as writer:
                writer.compact(live)

    with opened(folder, read_only=True) as store:
        found = store.verify(deep=True, progress=compact)
        assert any("the pack is gone" in damage.what for damage in found.damage)
        assert store.verify(deep=True).damage == []
    (folder / "packs" / packs(folder)[0]).unlink()
    assert checked(folder).damage and checked(folder, deep=False).damage


def test_verification_writes_nothing(folder: Path) -> None:
    def state() -> dict[str, bytes]:
        files = (p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(("-wal", "-shm")))
        return {str(path): path.read_bytes() for path in files}

    before = state()
    assert checked(folder).sound.records == 100
    assert state() == before
