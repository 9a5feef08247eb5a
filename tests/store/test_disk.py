"""The durable store: what outlives it, who may write, what it takes on disk."""

from __future__ import annotations

import json
import stat
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from compllm_rag.errors import (
    ConfigurationError,
    CorruptRecordError,
    StorageMismatchError,
    StorageNotFoundError,
    StoreFullError,
    StoreLockedError,
    StoreReadOnlyError,
    UnsupportedFormatError,
)
from compllm_rag.store import DiskStore
from tests.processes import said, started
from tests.store.store_samples import HIDDEN, concepts, key, python, records, same


def test_closed_store_reads_back_in_a_new_instance(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "a" / "store", hidden_size=HIDDEN) as store:
        store.put(records(range(50)))
    with DiskStore(tmp_path / "a" / "store", hidden_size=HIDDEN) as store:
        assert all(same(found, number) for number, found in enumerate(store.get([key(n) for n in range(50)])))
        assert store.put(records(range(45, 55))) == 5
        assert store.stats().records == 55


def test_another_process_reads_what_was_flushed(tmp_path: Path) -> None:
    script = (
        "store = DiskStore(sys.argv[1], hidden_size=HIDDEN, read_only=True)\n"
        "print([same(store.get([key(n)])[0], n) for n in (1, 2)])"
    )
    with DiskStore(tmp_path / "store", hidden_size=HIDDEN) as store:
        store.put(records([1]))
        store.flush()
        store.put(records([2]))
        done = subprocess.run(python(script, tmp_path / "store"), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[True, False]"


def test_open_reader_sees_later_flushes_and_new_packs(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store", hidden_size=HIDDEN, pack_bytes=500) as writer:
        writer.put(records([0]))
        writer.flush()
        with DiskStore(tmp_path / "store", hidden_size=HIDDEN, read_only=True) as reader:
            for number in range(1, 30):
                assert same(reader.get([key(number - 1)])[0], number - 1)
                writer.put(records([number]))
                assert reader.get([key(number)]) == [None]
                writer.flush()
            assert reader.stats().records == 30
            joined = reader.get_joined([key(number) for number in range(30)])
    assert torch.equal(joined.float(), torch.cat([concepts(number) for number in range(30)]))
    assert len(list((tmp_path / "store" / "packs").iterdir())) > 3


def test_segments_put_together_lie_together(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store", hidden_size=HIDDEN) as store:
        store.put(records(range(12)))
        store.flush()
        places = [place for _, place in store.iter_records()]
        assert [name for name, _ in store.iter_records()] == [key(number) for number in range(12)]
    for before, after in pairwise(places):
        assert after.offset == before.offset + before.n_concepts * HIDDEN * 2


def test_many_records_are_flushed_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compllm_rag.store.writing._FLUSH_RECORDS", 300)
    with DiskStore(tmp_path / "store", hidden_size=HIDDEN) as store:
        store.put(records(range(600)))
        with DiskStore(tmp_path / "store", hidden_size=HIDDEN, read_only=True) as reader:
            assert reader.stats().records == 512


def test_check_finds_what_is_there(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store", hidden_size=HIDDEN) as store:
        store.put(records([1]))
        assert store.check(key(1))
        assert not store.check(key(2))
        assert store.stats().hits == 0


def test_nobody_else_may_look_in(tmp_path: Path) -> None:
    existing = tmp_path / "store"
    existing.mkdir(mode=0o755)
    with DiskStore(existing, hidden_size=HIDDEN) as store:
        store.put(records([1]))
        store.flush()
        for path in [existing, *existing.rglob("*")]:
            expected = 0o700 if path.is_dir() else 0o600
            assert stat.S_IMODE(path.stat().st_mode) == expected, path
        assert (existing / "index" / "cache.db-wal").exists()


def test_second_writer_is_told_who_writes(tmp_path: Path) -> None:
    script = "store = DiskStore(sys.argv[1], hidden_size=HIDDEN); store.put(records([1]))"
    script += "; print('open', flush=True); sys.stdin.read()"
    with started(python(script, tmp_path / "store")) as child:
        assert said(child) == "open"
        with (
            DiskStore(tmp_path / "store", hidden_size=HIDDEN) as store,
            pytest.raises(StoreLockedError, match=f"process {child.pid} "),
        ):
            store.put(records([2]))
        DiskStore(tmp_path / "store", hidden_size=HIDDEN, read_only=True).close()
    with DiskStore(tmp_path / "store", hidden_size=HIDDEN) as store:
        assert store.put(records([2])) == 1  # the lock of a dead process is no lock


def test_two_writers_in_one_process_take_turns(tmp_path: Path) -> None:
    first, second = (DiskStore(tmp_path / "store", hidden_size=HIDDEN) for _ in range(2))
    first.put(records([1, 2]))
    with pytest.raises(StoreLockedError):
        second.put(records([2, 3]))
    first.flush()
    assert second.put(records([2, 3])) == 1
    second.flush()
    assert first.put(records([3, 4])) == 1
    first.flush()
    for store in (first, second):
        assert store.stats().records == 4
        for found, number in zip(store.get([key(n) for n in (1, 2, 3, 4)]), (1, 2, 3, 4), strict=True):
            assert torch.equal(found.float(), concepts(number))
    second.close()
    first.close()
    first.close()
    DiskStore(tmp_path / "store", hidden_size=HIDDEN).close()
    for call in (first.flush, first.stats, lambda: first.get([key(1)]), lambda: first.put(records([1]))):
        with pytest.raises(ConfigurationError, match="closed"):
            call()


def test_another_process_that_closes_takes_no_journal_away(tmp_path: Path) -> None:
    """Opening and closing the file of an SQLite database drops the locks of all connections this process has to it."""
    script = (
        "with DiskStore(sys.argv[1], hidden_size=HIDDEN) as store:\n"
        "    store.put(records([2])); store.flush(); print('open', flush=True); sys.stdin.read()"
    )
    with (
        DiskStore(tmp_path / "store", hidden_size=HIDDEN) as store,
        started(python(script, tmp_path / "store")) as other,
    ):
        store.put(records([1]))
        store.flush()
        assert said(other) == "open"
        DiskStore(tmp_path / "store", hidden_size=HIDDEN).close()
        other.stdin.close()
        assert other.wait(60) == 0
        store.put(records([3]))
        store.flush()
        with DiskStore(tmp_path / "store", hidden_size=HIDDEN, read_only=True) as reader:
            assert reader.stats().records == 3
    with DiskStore(tmp_path / "store", hidden_size=HIDDEN, read_only=True) as reader:
        assert all(same(reader.get([key(n)])[0], n) for n in (1, 2, 3))


def test_reader_needs_a_store_and_makes_none(tmp_path: Path) -> None:
    with pytest.raises(StorageNotFoundError):
        DiskStore(tmp_path / "none", hidden_size=HIDDEN, read_only=True)
    assert not (tmp_path / "none").exists()
    DiskStore(tmp_path / "store", hidden_size=HIDDEN).close()
    with DiskStore(tmp_path / "store", hidden_size=HIDDEN, read_only=True) as store:
        with pytest.raises(StoreReadOnlyError):
            store.put(records([1]))
        with pytest.raises(StoreReadOnlyError):
            store.put([])
        store.flush()


@pytest.mark.parametrize("read_only", [True, False])
def test_other_width_is_refused_with_both_numbers(tmp_path: Path, read_only: bool) -> None:
    DiskStore(tmp_path / "store", hidden_size=HIDDEN).close()
    with pytest.raises(StorageMismatchError, match=rf"hidden_size {HIDDEN} .*expected hidden_size 24"):
        DiskStore(tmp_path / "store", hidden_size=24, read_only=read_only)
    DiskStore(tmp_path / "store", hidden_size=HIDDEN).close()  # and the refusal left no lock


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"format_version": 2}, UnsupportedFormatError),
        ({"encoding": "int3"}, UnsupportedFormatError),
        ({"hidden_size": "16"}, CorruptRecordError),
        ({"extra": 1}, CorruptRecordError),
        (None, CorruptRecordError),
    ],
)
@pytest.mark.parametrize("read_only", [True, False])
def test_foreign_or_damaged_manifest_is_refused(
    tmp_path: Path, change: dict[str, object] | None, error: type[Exception], read_only: bool
) -> None:
    DiskStore(tmp_path / "store", hidden_size=HIDDEN).close()
    manifest = tmp_path / "store" / "store.json"
    changed = json.dumps(json.loads(manifest.read_text()) | change) if change else manifest.read_text()[:20]
    manifest.write_text(changed)
    with pytest.raises(error):
        DiskStore(tmp_path / "store", hidden_size=HIDDEN, read_only=read_only)


