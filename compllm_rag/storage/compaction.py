"""Compaction of a whole storage; it loads no model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compllm_rag.catalog.accounts import Accounts
from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.kv import KeyValues
from compllm_rag.catalog.tracked import count_chunks
from compllm_rag.errors import StorageMismatchError
from compllm_rag.storage.manifest import CONCEPTS, META_KEY, Manifest, require_storage
from compllm_rag.storage.migration import BACKUP
from compllm_rag.storage.namespaces import FOLDER, bytes_of
from compllm_rag.storage.stores import open_store
from compllm_rag.store.compaction import CompactReport

Progress = Callable[[str, float | None], None]


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StorageCompaction:
    """What a compaction did.

    Attributes:
        concepts: Of the concept store.
        bytes_before: Bytes of the whole folder.
        bytes_after: The same afterwards.
        seconds: Wall time.
    """

    concepts: CompactReport
    bytes_before: int
    bytes_after: int
    seconds: float

    def fields(self) -> dict[str, Any]:
        """Plain values, as `compact --json` prints them."""
        names = ("records", "records_dropped", "packs_rewritten", "packs_removed")
        packs = {name: getattr(self.concepts, name) for name in names}
        whole = {name: value for name, value in asdict(self).items() if name != "concepts"}
        return {
            **packs,
            "pack_bytes_before": self.concepts.bytes_before,
            "pack_bytes": self.concepts.bytes_after,
        } | whole


def compact_storage(folder: str | Path, *, progress: Progress | None = None) -> StorageCompaction:
    """Reclaim what was deleted: concepts no chunk refers to, dead bytes of packs, former vectors, free pages.

    Killed at any point it leaves a sound storage, and can be run again. Readers go on; writers are refused meanwhile.

    Args:
        folder: The storage.
        progress: Called with a message and a share from 0 to 1.

    Raises:
        StorageNotFoundError: There is no storage here.
        StorageMismatchError: It is not known which concepts are referred to. Repair counts them.
        CorruptRecordError: A record is damaged. Repair first.
        StoreFullError: No space for the new packs; nothing is lost.
        StoreLockedError: Another process writes.
        StoreReadOnlyError: The storage cannot be written.
    """
    begun, path = time.perf_counter(), Path(folder).absolute()
    require_storage(path)
    before = _size(path)
    catalog = Catalog.open(path)
    try:
        manifest = Manifest.parse(catalog.get_meta(META_KEY))
        catalog.claim()  # who ingests is kept out: what is compressed but not yet referred to would look dead
        accounts = Accounts(KeyValues(catalog))
        _require_counts(catalog, accounts)
        with open_store(manifest, path / CONCEPTS) as store:
            report = store.compact(accounts.references.live, progress=progress)
        catalog.reclaim()
    finally:
        catalog.close()
    made = StorageCompaction(report, before, _size(path), time.perf_counter() - begun)
    logger.info(
        "compacted: %d records dropped, %d packs rewritten, %d bytes before and %d after, %.1f s",
        report.records_dropped,
        report.packs_rewritten,
        made.bytes_before,
        made.bytes_after,
        made.seconds,
    )
    return made


def _require_counts(catalog: Catalog, accounts: Accounts) -> None:
    with catalog.reading() as connection:
        chunks = count_chunks(connection)
    counted = accounts.total()[1].chunks
    if counted != chunks or not accounts.references.counted:
        raise StorageMismatchError(
            "it is not known which concepts chunks refer to",
            got=f"{counted} chunks accounted for" if accounts.references.counted else "no counts of references",
            expected=f"all {chunks}, each added by a ConceptIndex",
            next_step="run `compllm-rag repair`, which counts them anew",
        )


def _size(folder: Path) -> int:
    others = {folder / FOLDER, *folder.glob(BACKUP.format("*"))}  # storages of their own
    return sum(bytes_of(p) for p in folder.rglob("*") if not p.is_dir() and others.isdisjoint(p.parents))
