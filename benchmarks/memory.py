"""The most memory that a piece of work takes on top of what was taken before."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch

_EVERY = 0.005  # seconds between two looks


class Peak:
    """Watches memory while the `with` block runs; `bytes` is the peak above the start.

    On a GPU what its allocator counts. Else what of this process lies in memory, looked at every few milliseconds by a
    thread, so that short peaks may be missed and memory that was kept from before is not seen.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.bytes = 0
        self._before = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Peak:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        self._before = resident()
        self._thread = threading.Thread(target=self._observer, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._look()

    def _observer(self) -> None:
        while not self._stop.wait(_EVERY):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, resident() - self._before)


def resident() -> int:
    """Bytes of this process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def cache_bytes(*caches: Any) -> int:
    """Bytes of KV caches as they lie in memory; a layer without entries has none."""
    held = (t for cache in caches for layer in cache.layers for t in (layer.keys, layer.values) if t is not None)
    return sum(t.numel() * t.element_size() for t in held)
