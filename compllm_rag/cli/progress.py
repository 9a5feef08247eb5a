"""Progress on the terminal: standard error only, so that standard output stays clean for results."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from compllm_rag.llamaindex.ingest import IngestReport


class ProgressShow:
    """One live line for whatever is going on; plain lines where there is no terminal.

    Args:
        quiet: Show nothing at all.
        console: Where to show; None means standard error.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.quiet = quiet
        self.console = console or Console(stderr=True)
        self._live: Progress | None = None
        self._last = ""

    def fetching(self, message: str, share: float | None) -> None:
        """Show a message with a share from 0 to 1, None where unknown."""
        self._show(message, share)

    def ingested(self, report: IngestReport) -> None:
        """Show a running ingest."""
        self._show(
            f"{report.documents} documents, {report.source_tokens} tokens: {report.segments_compressed} segments "
            f"compressed, {report.segments_reused} reused",
            None,
        )

    def _show(self, message: str, share: float | None) -> None:
        if self.quiet:
            return
        if not self.console.is_terminal:
            if message != self._last:
                self.console.print(message, highlight=False)
            self._last = message
            return
        if self._live is None:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._live = Progress(*columns, console=self.console, transient=True)
            self._live.start()
            self._live.add_task(message, total=None)
        task = self._live.task_ids[0]
        if message != self._last:
            self._live.reset(task, description=message, total=None if share is None else 1.0)
        self._live.update(task, total=None if share is None else 1.0, completed=share or 0.0)
        self._last = message

    def close(self) -> None:
        """Take the line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
