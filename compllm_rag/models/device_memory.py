"""What to do when a device has no memory left for a step, and how to give back what is kept for later."""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

from compllm_rag.errors import DeviceMemoryError

# What to do where not even one piece of work fits.
NO_MEMORY = "end what else uses this device, load the LLM in bfloat16, or take another device (`device='cpu'`)"
Item = TypeVar("Item")
Made = TypeVar("Made")


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


def in_halves(
    make: Callable[[Sequence[Item]], list[Made]],
    batch: Sequence[Item],
    device: torch.device,
    what: str,
    next_step: str,
    shrunk: Callable[[int], None],
) -> list[Made]:
    """What is made of a batch, in one go or, where memory is short, in halves of halves.

    Args:
        make: One result per item, in order.
        batch: At least one item.
        device: Where memory is short.
        what: Is done to a single item, for the error.
        next_step: What to do where not even that fits.
        shrunk: Told how many items the next try takes: those to come fit at once, and nobody says when another process
            gives memory back.

    Raises:
        DeviceMemoryError: No memory is left for a single item.
    """
    made, said = None, None
    try:
        made = make(batch)
    except (RuntimeError, MemoryError) as error:
        said = memory_trouble(error)
        if said is None:
            raise
    if made is not None:
        return made
    release_unused(device)
    if len(batch) == 1:
        raise out_of_memory(what, device, said or "", next_step)
    half = len(batch) // 2
    shrunk(half)
    return [
        one for part in (batch[:half], batch[half:]) for one in in_halves(make, part, device, what, next_step, shrunk)
    ]


def out_of_memory(what: str, device: torch.device, said: str, next_step: str) -> DeviceMemoryError:
    """The error for a step that needs more memory than there is, however small it is made."""
    return DeviceMemoryError(
        f"no memory is left to {what}", got=f"{said} (on {device})", expected="room for it", next_step=next_step
    )
