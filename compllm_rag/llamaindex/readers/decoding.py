"""Bytes to text: UTF-8 first, marks of other encodings, and what is likely where there is neither."""

from __future__ import annotations

import codecs
import re

from compllm_rag.llamaindex.readers.found import broken

# The longer marks first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32-be", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16-le", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16-be", "UTF-16"),
)
# A share of NUL bytes above which a file is no text, and of bytes beyond ASCII above which it is in no Latin script.
_MOST_NULS, _MOST_BEYOND_ASCII = 0.01, 0.3
_SURROGATE = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"


def decoded(data: bytes, offset: int = 0) -> tuple[str, str | None]:
    """Text of some bytes, line ends normalised, and what was assumed or replaced (None: it is plain UTF-8).

    Args:
        data: All of a file, or a line of it.
        offset: Where they begin in the file; positions in remarks count from its begin, the first byte being 0.

    Raises:
        UnreadableFileError: They are no text, or in no encoding that can be told.
    """
    text, remark = _decoded(data, offset)
    nuls = text.count("\0")
    if nuls > _MOST_NULS * len(text):
        raise broken("it holds NUL bytes: no text, or UTF-16 without its mark")
    if nuls:
        text, remark = text.replace("\0", _REPLACEMENT), joined(remark, f"{nuls} NUL characters were replaced")
    return text.replace("\r\n", "\n").replace("\r", "\n"), remark


def joined(*remarks: str | None) -> str | None:
    """Several remarks as one."""
    return "; ".join(remark for remark in remarks if remark) or None


def whole(text: str) -> tuple[str, str | None]:
    """Text without NUL characters and half surrogates, which JSON can spell, and a remark on what was replaced."""
    clean = _SURROGATE.sub(_REPLACEMENT, text).replace("\0", _REPLACEMENT)
    return clean, None if clean == text else "a NUL character or half a surrogate was replaced"


def _decoded(data: bytes, offset: int) -> tuple[str, str | None]:
    for mark, codec, name in _MARKS:
        if data.startswith(mark):
            try:
                return data[len(mark) :].decode(codec), f"read as {name}"
            except UnicodeDecodeError as error:
                raise broken(
                    f"byte {offset + error.start + len(mark)} is not {name}, which its mark promises"
                ) from error
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        return data[start:].decode(), None
    except UnicodeDecodeError as error:
        at = offset + error.start + start
    beyond = sum(byte >= 0x80 for byte in data)
    if data.count(0) > _MOST_NULS * len(data):
        raise broken(f"byte {at} is not UTF-8, and there are NUL bytes: no text")
    text = data[start:].decode(errors="replace")
    bad = text.count(_REPLACEMENT)
    if start or sum(char > "\x7f" and char != _REPLACEMENT for char in text) > bad:
        return text, f"byte {at} is not UTF-8; replaced such bytes: {bad}"
    if beyond > _MOST_BEYOND_ASCII * len(data):
        raise broken(f"byte {at} is not UTF-8, and the encoding cannot be told; save the file as UTF-8")
    try:
        return data.decode("cp1252"), f"byte {at} is not UTF-8; read as Windows-1252"
    except UnicodeDecodeError:
        return data.decode("latin-1"), f"byte {at} is not UTF-8; read as Latin-1"
