"""Objects that hold files, locks and models of their process: they cannot be pickled or copied, and say so."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, SupportsIndex

from compllm_rag.errors import NotTransferableError


class ProcessBound:
    """Refuses to be pickled, and to be copied, with a reason; a copy would be a second writer to the same files."""

    _opened_by: ClassVar[str] = "open it again there"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse.

        Raises:
            NotTransferableError: Always.
        """
        self._refuse()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> NoReturn:
        """Refuse.

        Raises:
            NotTransferableError: Always.
        """
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise NotTransferableError(
            f"a {type(self).__name__} holds files, locks and models of its process",
            got="pickle, a copy, or a worker process that is to have it",
            expected="one object, shared between threads",
            next_step=self._opened_by,
        )
