"""The files below the paths that a user named, and what lies there that is none of the corpus."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from compllm_rag.errors import ConfigurationError, CorpusPathError, UnreadableFileError
from compllm_rag.llamaindex.readers.found import SkipKind, SkippedFile, shown
from compllm_rag.llamaindex.readers.kinds import missing_package, reader_of
from compllm_rag.storage.namespaces import holds_storage, is_part

# Folders of programs: what they hold was fetched or made, not written.
_MADE = ("node_modules", "__pycache__", "site-packages")
_SPECIAL = {
    stat.S_IFIFO: "a pipe; use - for standard input",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

# Why a file, or a folder (true), is no part of the corpus; None where it is. Paths as in `FoundFile.file`.
Ignored = Callable[[str, bool], str | None]


@dataclass(frozen=True)
class FoundFile:
    """A file to read.

    Attributes:
        path: As it is reached from the path that was named.
        name: Its path within the folder named, with `/`; the id of its document.
        file: Absolute, links of the folder named followed.
        size: Bytes, at the time of the walk.
    """

    path: Path
    name: str
    file: str
    size: int


@dataclass
class Listing:
    """What a walk found.

    Attributes:
        roots: The folders named, links followed.
        files: Files to read, in order of name, each once.
        skipped: What was left out.
        storages: Parts of storages: absolute paths, as in `FoundFile.file`.
    """

    roots: list[str] = field(default_factory=list)
    files: list[FoundFile] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    storages: list[str] = field(default_factory=list)


def as_paths(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Paths as given; one alone need not stand in a list."""
    given = [paths] if isinstance(paths, str | bytes | os.PathLike) else list(paths)
    return [Path(os.fsdecode(path)) for path in given]