def test_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(StorageMismatchError):
        DiskStore(tmp_path, hidden_size=HIDDEN)
    with pytest.raises(StorageMismatchError):
        DiskStore(tmp_path / "letter.txt", hidden_size=HIDDEN)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_creation_cut_short_is_taken_up(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store", hidden_size=HIDDEN):
        pass
    (tmp_path / "store" / "store.json").rename(tmp_path / "store" / "store.json.tmp")
    with DiskStore(tmp_path / "store", hidden_size=HIDDEN) as store:
        assert store.put(records([1])) == 1


def test_size_limit_refuses_and_evicts_nothing(tmp_path: Path) -> None:
    limit = 2000
    with DiskStore(tmp_path / "store", hidden_size=HIDDEN, max_bytes=limit, pack_bytes=700) as store:
        with pytest.raises(StoreFullError, match="max_bytes"):
            store.put(records(range(100)))
        kept = [number for number in range(100) if store.contains([key(number)])[0]]
        assert kept == list(range(len(kept)))
        assert len(kept) > 5
        with pytest.raises(StoreFullError):
            store.put(records(range(100)))
    used = sum(path.stat().st_size for path in (tmp_path / "store" / "packs").iterdir())
    assert limit - 5 * HIDDEN * 2 - 64 <= used <= limit
    with DiskStore(tmp_path / "store", hidden_size=HIDDEN) as store:
        assert all(same(store.get([key(number)])[0], number) for number in kept)
        assert store.put(records(range(100))) == 100 - len(kept)


def test_variables_in_the_path_are_not_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELSEWHERE", "elsewhere")
    with pytest.raises(ConfigurationError, match="variable"):
        DiskStore(tmp_path / "$ELSEWHERE", hidden_size=HIDDEN)
    assert not (tmp_path / "elsewhere").exists()
    with DiskStore(tmp_path / "a?b #c%20 $d", hidden_size=HIDDEN) as store:
        store.put(records([1]))
    with DiskStore(tmp_path / "a?b #c%20 $d", hidden_size=HIDDEN, read_only=True) as store:
        assert same(store.get([key(1)])[0], 1)


@pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"pack_bytes": 0}])
def test_senseless_limits_are_refused(tmp_path: Path, limits: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError):
        DiskStore(tmp_path / "store", hidden_size=HIDDEN, **limits)


