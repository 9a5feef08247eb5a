"""Identity: the fingerprint of a compressor and the keys of its records.

Every identity is a SHA-256 over tagged, length-prefixed fields, never a plain concatenation: `("ab", "c")` and
`("a", "bc")` must differ, and so must two kinds of record that hold the same bytes (docs/design.md section 5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def tagged_digest(tag: str, **fields: bytes | str | int | float | bool | None) -> str:
    """SHA-256 of a tag and named fields, each prefixed by its name, type and length.

    Args:
        tag: What kind of thing is identified; two tags never give the same digest.
        **fields: The values. Their order does not matter.

    Returns:
        64 hexadecimal characters.
    """
    digest = hashlib.sha256()
    _feed(digest, b"tag", tag.encode())
    for name in sorted(fields):
        value = fields[name]
        kind = type(value).__name__.encode()
        data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass")
        _feed(digest, name.encode() + b":" + kind, data)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, name: bytes, data: bytes) -> None:
    digest.update(len(name).to_bytes(4, "big") + name + len(data).to_bytes(8, "big") + data)


def mapping_digest(tag: str, values: Mapping[str, str]) -> str:
    """SHA-256 of a mapping of names to texts (file digests, for instance), independent of order."""
    parts = b"".join(
        len(item).to_bytes(8, "big") + item for key in sorted(values) for item in (key.encode(), values[key].encode())
    )
    return tagged_digest(tag, items=parts)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def tensor_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over named arrays: names, shapes, dtypes and little-endian bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        _feed(digest, name.encode(), f"{array.dtype.name}{list(array.shape)}".encode())
        _feed(digest, b"data", little.tobytes())
    return digest.hexdigest()


def record_key(namespace: str, fingerprint: str, n_concepts: int, token_ids: Sequence[int]) -> str:
    """Key of one segment's concepts in the store.

    The number of concepts is part of it, so another compression rate is a miss and never a mismatch.

    Args:
        namespace: The tenant.
        fingerprint: Identity of the compressor.
        n_concepts: K, how many concepts the segment became.
        token_ids: The segment's token ids.

    Returns:
        64 hexadecimal characters.
    """
    ids = np.asarray(token_ids, dtype="<u4").tobytes()
    digest = hashlib.sha256(b"compllm-rag/record/1")
    for data in (namespace.encode("utf-8", "surrogatepass"), fingerprint.encode(), n_concepts.to_bytes(8, "big"), ids):
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()
