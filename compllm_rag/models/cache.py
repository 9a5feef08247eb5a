"""The user's cache directory, and putting things into it whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from compllm_rag.errors import ConfigurationError


def default_cache_dir() -> Path:
    """The cache directory: `COMPLLM_CACHE`, else `compllm-rag` in the user's cache directory; mode 0700.

    Raises:
        ConfigurationError: It belongs to somebody else, who could plant a model there, or it cannot be made.
    """
    given = os.environ.get("COMPLLM_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(given) if given else (Path(base) if base else Path.home() / ".cache") / "compllm-rag"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise ConfigurationError(
            "cache directory cannot be made",
            got=f"{folder} ({error.strerror})",
            expected="a folder that can be written",
            next_step="set COMPLLM_CACHE to one",
        ) from error
    if hasattr(os, "getuid") and owner != os.getuid():
        raise ConfigurationError(
            "cache directory belongs to another user",
            got=f"{folder}, owner {owner}",
            expected=f"owner {os.getuid()}",
            next_step="set COMPLLM_CACHE to a folder of your own",
        )
    return folder


@contextlib.contextmanager
def installing(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes `target` when the block ends well, and vanishes otherwise.

    Two processes may install the same thing at once: the first to end wins, the other's work is dropped.
    """
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        try:
            scratch.replace(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
