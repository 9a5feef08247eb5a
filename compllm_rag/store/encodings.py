"""All encodings, by the names that users type and by the tags that files carry."""

from __future__ import annotations

from compllm_rag.errors import ConfigurationError, UnsupportedFormatError
from compllm_rag.store.codec import Encoding, Fp16
from compllm_rag.store.quantised import Int4, Int8

FP16 = Fp16()
_ALL: tuple[Encoding, ...] = (FP16, Int8(), Int4())
ENCODINGS = {encoding.name: encoding for encoding in _ALL}  # what new stores are written in
_READ = {encoding.tag: encoding for encoding in _ALL}


def encoding_named(name: str) -> Encoding:
    """Find an encoding for a new store.

    Raises:
        ConfigurationError: There is none of this name.
    """
    if name not in ENCODINGS:
        raise ConfigurationError("unknown encoding of concepts", got=repr(name), expected=" or ".join(ENCODINGS))
    return ENCODINGS[name]


def encoding_tagged(tag: str) -> Encoding:
    """Find the encoding that something on disk was written in.

    Raises:
        UnsupportedFormatError: This release has no such encoding.
    """
    if tag not in _READ:
        raise UnsupportedFormatError(
            "the concepts were written in an encoding this release does not read",
            got=repr(tag),
            expected=" or ".join(_READ),
            next_step="upgrade compllm-rag",
        )
    return _READ[tag]
