"""What to do when a device has no memory left for a step, and how to give back what is kept for later."""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from compllm_rag.errors import DeviceMemoryError


def memory_trouble(error: BaseException) -> str | None:
    """What an allocator said when it refused; None for any other error.

    The traceback of such an error lets go of the tensors of its frames: else there would be no more memory than before
    for as long as anybody keeps the error, be it a log.
    """
    if isinstance(error, DeviceMemoryError):
        return None  # has been said
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        traceback.clear_frames(error.__traceback__)
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def release_unused(device: torch.device) -> None:
    """Give memory that the allocator keeps for later back to the device, or to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    trim = _malloc_trim()
    if trim is not None:
        # Batches of many lengths leave holes behind that glibc keeps: a long ingestion would seem to leak.
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Of glibc; None under another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None


@contextmanager
def room_for(what: str, device: torch.device, next_step: str) -> Iterator[None]:
    """Run a block; an allocator that refuses becomes an error that says what to do.

    Raises:
        DeviceMemoryError: No memory is left to do `what`.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = memory_trouble(error)
        if said is None:
            raise
        release_unused(device)
        raise out_of_memory(what, device, said, next_step) from error


def out_of_memory(what: str, device: torch.device, said: str, next_step: str) -> DeviceMemoryError:
    """The error for a step that needs more memory than there is, however small it is made."""
    return DeviceMemoryError(
        f"no memory is left to {what}", got=f"{said} (on {device})", expected="room for it", next_step=next_step
    )
