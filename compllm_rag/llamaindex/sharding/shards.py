"""What a worker makes of a part: vectors of its chunks, and their concepts in a store of their own.

```
<shard>/shard.json           chunks, counts, digest of the vectors; written last
<shard>/vectors.safetensors  `vectors`, float32 (n_chunks, dimension), in the order of the chunks
<shard>/concepts/            a concept store in the storage's own encoding
```

Text is not in it: the documents lie beside it, and whoever has them and the tokenizer cuts them up alike.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from compllm_rag.errors import CorruptRecordError
from compllm_rag.fingerprint import tagged_digest
from compllm_rag.storage.manifest import CONCEPTS, Manifest
from compllm_rag.store import DiskStore

_MANIFEST, _VECTORS, _NAME = "shard.json", "vectors.safetensors", "vectors"


class ShardManifest(BaseModel):
    """What a shard holds.

    Attributes:
        key: Of the part.
        nodes: Ids of its chunks, in their order.
        vectors: digest of the file of vectors.
        segments: Units of its chunks.
        compressed: Those that went through the compressor; the others repeat earlier ones of the part.
        source_tokens: Tokens of the chunks.
        seconds: Wall time of the worker.
        cpu_s: Seconds of a CPU it took.
        host: Name of its machine.
        pid: Of its process.
    """

    key: str
    nodes: list[str]
    vectors: str
    segments: int
    compressed: int
    source_tokens: int
    seconds: float
    cpu_s: float
    host: str
    pid: int


@dataclass(frozen=True)
class Shard:
    """A shard that was read.

    Attributes:
        manifest: What it holds.
        vectors: float32 (n_chunks, dimension).
    """

    manifest: ShardManifest
    vectors: np.ndarray


def shard_store(folder: Path, manifest: Manifest, *, read_only: bool = False) -> DiskStore:
    """The concepts of a shard."""
    return DiskStore(folder / CONCEPTS, hidden_size=manifest.width, encoding=manifest.encoding, read_only=read_only)


def put_vectors(folder: Path, vectors: Sequence[Sequence[float]], dimension: int) -> str:
    """Write vectors, (n_chunks, dimension).

    Returns:
        The digest of the file.
    """
    data = save({_NAME: np.asarray(vectors, dtype=np.float32).reshape(len(vectors), dimension)})
    _write(folder / _VECTORS, data)
    return _digest(data)


def put_manifest(folder: Path, manifest: ShardManifest) -> None:
    """Write what a shard holds; its last file."""
    _write(folder / _MANIFEST, manifest.model_dump_json(indent=1).encode())


def read_shard(folder: Path, key: str, dimension: int) -> Shard:
    """Read a shard; its concepts are read by `shard_store`.

    Args:
        folder: Where it lies.
        key: Of its part.
        dimension: Of its vectors.

    Raises:
        CorruptRecordError: It is damaged, or not the one of this part.
    """
    try:
        manifest = ShardManifest.model_validate_json((folder / _MANIFEST).read_bytes())
        data = (folder / _VECTORS).read_bytes()
        if (manifest.key, manifest.vectors) != (key, _digest(data)):
            raise damaged_shard(folder, "files that do not belong together")
        vectors = load(data)[_NAME]
    except (OSError, ValidationError, SafetensorError, KeyError) as error:
        raise damaged_shard(folder, str(error).splitlines()[0]) from error
    if vectors.shape != (len(manifest.nodes), dimension) or vectors.dtype != np.float32:
        raise damaged_shard(folder, f"vectors {vectors.shape}, {vectors.dtype}")
    if not np.isfinite(vectors).all():
        raise damaged_shard(folder, "vectors with NaN or infinite values")
    return Shard(manifest, vectors)


def damaged_shard(folder: Path, got: str) -> CorruptRecordError:
    """The error for a shard that cannot be committed."""
    return CorruptRecordError(
        "what a worker made of a part of the corpus cannot be used",
        got=f"{got} in {folder}",
        next_step="remove that folder, then run the same command again, which encodes the part anew",
    )


def _digest(data: bytes) -> str:
    return tagged_digest("compllm-rag/shard-vectors", data=data)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
