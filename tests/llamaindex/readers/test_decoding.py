"""Bytes to text."""

from __future__ import annotations

import pytest

from compllm_rag.errors import UnreadableFileError
from compllm_rag.llamaindex.readers.decoding import decoded, whole


@pytest.mark.parametrize(
    ("data", "text", "said"),
    [
        ("Grüße\r\nzwei\rdrei".encode(), "Grüße\nzwei\ndrei", None),
        ("Grüße".encode("utf-8-sig"), "Grüße", None),
        ("Grüße".encode("utf-16"), "Grüße", "UTF-16"),
        (b"\xfe\xff" + "Grüße".encode("utf-16-be"), "Grüße", "UTF-16"),
        ("Grüße".encode("utf-32"), "Grüße", "UTF-32"),
        (b"Caf\xe9 opens at ten.", "Café opens at ten.", "byte 3 .*Windows-1252"),
        (b"a \x93quoted\x94 word", "a “quoted” word", "byte 2 .*Windows-1252"),
        (b"a \x81 control, and more words", "a \x81 control, and more words", "byte 2 .*Latin-1"),
        ("Grüße aus Köln".encode() + b"\xff", "Grüße aus Köln\ufffd", "byte 17 is not UTF-8; replaced"),
        (b"\xef\xbb\xbfcaf\xe9", "caf\ufffd", "byte 6 "),
        (b"x" * 200 + b"\0", "x" * 200 + "\ufffd", "1 NUL"),
    ],
)
def test_what_is_read(data: bytes, text: str, said: str | None) -> None:
    found, remark = decoded(data)
    assert found == text
    assert remark is None if said is None else __import__("re").search(said, remark or "")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bytes(range(256)), "byte 128 is not UTF-8"),
        ("Grüße".encode("utf-16-le") + b"\0\0", "NUL bytes"),
        ("plain".encode("utf-16-le"), "NUL bytes"),
        ("Жук и кот".encode("cp1251"), "byte 0 is not UTF-8, and the encoding cannot be told"),
        (b"\xff\xfea\0b", "byte 4 is not UTF-16"),
    ],
)
def test_what_is_not(data: bytes, said: str) -> None:
    with pytest.raises(UnreadableFileError, match=said):
        decoded(data)


def test_positions_count_from_the_begin_of_the_file() -> None:
    assert "byte 103 " in str(decoded(b"caf\xe9 at the corner", 100)[1])


def test_what_json_can_spell() -> None:
    assert whole("a\ud800b\0c") == ("a\ufffdb\ufffdc", "a NUL character or half a surrogate was replaced")
    assert whole("Grüße") == ("Grüße", None)
