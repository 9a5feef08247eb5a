"""When files were edited, as far as their own times tell."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping

FRESH_S = 60.0  # a file whose time lies further back was not edited just now, but moved here


def is_being_written(paths: Iterable[str], quiet_s: float) -> bool:
    """Whether one was emptied just now, as programs do before they write; else its documents would be deleted first."""
    for path in paths:
        try:
            found = os.stat(path)  # noqa: PTH116
        except OSError:
            continue
        if not found.st_size and time.time() - found.st_mtime < quiet_s:
            return True
    return False


def first_edit(changes: Mapping[str, float]) -> float:
    """When the first of some changes was made: the file's own time where it is new, else when it was heard of."""
    first = min(changes.values())
    for path, heard in changes.items():
        try:
            edited = os.stat(path).st_mtime  # noqa: PTH116
        except OSError:
            continue
        if heard - FRESH_S < edited:
            first = min(first, edited)
    return first
