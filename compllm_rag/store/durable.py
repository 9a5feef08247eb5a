"""What a store does besides that outlives its process: it can be looked at for damage, and freed of what is dead."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from compllm_rag.store.base import ConceptStore

if TYPE_CHECKING:
    from compllm_rag.store.compaction import CompactReport
    from compllm_rag.store.reading import Progress
    from compllm_rag.store.verification import StoreCheck


class DurableStore(ConceptStore):
    """A store that a storage can keep its concepts in.

    Attributes:
        shared: Whether several storages keep their concepts in it; then it may hold more than one of them refers to.
    """

    shared: bool = False

    @abstractmethod
    def verify(self, *, deep: bool = False, progress: Progress | None = None) -> StoreCheck:
        """Look for damage without stopping at the first.

        Args:
            deep: Read every payload.
            progress: Called with a message and a share from 0 to 1.
        """

    @abstractmethod
    def discard(self, check: StoreCheck) -> None:
        """Take away the records that a deep verification found damaged, so that they can be put again.

        Raises:
            StoreLockedError: Another process writes.
            StoreReadOnlyError: The store was opened for reading.
        """

    @abstractmethod
    def compact(
        self, live: Callable[[Sequence[str]], Sequence[bool]] | None = None, *, progress: Progress | None = None
    ) -> CompactReport:
        """Drop records that nothing refers to any more, and give their space back.

        Args:
            live: Tells for record keys whether anything still refers to them; None keeps all records.
            progress: Called with a message and a share from 0 to 1.

        Raises:
            CorruptRecordError: A record is damaged. Repair the storage first.
            StoreLockedError: Another process writes.
            StoreReadOnlyError: The store was opened for reading.
        """
