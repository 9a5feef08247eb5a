"""What the index remembers of where records lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compllm_rag.store import DiskStore, index
from tests.store.store_samples import HIDDEN, concepts, key, records

N = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with DiskStore(tmp_path / "s", hidden_size=HIDDEN) as store:
        store.put(records(range(N)))
    return tmp_path / "s"


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that were asked of the database."""
    asked, real = list[str](), index.LocationIndex._looked_up

    def counted(self: index.LocationIndex, keys: list[str]) -> dict[str, index.Location]:
        asked.extend(keys)
        return real(self, keys)

    monkeypatch.setattr(index.LocationIndex, "_looked_up", counted)
    return asked


def test_what_was_found_is_not_looked_up_again(folder: Path, looked_up: list[str]) -> None:
    with DiskStore(folder, hidden_size=HIDDEN, read_only=True) as store:
        for wanted in (range(10), range(5, 15), [3, 3, 12]):
            assert store.get_joined([key(n) for n in wanted]) is not None
    assert looked_up == [key(n) for n in range(15)]


def test_a_miss_is_looked_up_each_time(folder: Path) -> None:
    with (
        DiskStore(folder, hidden_size=HIDDEN) as writer,
        DiskStore(folder, hidden_size=HIDDEN, read_only=True) as store,
    ):
        assert store.get_joined([key(N)]) is None
        writer.put(records([N]))
        writer.flush()
        assert store.get_joined([key(N)]) is not None


def test_a_compaction_elsewhere_makes_it_forget(folder: Path, looked_up: list[str]) -> None:
    wanted = [key(n) for n in range(1, N, 2)]
    with DiskStore(folder, hidden_size=HIDDEN, read_only=True) as store:
        assert store.get_joined(wanted) is not None
        with DiskStore(folder, hidden_size=HIDDEN) as writer:
            assert writer.compact(lambda keys: [k in wanted for k in keys]).packs_removed
        looked_up.clear()
        assert torch.equal(store.get_joined(wanted), torch.cat([concepts(n) for n in range(1, N, 2)]).half())
        assert looked_up == wanted
        assert store.get([key(0)]) == [None]


def test_memory_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_REMEMBERED", 8)
    with DiskStore(folder, hidden_size=HIDDEN, read_only=True) as store:
        for wanted in (range(N), range(6), range(3, 9), range(N)):
            expected = torch.cat([concepts(n) for n in wanted]).half()
            assert torch.equal(store.get_joined([key(n) for n in wanted]), expected)
            assert len(store._index._known) <= 8
