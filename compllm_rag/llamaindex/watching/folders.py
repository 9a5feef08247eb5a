"""The folders that are watched: which files in them are part of the corpus."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from compllm_rag.catalog.origins import lies_in
from compllm_rag.errors import ConfigurationError, UnreadableFileError
from compllm_rag.llamaindex.documents import check_paths
from compllm_rag.llamaindex.readers.found import shown
from compllm_rag.llamaindex.readers.kinds import reader_of
from compllm_rag.llamaindex.readers.walk import Listing, look_at, shut_out, walk
from compllm_rag.llamaindex.watching.ignoring import FILE, IgnoreRules
from compllm_rag.storage.namespaces import holds_storage, is_part


class WatchedFolders:
    """Some folders with their rules. Files are named by absolute paths, the links of the folder watched followed.

    Args:
        named: The folders.
        ignore: Patterns; see `IgnoreRules`.
        gitignore: Whether to heed the files of git.
        storage: The storage that is kept up to date, whose files are no documents; None in memory.

    Attributes:
        roots: The folders as they were named, by their paths.

    Raises:
        ConfigurationError: There is none, one is a file or of a storage, or a pattern makes no sense.
        CorpusPathError: One does not exist.
    """

    def __init__(
        self, named: Collection[Path], ignore: Iterable[str], *, gitignore: bool, storage: Path | None
    ) -> None:
        check_watched(named)
        patterns = list(ignore)
        self.named = list(named)
        self.roots = {os.path.realpath(folder): folder for folder in named}
        self._rules = {root: IgnoreRules(root, patterns, gitignore=gitignore) for root in self.roots}
        self._storage = None if storage is None else os.path.realpath(storage)

    def all_files(self) -> Listing:
        """Look through all of them; rules are read anew."""
        for rules in self._rules.values():
            rules.forget()
        return walk(self.named, self._ignored)

    def files_of(self, paths: Collection[str]) -> Listing:
        """Look at some paths only, and below those that are folders."""
        listing = Listing()
        for root, folder in self.roots.items():
            inner = [path for path in paths if lies_in(path, [root]) and path != root]
            look_at(listing, folder, inner, self._rules[root])
        return listing

    def leaves_out(self, file: str) -> bool:
        """Whether a file in these folders is no part of the corpus, wherever it is reached from."""
        roots = [root for root in self.roots if lies_in(file, [root]) and file != root]
        return bool(roots) and all(shut_out(self.roots[root], file, self._rules[root]) for root in roots)

    def matters(self, path: str) -> bool:
        """Whether a change of a path may matter; asked for each, so it looks at names before it looks at files."""
        for root in self.roots:
            if lies_in(path, [root]):
                parts = Path(path).relative_to(root).parts
                if any(part.startswith(".") for part in parts[:-1]) or self._is_of_storage(path):
                    return False
        if Path(path).name == FILE:  # those of packages that are installed below are none of ours
            folder = os.path.dirname(path)  # noqa: PTH120
            return folder in self.roots or not self.leaves_out(folder)
        # What has no reader may be a folder that was moved away, or here.
        is_read = reader_of(Path(path)) is not None or not os.path.isfile(path)  # noqa: PTH113
        return is_read and not self.leaves_out(path)

    def check(self) -> None:
        """Refuse to go on without a folder.

        Raises:
            UnreadableFileError: One is gone.
        """
        for root, folder in self.roots.items():
            if not os.path.isdir(root):  # noqa: PTH112
                raise UnreadableFileError(
                    "the folder that is watched is gone; its documents stay",
                    got=shown(folder),
                    next_step="see that its disk is mounted and watch again, or delete what came from it by `ingest "
                    "--prune` of the folder above",
                )

    def _ignored(self, file: str, folder: bool) -> str | None:
        reasons = [self._rules[root](file, folder) for root in self.roots if lies_in(file, [root])]
        return reasons[0] if reasons and all(reasons) else None

    def _is_of_storage(self, path: str) -> bool:
        own = self._storage
        if own is None or path == own or not lies_in(path, [own]):
            return False
        return own not in self.roots or is_part(Path(path).relative_to(own).parts[0])


def check_watched(folders: Collection[Path]) -> None:
    """Refuse what cannot be watched, before anything slow is done.

    Raises:
        ConfigurationError: There is none, or one is a file or a part of a storage.
        CorpusPathError: One does not exist.
    """
    check_paths(folders)
    files = [folder for folder in folders if not folder.is_dir()]
    if files or not folders:
        raise ConfigurationError(
            "only folders can be watched",
            got=shown(files[0]) if files else "none",
            expected="a folder",
            next_step="name the folder that the file lies in",
        )
    for folder in folders:
        if holds_storage(folder.parent) and is_part(folder.name):
            raise ConfigurationError("a part of a storage cannot be watched", got=shown(folder))
