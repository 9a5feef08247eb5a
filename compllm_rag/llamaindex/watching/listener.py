"""Hears of changes in folders, in a thread of its own, so that none is missed while others are being worked on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from compllm_rag.errors import MissingExtraError, UnreadableFileError

try:
    from watchfiles import Change, watch
except ModuleNotFoundError as missing:  # pragma: no cover - with the extra it is there
    raise MissingExtraError(
        "watching a folder needs watchfiles", got="no such package", next_step="pip install 'compllm-rag[watch]'"
    ) from missing

_START_S = 30.0
_LOOK_MS = 100  # how often the thread looks whether it should end
_PATIENCE = 10  # quiet times after which changes are told although they go on


class Listener:
    """Paths that changed, each with the time at which it was first heard of; collected from `start` on.

    Args:
        roots: Folders, absolute, links followed.
        wanted: Which paths matter; asked in the thread.
        quiet_s: Changes are told once nothing has changed for so long, or after ten times that.
    """

    def __init__(self, roots: Sequence[str], wanted: Callable[[str], bool], quiet_s: float) -> None:
        self._roots, self._wanted, self._quiet_ms = list(roots), wanted, max(1, round(1000 * quiet_s))
        self._heard: dict[str, float] = {}
        self._news = threading.Condition()
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._listen, name="compllm-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait(_START_S)
        self._check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(_START_S)

    def take(self, timeout: float) -> dict[str, float]:
        """What changed since the last call, after waiting for it; nothing when time runs out.

        Raises:
            UnreadableFileError: The folders cannot be watched (any more).
        """
        with self._news:
            self._news.wait_for(lambda: self._heard or self._error, timeout)
            self._check()
            heard, self._heard = self._heard, {}
        return heard

    def put_back(self, changes: Mapping[str, float]) -> None:
        """Changes that could not be dealt with: they are told again."""
        with self._news:
            self._heard = {**self._heard, **changes}

    def _check(self) -> None:
        if self._error is not None:
            raise UnreadableFileError(
                "folder cannot be watched",
                got=str(self._error),
                next_step="see that it is there; on Linux, `sysctl fs.inotify.max_user_watches` may be too low",
            ) from self._error

    def _listen(self) -> None:
        try:
            changes = watch(
                *self._roots,
                watch_filter=None,
                debounce=_PATIENCE * self._quiet_ms,
                step=self._quiet_ms,
                rust_timeout=_LOOK_MS,
                yield_on_timeout=True,
                stop_event=self._stop,
                raise_interrupt=False,
                ignore_permission_denied=True,
            )
            for batch in changes:
                now = time.time()
                # A folder changes with what lies in it, which is told as well.
                paths = {
                    path
                    for change, path in batch
                    if self._wanted(path) and not (change == Change.modified and os.path.isdir(path))  # noqa: PTH112
                }
                with self._news:
                    for path in paths:
                        self._heard.setdefault(path, now)
                    self._ready.set()  # the first look is over, so nothing is missed from now on
                    self._news.notify_all()
        except Exception as error:  # noqa: BLE001 - whatever it is, whoever waits has to hear of it
            with self._news:
                self._error = error
                self._ready.set()
                self._news.notify_all()
