"""Reading of packs in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compllm_rag.errors import CorruptRecordError, InvalidConceptsError
from compllm_rag.store import DiskStore, reading
from compllm_rag.store.packs import HEADER_BYTES
from tests.store.store_samples import HIDDEN, concepts, key, records

N = 200


@pytest.fixture(params=[1, 300, 2**22], ids="pieces of {} bytes".format)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A store of several packs, read in pieces however small it is."""
    monkeypatch.setattr(reading, "_PIECE", request.param)
    with DiskStore(tmp_path / "s", hidden_size=HIDDEN, pack_bytes=4000) as store:
        for number in range(0, N, 20):
            store.put(records(range(number, number + 20)))
    return tmp_path / "s"


@pytest.mark.parametrize(
    "order", [range(N), range(N - 1, -1, -1), [7, 7, 8, 150, 9, 10, 10]], ids=["on", "back", "mixed"]
)
def test_order_and_values_are_kept(folder: Path, order: list[int]) -> None:
    with DiskStore(folder, hidden_size=HIDDEN, read_only=True) as store:
        joined = store.get_joined([key(number) for number in order])
    assert torch.equal(joined, torch.cat([concepts(number) for number in order]).half())


def test_damage_is_named_whichever_piece_it_lies_in(folder: Path) -> None:
    with DiskStore(folder, hidden_size=HIDDEN, read_only=True) as store:
        at = dict(store.iter_records())[key(130)]
    path = folder / "packs" / f"{at.pack:06d}.pack"
    data = bytearray(path.read_bytes())
    data[at.offset + 1] ^= 1
    path.write_bytes(data)
    with DiskStore(folder, hidden_size=HIDDEN, read_only=True) as store:
        with pytest.raises(CorruptRecordError, match=key(130)):
            store.get_joined([key(number) for number in range(N)])
        assert store.get_joined([key(number) for number in range(130)]) is not None


def test_values_that_are_no_concepts_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, DiskStore(folder, hidden_size=HIDDEN) as store:
        patch.setattr("compllm_rag.store.codec.check_finite", lambda half: None)
        store.put([(key(N), torch.full((2, HIDDEN), float("inf")))])
    reader = DiskStore(folder, hidden_size=HIDDEN, read_only=True)
    with reader, pytest.raises(InvalidConceptsError, match=key(N)):
        reader.get_joined([key(number) for number in range(N + 1)])


def test_a_pack_that_is_shortened_while_it_is_open_is_refused(folder: Path) -> None:
    with DiskStore(folder, hidden_size=HIDDEN, read_only=True) as store:
        keys = [key(number) for number in range(N)]
        assert store.get_joined(keys) is not None
        for path in (folder / "packs").iterdir():
            with path.open("r+b") as file:
                file.truncate(HEADER_BYTES + 1)
        with pytest.raises(CorruptRecordError):
            store.get_joined(keys)
