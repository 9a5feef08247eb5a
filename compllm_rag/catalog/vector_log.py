"""What changed since a vector file was written, one record a commit: `vectors-<generation of that file>.log`.

A record is a head (magic, dimensions, how many ids were removed and how many added, all little-endian), the removed
ids and the added ids as int64, the added vectors as float32, and 32 bytes that close it: the SHA-256 of the closing
bytes of the record before (of the first one: of the vector file) and of everything in this record. So no record can be
changed, dropped, moved or taken from another log unnoticed. The catalog names how many bytes belong to its state and
the last closing bytes; what lies behind them is what a writer left that was killed before its commit, and is written
over by the next one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import numpy as np

from compllm_rag.catalog.faults import damaged
from compllm_rag.catalog.vector_parts import Ids, Vectors

_HEAD = struct.Struct("<8sIII")  # magic, dimensions, ids removed, ids added
_MAGIC = b"CLLMVLOG"
_CLOSE = 32


def record(before: str, removed: Ids, added: Ids, vectors: Vectors) -> tuple[bytes, str]:
    """One record and its closing digest.

    Args:
        before: Digest that closes the record before, or of the vector file; hexadecimal.
        removed: Ids (m,).
        added: Ids (n,).
        vectors: (n, dim).
    """
    head = _HEAD.pack(_MAGIC, vectors.shape[1], len(removed), len(added))
    body = b"".join(
        [
            head,
            removed.astype("<i8", copy=False).tobytes(),
            added.astype("<i8", copy=False).tobytes(),
            vectors.astype("<f4", copy=False).tobytes(),
        ]
    )
    digest = hashlib.sha256(bytes.fromhex(before) + body)
    return body + digest.digest(), digest.hexdigest()


def nbytes(dim: int, removed: int, added: int) -> int:
    """Bytes of a record."""
    return _HEAD.size + 8 * removed + (8 + 4 * dim) * added + _CLOSE


def records(data: bytes, before: str, after: str, dim: int, source: str) -> Iterator[tuple[Ids, Ids, Vectors]]:
    """Read records: ids removed, ids added, vectors added (n, dim).

    All of it is checked before the first one is given.

    Args:
        data: Whole records.
        before: Digest that closes what lies in front of them.
        after: Digest that must close the last of them.
        dim: Dimensions of every vector.
        source: Where they come from, for messages.

    Raises:
        CorruptRecordError: They are not what was written.
    """
    found, at, digest = [], 0, before
    while at < len(data):
        if len(data) - at < _HEAD.size:
            raise _damaged(source, f"{len(data) - at} bytes at {at} in place of a record")
        magic, dimensions, n_removed, n_added = _HEAD.unpack_from(data, at)
        end = at + nbytes(dim, n_removed, n_added)
        if magic != _MAGIC or dimensions != dim or end > len(data):
            raise _damaged(source, f"{n_removed} + {n_added} ids of {dimensions} dimensions at {at} of {len(data)}")
        body = memoryview(data)[at : end - _CLOSE]
        made = hashlib.sha256(bytes.fromhex(digest))
        made.update(body)
        if made.digest() != data[end - _CLOSE : end]:
            raise _damaged(source, f"a record at {at} that fails its SHA-256")
        digest = made.hexdigest()
        found.append((at, n_removed, n_added))
        at = end
    if digest != after:
        raise _damaged(source, f"records that end in {digest}, not in {after}")
    for at, n_removed, n_added in found:
        ids = np.frombuffer(data, "<i8", n_removed + n_added, at + _HEAD.size).astype(np.int64)
        vectors = np.frombuffer(data, "<f4", n_added * dim, at + _HEAD.size + ids.nbytes).astype(np.float32)
        yield ids[:n_removed], ids[n_removed:], vectors.reshape(n_added, dim)


def _damaged(source: str, got: str) -> Exception:
    return damaged("a vector log is damaged", got=f"{got} in {source}")
