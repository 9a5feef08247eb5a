"""Encodings of deep concepts: places and outliers survive exactly, the rest as well as in the base encoding."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compllm_rag.errors import ConfigurationError, CorruptRecordError, InvalidConceptsError, StorageMismatchError
from compllm_rag.store import DiskStore, MemoryStore
from compllm_rag.store.encodings import ENCODINGS, deep_encoding, encoding_named, encoding_tagged
from tests.store.store_samples import key

BASES = ("int8", "int4")
DEEP = ("int8-deep", "int4-deep")
WIDTHS = [1, 2, 3, 4, 5, 31, 32, 33, 64, 65, 576, 640]  # of states; stores are one wider
MOST = 65504.0
KEPT = 4

states = hnp.arrays(
    "float16",
    st.tuples(st.integers(1, 4), st.integers(1, 70)),
    elements=st.floats(-MOST, MOST, width=16) | st.floats(-1, 1, width=16) | st.sampled_from([0.0, 2.0, -2.0]),
)


def deep(n: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows (n, width + 1): states of RMS 7, a few values of each many times larger, and places."""
    generator = torch.Generator().manual_seed(seed)
    rows = 7 * torch.randn(n, width + 1, generator=generator)
    at = torch.stack([torch.randperm(width, generator=generator)[:3] for _ in range(n)])
    rows.scatter_(1, at, 100 * torch.randn(at.shape, generator=generator))
    rows[:, -1] = torch.randint(0, 2048, (n,), generator=generator).float()
    return rows


def decoded(name: str, payload: bytes, n: int, hidden_size: int) -> torch.Tensor:
    return encoding_named(name).decode(np.frombuffer(bytearray(payload), np.uint8), n, hidden_size)


def kept(values: torch.Tensor) -> torch.Tensor:
    """Columns (n, at most 4) of the largest magnitudes of states (n, width), of equal ones the earlier."""
    return values.abs().argsort(dim=1, descending=True, stable=True)[:, :KEPT]


@given(states, st.integers(0, 2047))
@example(np.full((2, 33), MOST, np.float16), 2047)
@example(np.array([[-MOST, 1.0, MOST]], np.float16), 0)
@example(np.zeros((3, 9), np.float16), 1)
@settings(max_examples=150, deadline=None)
def test_places_and_outliers_survive_exactly_and_the_rest_as_in_the_base(array: np.ndarray, place: int) -> None:
    values = torch.from_numpy(array)
    at = kept(values)
    for base in BASES:
        found = encoding_named(f"{base}-deep").rounded(torch.nn.functional.pad(values, (0, 1), value=place))
        expected = encoding_named(base).rounded(values.scatter(1, at, 0.0)).scatter(1, at, values.gather(1, at))
        assert found.dtype == torch.float16 and torch.equal(found[:, :-1], expected)
        assert found[:, -1].tolist() == [place] * len(values)


def test_every_place_survives() -> None:
    rows = deep(2048, 8)
    rows[:, -1] = torch.arange(2048).float()
    for name in DEEP:
        assert torch.equal(encoding_named(name).rounded(rows)[:, -1], rows[:, -1].half())


@pytest.mark.parametrize("base", BASES)
def test_outliers_cost_the_other_values_nothing(base: str) -> None:
    rows = deep(200, 576)
    values = rows[:, :-1]
    error = encoding_named(f"{base}-deep").rounded(rows)[:, :-1].float() - values
    alone = encoding_named(base).rounded(values).float() - values
    assert float(error.square().mean().sqrt()) < 0.5 * float(alone.square().mean().sqrt())
    assert float(error.square().mean().sqrt()) < 7 * {"int8": 0.01, "int4": 0.1}[base]


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("width", WIDTHS)
def test_records_joined_decode_to_concepts_joined(name: str, width: int) -> None:
    encoding = encoding_named(name)
    parts = [deep(n, width, n) for n in (1, 3, 2)]
    payloads = [encoding.encode(part) for part in parts]
    assert [len(payload) for payload in payloads] == [encoding.nbytes(n, width + 1) for n in (1, 3, 2)]
    joined = decoded(name, b"".join(payloads), 6, width + 1)
    assert torch.equal(joined, torch.cat([encoding.rounded(part) for part in parts]))
    assert torch.equal(joined, encoding.rounded(torch.cat(parts)))
    assert decoded(name, b"", 0, width + 1).shape == (0, width + 1)
    assert encoding.encode(parts[1]) == encoding.encode(parts[1].half()) == encoding.encode(parts[1].half().double())