def roots_of(within: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The paths that documents come from; they need not exist any more.

    Raises:
        ConfigurationError: One can be none.
    """
    roots = as_paths(within)
    if any("\0" in str(root) for root in roots):
        raise ConfigurationError("within names what is no path", got=ascii([*map(str, roots)])[:80])
    return roots


def check_paths(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse paths that do not exist, before anything slow is done.

    Raises:
        CorpusPathError: Naming the first such path.
        UnreadableFileError: One may not be looked at.
    """
    for given in as_paths(paths):
        try:
            given.stat()
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise UnreadableFileError(
                    "path cannot be read", got=shown(given), next_step="check the rights of the folders it lies in"
                ) from error
            if error.errno == errno.ELOOP:
                raise _no_path(given, "path is a link that leads back to itself") from error
            raise _no_path(given) from error
        except ValueError as error:  # a NUL character
            raise _no_path(given) from error


def walk(paths: Iterable[str | os.PathLike[str]], ignored: Ignored | None = None) -> Listing:
    """Look through files and folders, opening none.

    Links to files are followed, links to folders are not: name such a folder to read it.

    Args:
        paths: Files and folders.
        ignored: Tells of what lies in folders whether it is left out, besides what always is.

    Raises:
        CorpusPathError: A path does not exist.
    """
    listing, given = Listing(), as_paths(paths)
    check_paths(given)
    met = set[str]()
    for root in given:
        real = os.path.realpath(root)
        if _is_of_storage(real):  # a shell that expands * names them
            listing.storages.append(real)
            _skip(listing, root, real, "a part of a storage, no document", "storage")
            continue
        if not root.is_dir():
            _look(listing, met, root, shown(root.name), real)
            continue
        listing.roots.append(real)
        for path in _below(listing, root, real, root, ignored):
            _look_within(listing, met, root, real, path, ignored)
    return listing


def look_at(listing: Listing, root: Path, files: Iterable[str], ignored: Ignored | None = None) -> None:
    """Look at some files of a folder only, with all that lies in those that are folders; as `walk` would.

    Args:
        listing: Where they are put. What is not there any more is put among what was skipped, as `vanished`.
        root: The folder, as it was named.
        files: Paths in it, absolute, links of the folder followed.
        ignored: See `walk`.
    """
    real, met = os.path.realpath(root), set[str]()
    for file in sorted(files):
        path = root / Path(file).relative_to(real)
        if reason := shut_out(root, file, ignored):
            _skip(listing, path, file, reason, "excluded")
        elif _is_of_storage(file):
            listing.storages.append(file)
        elif path.is_dir():
            for below in _below(listing, root, real, path, ignored):
                _look_within(listing, met, root, real, below, ignored)
        else:
            _look_within(listing, met, root, real, path, ignored)


def shut_out(root: Path, file: str, ignored: Ignored | None = None) -> str | None:
    """Why `walk` would not come to a file (or folder), None where it would: a folder above it is left out, or it is.

    Args:
        root: The folder walked, as it was named.
        file: A path in it, absolute, links of the folder followed; it need not exist.
        ignored: See `walk`.
    """
    real = os.path.realpath(root)
    at, parts = root, Path(file).relative_to(real).parts
    for number, part in enumerate(parts, 1):
        at = at / part
        folder = number < len(parts) or (at.is_dir() and not _is_link(at))
        reason = _left_out(at) if folder or (at.is_dir() and _is_link(at)) else None
        if reason is None and ignored is not None:
            reason = ignored(os.path.join(real, *parts[:number]), folder)  # noqa: PTH118
        if reason is not None:
            return reason
    return None


def _look_within(listing: Listing, met: set[str], root: Path, real: str, path: Path, ignored: Ignored | None) -> None:
    within = path.relative_to(root)
    file = os.path.join(real, within)  # noqa: PTH118
    if ignored is not None and (reason := ignored(file, False)):
        _skip(listing, path, file, reason, "excluded")
    else:
        _look(listing, met, path, shown(within).replace(os.sep, "/"), file)


def _below(listing: Listing, root: Path, real: str, start: Path, ignored: Ignored | None) -> Iterator[Path]:
    """Paths of the files of a folder and those below, in order of name; the files of a folder before its folders."""

    def file_of(path: Path) -> str:
        return os.path.join(real, path.relative_to(root))  # noqa: PTH118

    waiting = [start]  # no recursion: folders may be nested deeper than Python calls
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            _skip(listing, here, file_of(here), _said(error), "unlisted")
            continue
        if holds_storage(here):
            listing.storages.extend(file_of(here / entry.name) for entry in found if is_part(entry.name))
            found = [entry for entry in found if not is_part(entry.name)]
            _skip(listing, here, file_of(here), "a storage: its own files are no documents", "storage")
        folders = []
        for entry in found:
            path = here / entry.name
            if not _is_folder(entry):
                yield path
            elif reason := _left_out(path) or (ignored(file_of(path), True) if ignored else None):
                _skip(listing, path, file_of(path), reason, "excluded")
            else:
                folders.append(path)
        waiting.extend(reversed(folders))


def _is_of_storage(path: str) -> bool:
    whole = Path(path)
    return any(holds_storage(parent) and is_part(whole.parts[len(parent.parts)]) for parent in whole.parents)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere, or in a circle
        return False


def _left_out(folder: Path) -> str | None:
    if _is_link(folder):
        return "a link to a folder; name the folder to read it"
    if folder.name.startswith("."):
        return "a hidden folder; name it to read it"
    if folder.name in _MADE or os.path.lexists(folder / "pyvenv.cfg"):
        return "a folder of a program's own; name it to read it"
    return None


def _is_link(path: str | Path) -> bool:
    return os.path.islink(path)  # noqa: PTH114 - pathlib raises where the folder may not be entered


def _look(listing: Listing, met: set[str], path: Path, name: str, file: str) -> None:
    """Put a file into the listing, or say why not."""
    if file in met:
        return  # named twice
    met.add(file)
    try:
        status = path.stat()
    except OSError as error:
        _skip(listing, path, file, _said(error), "special" if _is_link(path) else _kind(error))
        return
    if not stat.S_ISREG(status.st_mode):
        _skip(listing, path, file, _SPECIAL.get(stat.S_IFMT(status.st_mode), "no plain file"), "special")
    elif reader_of(path) is None:
        suffix = shown(path.suffix.lower())
        _skip(listing, path, file, f"kind of file is not read: {suffix or 'a name without an ending'}", "unknown")
    elif package := missing_package(path):
        _skip(listing, path, file, f"{package} is not there: pip install 'compllm-rag[readers]'", "reader")
    else:
        listing.files.append(FoundFile(path, name, file, status.st_size))


def skipped_by(error: OSError, path: Path, file: str) -> SkippedFile:
    """What to say of a file that could not be opened or read."""
    return SkippedFile(shown(path), _said(error), _kind(error), file)


def _skip(listing: Listing, path: Path, file: str, reason: str, kind: SkipKind) -> None:
    listing.skipped.append(SkippedFile(shown(path), reason, kind, file))


def _kind(error: OSError) -> SkipKind:
    return "vanished" if error.errno in (errno.ENOENT, errno.ENOTDIR) else "unreadable"


def _said(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "a link that leads to itself"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "a link to nothing" if _is_link(error.filename or "") else "it is not there any more"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "permission denied"
    return (error.strerror or type(error).__name__).lower()


def _no_path(path: Path, what: str = "path does not exist") -> CorpusPathError:
    return CorpusPathError(what, got=shown(path), expected="a file or a folder", next_step="check the spelling")
