"""What all stores promise."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compllm_rag.errors import ConfigurationError, InvalidConceptsError
from compllm_rag.store import ConceptStore, DiskStore, MemoryStore, RedisStore
from tests.processes import join
from tests.store.store_samples import HIDDEN, concepts, key, records, same


@pytest.fixture(params=["memory", "disk", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ConceptStore]:
    """An empty store of each kind."""
    if request.param == "memory":
        made: ConceptStore = MemoryStore(HIDDEN)
    elif request.param == "disk":
        made = DiskStore(tmp_path / "store", hidden_size=HIDDEN)
    else:
        server = request.getfixturevalue("shared_redis")
        made = RedisStore(server.url, hidden_size=HIDDEN, space=uuid.uuid4().hex)
    with made:
        yield made


def test_what_is_put_is_got_in_the_order_asked(store: ConceptStore) -> None:
    assert store.put(records(range(20))) == 20
    asked = [3, 99, 0, 19, 3]
    found = store.get([key(number) for number in asked])
    assert found[1] is None
    assert all(same(tensor, number) for tensor, number in zip(found, asked, strict=True) if number != 99)


def test_a_key_is_stored_once_and_the_first_stays(store: ConceptStore) -> None:
    assert store.put([*records([1, 2]), (key(1), torch.zeros(2, HIDDEN))]) == 2
    assert store.put([(key(2), torch.zeros(3, HIDDEN)), *records([3])]) == 1
    assert same(store.get([key(1)])[0], 1)
    assert same(store.get([key(2)])[0], 2)
    expected = sum(concepts(number).shape[0] for number in (1, 2, 3))
    stats = store.stats()
    assert (stats.records, stats.concepts, stats.payload_bytes) == (3, expected, expected * HIDDEN * 2)


@pytest.mark.parametrize(
    "order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 1], [0, 1, 3, 4, 0, 1], [7, 0, 1, 2, 2, 6], []], ids=str
)
def test_joined_keeps_order_with_gaps_and_repeats(store: ConceptStore, order: list[int]) -> None:
    store.put(records(range(8)))
    joined = store.get_joined([key(number) for number in order])
    expected = torch.cat([torch.empty(0, HIDDEN), *(concepts(number) for number in order)])
    assert joined is not None
    assert joined.dtype == torch.float16
    assert torch.equal(joined.float(), expected)


def test_joined_is_none_when_one_is_missing(store: ConceptStore) -> None:
    store.put(records([1, 2]))
    assert store.get_joined([key(1), key(3), key(2)]) is None


def test_hits_and_misses_are_counted_by_reads_alone(store: ConceptStore) -> None:
    store.put(records([1, 2]))
    assert store.contains([key(2), key(5), key(1)]) == [True, False, True]
    store.get([key(1), key(5)])
    store.get_joined([key(1), key(2), key(6)])
    stats = store.stats()
    assert (stats.hits, stats.misses) == (3, 2)


def test_what_is_got_is_the_callers_own(store: ConceptStore) -> None:
    store.put(records([1, 2]))
    for found in (*store.get([key(1), key(1)]), store.get_joined([key(1), key(2)])):
        assert found is not None
        found.zero_()
    assert same(store.get([key(1)])[0], 1)


@pytest.mark.parametrize(
    "bad",
    [
        torch.ones(HIDDEN),
        torch.ones(2, HIDDEN + 1),
        torch.ones(0, HIDDEN),
        torch.ones(1, 2, HIDDEN),
        torch.ones(2, HIDDEN, dtype=torch.int64),
        torch.full((2, HIDDEN), float("nan")),
        torch.full((2, HIDDEN), float("-inf")),
        torch.full((2, HIDDEN), 70000.0),
        torch.full((2, HIDDEN), -1e30, dtype=torch.bfloat16),
        torch.ones(2, HIDDEN).to_sparse(),
        torch.ones(2, HIDDEN, device="meta"),
        [[1.0] * HIDDEN],
    ],
    ids=["1d", "wide", "empty", "3d", "int", "nan", "inf", "overflow", "overflow-bf16", "sparse", "meta", "list"],
)
def test_bad_concepts_are_refused_and_earlier_ones_stay(store: ConceptStore, bad: torch.Tensor) -> None:
    with pytest.raises(InvalidConceptsError, match=key(7)):
        store.put([*records([1]), (key(7), bad), *records([2])])
    assert store.contains([key(1), key(7), key(2)]) == [True, False, False]


@pytest.mark.parametrize("bad", ["", "../x", "A" * 64, "0" * 63, "0" * 64 + "\n", "é" * 64, 7, None], ids=repr)
def test_keys_that_are_none_are_refused(store: ConceptStore, bad: str) -> None:
    for call in (store.contains, store.get, store.get_joined):
        with pytest.raises(ConfigurationError):
            call([key(1), bad])
    with pytest.raises(ConfigurationError):
        store.put([(bad, torch.ones(1, HIDDEN))])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_floating_dtype_and_stride_is_taken(store: ConceptStore, dtype: torch.dtype) -> None:
    made = torch.randn(HIDDEN, 3, generator=torch.Generator().manual_seed(1)).to(dtype).T.requires_grad_()
    store.put([(key(1), made)])
    assert torch.equal(store.get([key(1)])[0], made.detach().half())


@pytest.mark.parametrize("hidden_size", [0, -1, True, 2.0])
def test_senseless_hidden_size_is_refused(tmp_path: Path, hidden_size: int) -> None:
    with pytest.raises(ConfigurationError):
        MemoryStore(hidden_size)
    with pytest.raises(ConfigurationError):
        DiskStore(tmp_path / "store", hidden_size=hidden_size)
    assert not (tmp_path / "store").exists()


def test_threads_share_a_store(store: ConceptStore) -> None:
    wrong: list[int] = []

    def work(part: int) -> None:
        for number in range(part, part + 40):
            store.put(records([number]))
            if not same(store.get([key(number)])[0], number):
                wrong.append(number)
            if number % 10 == 0:
                store.flush()

    threads = [threading.Thread(target=work, args=(20 * part,), daemon=True) for part in range(4)]
    for thread in threads:
        thread.start()
    join(threads)
    assert not wrong
    assert store.stats().records == 100


def test_put_may_read_the_store_it_writes_to(store: ConceptStore) -> None:
    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(600):
            if number == 500:
                assert store.contains([key(0)]) == [True]
            yield key(number), concepts(number)

    assert store.put(stream()) == 600


_FINITE = hnp.arrays(
    "float16",
    st.tuples(st.integers(1, 6), st.just(HIDDEN)),
    elements=st.floats(allow_nan=False, allow_infinity=False, width=16),
)


@given(batches=st.lists(st.lists(_FINITE, max_size=6), max_size=4), pack_bytes=st.integers(1, 4000))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip_is_bit_exact(tmp_path_factory: pytest.TempPathFactory, batches: list, pack_bytes: int) -> None:
    folder = tmp_path_factory.mktemp("round")
    flat = [torch.from_numpy(array.copy()) for batch in batches for array in batch]
    memory = MemoryStore(HIDDEN)
    with DiskStore(folder, hidden_size=HIDDEN, pack_bytes=pack_bytes) as disk:
        number = 0
        for batch in batches:
            pairs = [(key(number + index), torch.from_numpy(array)) for index, array in enumerate(batch)]
            number += len(pairs)
            assert disk.put(pairs) == memory.put(pairs) == len(pairs)
    keys = [key(index) for index in range(number)]
    with DiskStore(folder, hidden_size=HIDDEN, read_only=True) as disk:
        for found in (disk.get(keys), memory.get(keys)):
            assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(found, flat, strict=True))
        assert torch.equal(disk.get_joined(keys), memory.get_joined(keys))