@pytest.mark.parametrize("base", BASES)
def test_a_row_takes_eighteen_bytes_more_than_in_the_base(base: str) -> None:
    for width in (4, 576, 4096):
        expected = 7 * (18 + encoding_named(base).nbytes(1, width))
        assert encoding_named(f"{base}-deep").nbytes(7, width + 1) == expected


def test_int8_deep_is_the_format_that_its_page_describes() -> None:
    # Of four values of magnitude 63.5 besides the largest, the last is no outlier.
    row = [63.5, 0.5, -1000.0, -63.5, 0.0, 63.5, -63.5, -1.0, 1234.0]
    payload = struct.pack("<H4H4e", 1234, 0, 2, 3, 5, 63.5, -1000.0, -63.5, 63.5)
    payload += struct.pack("<f8b", 0.5, 0, 1, 0, 0, 0, 0, -127, -2)
    assert encoding_named("int8-deep").encode(torch.tensor([row])) == payload
    assert decoded("int8-deep", payload, 1, 9).tolist() == [row]


def test_int4_deep_is_the_format_that_its_page_describes() -> None:
    rest = struct.pack("<f1b3B", 0.25, -4, 8 | 9 << 4, 8 | 8 << 4, 8 | 0 << 4)
    payload = struct.pack("<H4H4e", 2047, 0, 2, 3, 4, 100.0, -50.0, 25.0, -12.5) + rest
    # What the base says of an outlier's column does not count.
    assert decoded("int4-deep", payload, 1, 7).tolist() == [[100.0, -1.0, -50.0, 25.0, -12.5, 8.0, 2047.0]]
    assert decoded("int4-deep", payload[:-1] + b"\x07", 1, 7).tolist()[0][4:] == [-12.5, 8.0, 2047.0]


def test_states_narrower_than_the_outliers_are_kept_whole() -> None:
    payload = struct.pack("<H2H2ef2b", 5, 0, 1, 1.5, -3.0, 0.0, 0, 0)
    assert encoding_named("int8-deep").encode(torch.tensor([[1.5, -3.0, 5.0]])) == payload
    assert decoded("int8-deep", payload, 1, 3).tolist() == [[1.5, -3.0, 5.0]]


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 65536.0])
@pytest.mark.parametrize("at", [0, 32, 70])
def test_what_fp16_cannot_hold_is_refused(name: str, bad: float, at: int) -> None:
    rows = deep(3, 70)
    rows[1, at] = bad
    with pytest.raises(InvalidConceptsError):
        encoding_named(name).encode(rows)
    with pytest.raises(InvalidConceptsError):
        MemoryStore(71, encoding=name).put([("0" * 64, rows)])


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("place", [-1.0, 0.5, 2048.0, 1000.5, MOST])
def test_places_that_no_concept_has_are_not_written(name: str, place: float) -> None:
    rows = deep(3, 70)
    rows[1, -1] = place
    with pytest.raises(InvalidConceptsError, match=f"place {place}"):
        encoding_named(name).encode(rows)
    store = MemoryStore(71, encoding=name)
    with pytest.raises(InvalidConceptsError, match=r"record 0{64}.*place"):
        store.put([("0" * 64, rows)])


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize(
    ("at", "number", "text"),
    [
        (0, 2048, "place 2048"),
        (0, 65535, "place 65535"),
        (4, 70, "columns"),  # the last column, of a state 70 wide
        (4, 65535, "columns"),
        (1, 2, "columns"),  # the same as the second
        (2, 1, "columns"),
        (3, 1, "columns"),  # does not ascend
        (5, 0x7C00, "infinite"),
        (8, 0xFC00, "infinite"),
        (6, 0x7E00, "NaN"),
        (7, 0xFFFF, "NaN"),
    ],
)
def test_rows_that_no_writer_makes_are_refused(name: str, at: int, number: int, text: str) -> None:
    rows = torch.zeros(3, 71)
    rows[:, 1:5] = torch.tensor([900.0, 800.0, 700.0, 600.0])
    payload = bytearray(encoding_named(name).encode(rows))
    start = len(payload) // 3 + 2 * at  # the second row
    payload[start : start + 2] = struct.pack("<H", number)
    with pytest.raises(InvalidConceptsError, match=text):
        decoded(name, bytes(payload), 3, 71)


