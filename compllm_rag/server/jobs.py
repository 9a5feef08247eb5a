"""Uploads of this process by number, so that a client can look how far the concepts of one are."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from typing import NamedTuple

from compllm_rag.server.failures import Refusal

_MOST = 10_000


class UploadJob(NamedTuple):
    """One upload.

    Attributes:
        id: Its name.
        namespace: Whose it is.
        documents: Ids of its documents.
    """

    id: str
    namespace: str
    documents: tuple[str, ...]


class Jobs:
    """The last few thousand of them; what they are about lies in the catalog. Safe among threads."""

    def __init__(self, most: int = _MOST) -> None:
        self._most, self._lock = most, threading.Lock()
        self._jobs: OrderedDict[str, UploadJob] = OrderedDict()

    def add(self, namespace: str, documents: tuple[str, ...]) -> UploadJob:
        """Remember an upload."""
        made = UploadJob(f"u-{secrets.token_hex(12)}", namespace, documents)
        with self._lock:
            self._jobs[made.id] = made
            while len(self._jobs) > self._most:
                self._jobs.popitem(last=False)
        return made

    def get(self, job_id: str, namespace: str) -> UploadJob:
        """One that is remembered.

        Raises:
            Refusal: It is not.
        """
        found = self._jobs.get(job_id)
        if found is None or found.namespace != namespace:
            raise Refusal(
                404, "no_such_job", "there is no such upload, or it was forgotten. Next step: look at the documents"
            )
        return found
