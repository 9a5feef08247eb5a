"""What verification and compaction need of an open disk store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compllm_rag.store.codec import Encoding
from compllm_rag.store.index import LocationIndex
from compllm_rag.store.packs import Location
from compllm_rag.store.reading import PackReader

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class StoreParts:
    """An open store, taken apart.

    Attributes:
        folder: Where the packs lie.
        header: The first bytes of each pack.
        index: Where every record lies.
        reader: Reads payloads.
        encoding: How concepts are written.
        hidden_size: Their width.
    """

    folder: Path
    header: bytes
    index: LocationIndex
    reader: PackReader
    encoding: Encoding
    hidden_size: int

    def nbytes(self, location: Location) -> int:
        """Bytes of a record's payload."""
        return self.encoding.nbytes(location.n_concepts, self.hidden_size)
