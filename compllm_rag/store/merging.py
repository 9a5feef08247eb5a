"""Records of one store taken over by another as they are: bytes are proven by their checksums and never decoded."""

from __future__ import annotations

from collections.abc import Iterator

from compllm_rag.errors import StorageMismatchError
from compllm_rag.store.packs import Location
from compllm_rag.store.reading import StoreParts

_BATCH_BYTES = 16 * 2**20


def encoded_records(parts: StoreParts) -> Iterator[dict[str, tuple[int, bytes]]]:
    """All records of a store in the order in which they were put, in batches that bound memory.

    Args:
        parts: The store, with nothing left to flush.

    Yields:
        By key, the number of concepts and the payload of each record.

    Raises:
        CorruptRecordError: A row or a payload is damaged.
    """
    batch: list[tuple[str, Location]] = []
    size = 0
    for key, at in parts.index.items():
        batch.append((key, at))
        size += parts.nbytes(at)
        if size >= _BATCH_BYTES:
            yield _read(parts, batch)
            batch, size = [], 0
    if batch:
        yield _read(parts, batch)


def check_same_format(parts: StoreParts, header: bytes) -> None:
    """Refuse records of another width or encoding.

    Args:
        parts: Where they come from.
        header: What packs begin with where they are to go.

    Raises:
        StorageMismatchError: They cannot lie in one store.
    """
    if parts.header != header:
        raise StorageMismatchError(
            "the records of these stores cannot lie in one",
            got=f"width {parts.hidden_size}, encoding {parts.encoding.tag} in {parts.folder.parent}",
            expected="the width and the encoding of the store they go to",
            next_step="encode them again for this store",
        )


def _read(parts: StoreParts, batch: list[tuple[str, Location]]) -> dict[str, tuple[int, bytes]]:
    keys, places = [key for key, _ in batch], [at for _, at in batch]
    sizes = [parts.nbytes(at) for at in places]
    data = parts.reader.read(keys, places, sizes).tobytes()
    made, start = {}, 0
    for key, at, size in zip(keys, places, sizes, strict=True):
        made[key] = (at.n_concepts, data[start : start + size])
        start += size
    return made
