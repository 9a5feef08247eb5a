"""What of a folder is no document, although it could be read: what `.gitignore` names, and what programs leave.

The rules are git's: the last pattern that matches decides, a file in a deeper folder before one further up, and what
lies in a folder that is left out cannot be let in. They stand in `.gitignore` of each folder up to the top of the
repository, and in its `.git/info/exclude`. Weaker than they are the defaults, stronger are the patterns of the user.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from compllm_rag.errors import ConfigurationError, MissingExtraError

try:
    from pathspec import GitIgnoreSpec
except ModuleNotFoundError as missing:  # pragma: no cover - with the extra it is there
    raise MissingExtraError(
        "watching a folder needs pathspec", got="no such package", next_step="pip install 'compllm-rag[watch]'"
    ) from missing

FILE = ".gitignore"
# Drafts and copies of editors and downloads; what package managers and minifiers write.
DEFAULTS = """
*~
.#*
\\#*#
~$*
*.swp
*.swo
*.swx
4913
*.tmp
*.temp
*.part
*.crdownload
*.bak
*.orig
*.rej
*.min.js
*.min.css
package-lock.json
npm-shrinkwrap.json
pnpm-lock.yaml
"""
_MOST_BYTES = 2**20


class IgnoreRules:
    """Tells whether a file or folder is left out; it is taken for granted that the folders above it are not.

    Args:
        root: The folder watched, absolute, links followed.
        patterns: More of them, as in a `.gitignore` of this folder; `!PATTERN` lets in what others leave out.
        gitignore: Whether to heed the files of git.

    Raises:
        ConfigurationError: A pattern can be none.
    """

    def __init__(self, root: str, patterns: Iterable[str] = (), *, gitignore: bool = True) -> None:
        self._root, self._gitignore = root, gitignore
        self._own, self._defaults = _checked(patterns), GitIgnoreSpec.from_lines(DEFAULTS.splitlines())
        self._top = _top(root) if gitignore else root
        self._specs: dict[str, GitIgnoreSpec | None] = {}

    def forget(self) -> None:
        """Read the files again when they are needed: one has changed."""
        self._specs.clear()

    def __call__(self, file: str, folder: bool) -> str | None:
        """Why a path is left out, None where it is not.

        Args:
            file: Absolute, links of the folder watched followed.
            folder: Whether it is one.
        """
        for base, spec, name in self._layers(file):
            within = os.path.relpath(file, base).replace(os.sep, "/")
            verdict = spec.check_file(f"{within}/" if folder else within).include
            if verdict is not None:
                return f"left out by {name}" if verdict else None
        return None

    def _layers(self, file: str) -> Iterator[tuple[str, GitIgnoreSpec, str]]:
        """Folder, rules and name of each set of rules, the strongest first."""
        yield self._root, self._own, "--ignore"
        if self._gitignore:
            here = os.path.dirname(file)  # noqa: PTH120
            while True:
                spec = self._spec(os.path.join(here, FILE))  # noqa: PTH118
                if spec is not None:
                    yield here, spec, f"{FILE}"
                if here == self._top or len(here) <= len(self._top):
                    break
                here = os.path.dirname(here)  # noqa: PTH120
            spec = self._spec(os.path.join(self._top, ".git", "info", "exclude"))  # noqa: PTH118
            if spec is not None:
                yield self._top, spec, ".git/info/exclude"
        yield self._root, self._defaults, "the rules for what programs leave; --ignore '!NAME' lets it in"

    def _spec(self, path: str) -> GitIgnoreSpec | None:
        if path not in self._specs:
            self._specs[path] = _read(path)
        return self._specs[path]


def _checked(patterns: Iterable[str]) -> GitIgnoreSpec:
    given = list(patterns)
    for pattern in given:
        try:
            GitIgnoreSpec.from_lines([pattern])
        except ValueError as error:
            raise ConfigurationError(
                "this is no pattern of files to ignore", got=repr(pattern), expected="a line as in a .gitignore"
            ) from error
    return GitIgnoreSpec.from_lines(given)


def _top(root: str) -> str:
    """The top of the repository that a folder lies in; the folder itself where it is in none."""
    for folder in (Path(root), *Path(root).parents):
        if os.path.lexists(folder / ".git"):
            return str(folder)
    return root


def _read(path: str) -> GitIgnoreSpec | None:
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            lines = file.read(_MOST_BYTES).decode("utf-8", "surrogateescape").splitlines()
    except OSError:  # there is none, or it may not be read: git goes on as well
        return None
    try:
        return GitIgnoreSpec.from_lines(lines)
    except ValueError:
        return GitIgnoreSpec.from_lines([line for line in lines if _is_pattern(line)])


def _is_pattern(line: str) -> bool:
    try:
        GitIgnoreSpec.from_lines([line])
    except ValueError:
        return False
    return True
