"""Hub ids: one commit of a repository, data files only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compllm_rag.errors import ModelFetchError
from compllm_rag.models.folders import check_folder, folder_digests

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve_hub(
    name: str, revision: str, cache_dir: Path, offline: bool, report: Callable[[str, float | None], None]
) -> tuple[Path, dict[str, str], str]:
    """The folder of one commit of a hub repository, its digests, and `org/name@commit`.

    Args:
        name: `org/name`.
        revision: A commit, tag or branch, the branch `main` where it is empty; the commit behind it is what gets
            recorded, so that a storage names the same weights for good.
        cache_dir: Where digests of large files are remembered; the files lie in the hub library's own cache.
        offline: Take what is in that cache, or fail.
        report: Progress.

    Raises:
        ModelFetchError: The hub cannot be reached, or has no such model.
        UnsafeModelError: See `check_folder`.
    """
    revision = revision or "main"
    report(f"fetching {name}@{revision}", None)
    path = snapshot(name, revision, _PATTERNS, offline=offline)
    check_folder(path)
    report(f"taking {name}@{path.name}", None)
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