@pytest.mark.parametrize("encoding", ["fp16", "int4"])
def test_records_of_another_store_are_taken_over_as_they_are(tmp_path: Path, encoding: str) -> None:
    for name, numbers in (("a", range(30)), ("b", range(20, 60))):
        with DiskStore(tmp_path / name, hidden_size=HIDDEN, encoding=encoding) as store:
            store.put(records(numbers))
    with DiskStore(tmp_path / "all", hidden_size=HIDDEN, encoding=encoding) as store:
        store.put(records(range(60)))
    with DiskStore(tmp_path / "a", hidden_size=HIDDEN) as store:
        with DiskStore(tmp_path / "b", hidden_size=HIDDEN, read_only=True) as other:
            assert store.merge(other) == 30
            assert store.merge(other) == 0
        assert not store.verify(deep=True).damage
    packs = [[pack.read_bytes() for pack in (tmp_path / name / "packs").iterdir()] for name in ("a", "all")]
    assert packs[0] == packs[1]


def test_only_sound_records_of_the_same_kind_are_taken_over(tmp_path: Path) -> None:
    with (
        DiskStore(tmp_path / "a", hidden_size=HIDDEN) as store,
        DiskStore(tmp_path / "b", hidden_size=HIDDEN, encoding="int8") as other,
        pytest.raises(StorageMismatchError, match="int8"),
    ):
        store.merge(other)
    with DiskStore(tmp_path / "c", hidden_size=HIDDEN) as other:
        other.put(records(range(9)))
    pack = next((tmp_path / "c" / "packs").iterdir())
    pack.write_bytes(pack.read_bytes()[:-1] + b"?")
    with DiskStore(tmp_path / "a", hidden_size=HIDDEN) as store:
        with DiskStore(tmp_path / "c", hidden_size=HIDDEN, read_only=True) as other, pytest.raises(CorruptRecordError):
            store.merge(other)
        assert store.stats().records == 0
