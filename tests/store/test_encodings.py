"""Encodings of concepts: what they keep, what they refuse, and that formats stay what they are."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compllm_rag.errors import (
    ConfigurationError,
    CorruptRecordError,
    InvalidConceptsError,
    StorageMismatchError,
    UnsupportedFormatError,
)
from compllm_rag.store import DiskStore, MemoryStore
from compllm_rag.store.encodings import ENCODINGS, GROUP, encoding_named, encoding_tagged

QUANTISED = ("int8", "int4")
WIDTHS = [1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 576, 640, 2560]
MOST = 65504.0

rows = hnp.arrays(
    "float16",
    st.tuples(st.integers(1, 4), st.integers(1, 70)),
    elements=st.floats(-MOST, MOST, width=16) | st.floats(-1, 1, width=16) | st.just(0.0),
)


def gaussian(n: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def decoded(name: str, payload: bytes, n: int, width: int) -> torch.Tensor:
    return encoding_named(name).decode(np.frombuffer(bytearray(payload), np.uint8), n, width)


def grouped(values: torch.Tensor) -> torch.Tensor:
    """Values (n, width) as (n, groups, GROUP), zeros behind them."""
    width = values.shape[1]
    padded = torch.nn.functional.pad(values, (0, -width % GROUP))
    return padded.view(len(values), -1, GROUP)


@given(rows)
@example(np.full((2, 33), MOST, np.float16))
@example(np.array([[-MOST, MOST, 1.0]], np.float16))
@example(np.array([[6e-8, 0.0, -6e-8]], np.float16))
@example(np.zeros((3, 5), np.float16))
@settings(max_examples=150, deadline=None)
def test_errors_are_within_what_the_format_promises(array: np.ndarray) -> None:
    values = torch.from_numpy(array).double()
    most = values.abs().amax(1, keepdim=True)
    for name in ENCODINGS:
        found = encoding_named(name).rounded(torch.from_numpy(array))
        assert found.dtype == torch.float16 and found.shape == values.shape and bool(found.isfinite().all())
        error, half = (found.double() - values).abs(), 6e-8 + values.abs() * 2**-10  # fp16's own rounding
        if name == "fp16":
            assert torch.equal(found, torch.from_numpy(array))
        elif name == "int8":
            assert bool((error <= most / 254 * 1.0001 + half).all())
        else:
            # A step of a group is an eighth of its largest magnitude, rounded up by at most a unit of the row.
            step = grouped(values).abs().amax(-1) / 8 + most / 8 / 127
            rms = (grouped(error.clamp(min=0)).square().sum(-1) / GROUP).sqrt()
            assert bool((rms <= step * 1.0001 + grouped(half).amax(-1)).all())


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("width", WIDTHS)
def test_records_joined_decode_to_concepts_joined(name: str, width: int) -> None:
    encoding = encoding_named(name)
    parts = [gaussian(n, width, n) for n in (1, 3, 2)]
    payloads = [encoding.encode(part) for part in parts]
    assert [len(payload) for payload in payloads] == [encoding.nbytes(n, width) for n in (1, 3, 2)]
    joined = decoded(name, b"".join(payloads), 6, width)
    assert torch.equal(joined, torch.cat([encoding.rounded(part) for part in parts]))
    assert torch.equal(joined, encoding.rounded(torch.cat(parts)))
    assert decoded(name, b"", 0, width).shape == (0, width)


@pytest.mark.parametrize("width", [576, 640, 2048, 2560, 4096])
def test_bytes_and_errors_of_real_widths(width: int) -> None:
    values = gaussian(50, width)
    for name, share, most in (("int8", 0.504, 0.01), ("int4", 0.28, 0.1)):
        encoding = encoding_named(name)
        assert encoding.nbytes(50, width) <= share * encoding_named("fp16").nbytes(50, width)
        error = encoding.rounded(values).float() - values
        assert float(error.square().mean().sqrt()) < most


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_second_pass_through_fp16_changes_nothing(name: str) -> None:
    encoding, values = encoding_named(name), gaussian(9, 100)
    assert encoding.encode(values) == encoding.encode(values.half()) == encoding.encode(values.half().double())


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 65536.0, -1e30])
@pytest.mark.parametrize("at", [0, 32, 69])
def test_what_fp16_cannot_hold_is_refused(name: str, bad: float, at: int) -> None:
    values = torch.ones(3, 70)
    values[1, at] = bad
    with pytest.raises(InvalidConceptsError):
        encoding_named(name).encode(values)
    with pytest.raises(InvalidConceptsError):
        MemoryStore(70, encoding=name).put([("0" * 64, values)])


@pytest.mark.parametrize("name", ENCODINGS)
@given(wrong=st.binary(max_size=300), n=st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_payloads_of_a_wrong_size_are_refused_before_anything_is_allocated(name: str, wrong: bytes, n: int) -> None:
    if len(wrong) != encoding_named(name).nbytes(n, 37):
        with pytest.raises(CorruptRecordError):
            decoded(name, wrong, n, 37)


@pytest.mark.parametrize("name", ENCODINGS)
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_bytes_decode_to_finite_values_or_are_refused(name: str, data: st.DataObject) -> None:
    size = encoding_named(name).nbytes(2, 35)
    payload = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
    if name != "fp16" and data.draw(st.booleans()):
        for start in (0, size // 2):  # units at the edge of what fp16 can hold
            payload[start : start + 4] = struct.pack("<f", MOST / (127 if name == "int8" else 8 * 127))
    try:
        found = decoded(name, bytes(payload), 2, 35)
    except InvalidConceptsError:
        return
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("unit", [float("nan"), float("inf"), -1.0, 1e6])
@pytest.mark.parametrize("name", QUANTISED)
def test_units_that_no_concept_has_are_refused(name: str, unit: float) -> None:
    payload = bytearray(encoding_named(name).encode(torch.ones(2, 35)))
    payload[len(payload) // 2 : len(payload) // 2 + 4] = struct.pack("<f", unit)
    with pytest.raises(InvalidConceptsError):
        decoded(name, bytes(payload), 2, 35)


def test_int8_is_the_format_that_its_page_describes() -> None:
    payload = struct.pack("<f5b", 0.5, 127, -127, 0, 1, -2)
    assert decoded("int8", payload, 1, 5).tolist() == [[63.5, -63.5, 0.0, 0.5, -1.0]]
    assert encoding_named("int8").encode(torch.tensor([[63.5, -63.5, 0.0, 0.5, -1.0]])) == payload


def test_int4_is_the_format_that_its_page_describes() -> None:
    codes = [0, 15, 8, 9, 7] + [8] * 27 + [1]  # the 33rd value begins a second group
    packed = [low | high << 4 for low, high in zip(codes[0::2], [*codes[1::2], 8], strict=True)]
    payload = struct.pack("<f2b17B", 0.25, -4, 2, *packed)
    expected = [-1.0 * (code - 8) for code in codes[:32]] + [0.5 * (codes[32] - 8)]
    assert decoded("int4", payload, 1, 33).tolist() == [expected]
    assert len(payload) == encoding_named("int4").nbytes(1, 33)


@pytest.mark.parametrize("name", ENCODINGS)
def test_stores_give_what_the_encoding_leaves(tmp_path: Path, name: str) -> None:
    encoding, keys = encoding_named(name), [f"{number:064x}" for number in range(5)]
    made = [gaussian(number + 1, 50, number) for number in range(5)]
    expected = torch.cat([encoding.rounded(values) for values in made])
    memory = MemoryStore(50, encoding=name)
    memory.put(zip(keys, made, strict=True))
    with DiskStore(tmp_path / "s", hidden_size=50, encoding=name) as disk:
        disk.put(zip(keys, made, strict=True))
        assert torch.equal(disk.get_joined(keys), expected)
    with DiskStore(tmp_path / "s", hidden_size=50, read_only=True) as disk:
        assert disk.encoding is memory.encoding is encoding
        assert (disk.stats().encoding, disk.stats().payload_bytes) == (name, encoding.nbytes(15, 50))
        assert disk.verify(deep=True).damage == []
        for store in (disk, memory):
            assert torch.equal(store.get_joined(keys), expected)
            assert torch.equal(torch.cat(store.get(keys)), expected)


def test_a_store_keeps_the_encoding_it_was_made_with(tmp_path: Path) -> None:
    DiskStore(tmp_path / "s", hidden_size=8, encoding="int4").close()
    assert json.loads((tmp_path / "s" / "store.json").read_text())["encoding"] == "int4.1"
    DiskStore(tmp_path / "s", hidden_size=8).close()
    with pytest.raises(StorageMismatchError, match="int4"):
        DiskStore(tmp_path / "s", hidden_size=8, encoding="int8")
    with pytest.raises(ConfigurationError):
        DiskStore(tmp_path / "t", hidden_size=8, encoding="int3")
    with pytest.raises(ConfigurationError):
        MemoryStore(8, encoding="int3")
    assert not (tmp_path / "t").exists()


def test_an_encoding_of_a_later_release_is_refused(tmp_path: Path) -> None:
    DiskStore(tmp_path / "s", hidden_size=8, encoding="int8").close()
    path = tmp_path / "s" / "store.json"
    path.write_text(path.read_text().replace("int8.1", "int8.2"))
    with pytest.raises(UnsupportedFormatError, match=r"int8\.2"):
        DiskStore(tmp_path / "s", hidden_size=8)
    assert [encoding_tagged(tag).name for tag in ("fp16", "int8.1", "int4.1")] == list(ENCODINGS)
