"""Hub ids: one commit of a repository, data files only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compllm_rag.errors import ModelFetchError, UnknownModelError
from compllm_rag.models.folders import check_folder, folder_digests

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve_hub(
    name: str, revision: str, cache_dir: Path, offline: bool, report: Callable[[str, float | None], None]
) -> tuple[Path, dict[str, str], str]:
    """The folder of one commit of a hub repository, its digests, and `org/name@commit`.

    Args:
        name: `org/name`.
        revision: A commit, tag or branch; the commit behind it is what gets recorded.
        cache_dir: Where digests of large files are remembered; the files lie in the hub library's own cache.
        offline: Take what is in that cache, or fail.
        report: Progress.

    Raises:
        UnknownModelError: There is no revision.
        ModelFetchError: The hub cannot be reached, or has no such model.
        UnsafeModelError: See `check_folder`.
    """
    if not revision:
        raise UnknownModelError(
            "hub id has no revision",
            got=name,
            expected=f"{name}@<commit>",
            next_step="add the commit you mean, so that the same name always gives the same weights",
        )
    report(f"fetching {name}@{revision}", None)
    path = snapshot(name, revision, _PATTERNS, offline=offline)
    check_folder(path)
    return path, folder_digests(path, cache_dir), f"{name}@{path.name}"


def snapshot(name: str, revision: str, patterns: list[str], *, offline: bool = False) -> Path:
    """Files of one commit of a hub repository; all of them come from what the revision meant at this moment.

    Raises:
        ModelFetchError: The hub cannot be reached, or has no such repository.
    """
    from httpx import HTTPError
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except (OSError, ValueError, HTTPError) as error:
        raise ModelFetchError(
            "hub not reachable, or no such model there",
            got=f"{name}@{revision} ({type(error).__name__})",
            expected="a repository that this machine can read, or one in the hub cache",
            next_step="check name, revision, token and network, or name a local folder",
        ) from error