@pytest.mark.parametrize("name", DEEP)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_bytes_decode_to_finite_values_or_are_refused(name: str, data: st.DataObject) -> None:
    size = encoding_named(name).nbytes(1, 36)
    rest = data.draw(st.binary(min_size=size - 18, max_size=size - 18))
    columns = sorted(data.draw(st.sets(st.integers(0, 36), min_size=KEPT, max_size=KEPT)))
    values = data.draw(st.lists(st.integers(0, 2**16 - 1), min_size=KEPT, max_size=KEPT))
    if data.draw(st.booleans()):  # units at the edge of what fp16 can hold
        rest = struct.pack("<f", MOST / (127 if name == "int8-deep" else 8 * 127)) + rest[4:]
    payload = struct.pack("<9H", data.draw(st.integers(0, 2100)), *columns, *values) + rest
    try:
        found = decoded(name, payload, 1, 36)
    except InvalidConceptsError:
        return
    assert bool(found.isfinite().all()) and 0 <= float(found[0, -1]) <= 2047
    assert found[0, columns].view(torch.int16).tolist() == np.array(values, np.uint16).view(np.int16).tolist()


@pytest.mark.parametrize("name", DEEP)
@given(wrong=st.binary(max_size=300), n=st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_payloads_of_a_wrong_size_are_refused_before_anything_is_allocated(name: str, wrong: bytes, n: int) -> None:
    if len(wrong) != encoding_named(name).nbytes(n, 37):
        with pytest.raises(CorruptRecordError):
            decoded(name, wrong, n, 37)


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("hidden_size", [1, 2**16 + 2])
def test_widths_that_the_format_cannot_hold_are_refused(name: str, hidden_size: int) -> None:
    with pytest.raises(ConfigurationError, match=f"hidden_size {hidden_size}"):
        encoding_named(name).encode(torch.zeros(1, hidden_size))
    with pytest.raises(ConfigurationError):
        decoded(name, b"", 0, hidden_size)


def test_the_last_column_that_the_format_can_name() -> None:
    rows = torch.zeros(1, 2**16 + 1)
    rows[0, -2:] = torch.tensor([3.0, 9.0])
    for name in DEEP:
        assert torch.equal(encoding_named(name).rounded(rows), rows.half())


def test_users_choose_among_three_names_and_storages_among_five() -> None:
    assert list(ENCODINGS) == ["fp16", "int8", "int4"]
    assert [deep_encoding(name) for name in ENCODINGS] == ["fp16", *DEEP]
    assert [encoding_tagged(tag).name for tag in ("int8.d1", "int4.d1")] == list(DEEP)
    assert [encoding_named(name).tag for name in DEEP] == ["int8.d1", "int4.d1"]
    with pytest.raises(ConfigurationError, match="int3"):
        deep_encoding("int3")


@pytest.mark.parametrize("name", ["fp16", *DEEP])
def test_stores_write_read_verify_and_compact_deep_concepts(tmp_path: Path, name: str) -> None:
    encoding, keys = encoding_named(name), [key(number) for number in range(40)]
    made = [deep(1 + number % 5, 50, number) for number in range(40)]
    expected = [encoding.rounded(rows) for rows in made]
    memory = MemoryStore(51, encoding=name)
    memory.put(zip(keys, made, strict=True))
    with DiskStore(tmp_path / "s", hidden_size=51, encoding=name, pack_bytes=2000) as disk:
        for number in range(40):
            disk.put([(keys[number], made[number])])
            disk.flush()
    with DiskStore(tmp_path / "s", hidden_size=51, read_only=True) as disk:
        assert disk.encoding is memory.encoding is encoding
        assert (disk.stats().encoding, disk.stats().payload_bytes) == (name, encoding.nbytes(120, 51))
        assert disk.verify(deep=True).damage == []
        for store in (disk, memory):
            joined = store.get_joined(keys)
            assert torch.equal(joined, torch.cat(expected))
            assert torch.equal(torch.cat(store.get(keys)), joined)
        assert torch.equal(joined[:, -1], torch.cat(made)[:, -1].half())
    with DiskStore(tmp_path / "s", hidden_size=51) as disk:
        report = disk.compact(lambda asked: [keys.index(one) % 2 == 0 for one in asked])
        assert (report.records, report.records_dropped) == (20, 20)
        assert disk.verify(deep=True).damage == []
        assert torch.equal(disk.get_joined(keys[::2]), torch.cat(expected[::2]))
    for other in {"int8", *DEEP} - {name}:
        with pytest.raises(StorageMismatchError):
            DiskStore(tmp_path / "s", hidden_size=51, encoding=other)
