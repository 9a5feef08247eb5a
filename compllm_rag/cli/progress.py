"""Progress on the terminal: standard error only, so that standard output stays clean for results."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from compllm_rag.llamaindex.corpus import IngestReport


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
        self._last = self._phase = ""

    def fetching(self, message: str, share: float | None) -> None:
        """Show a message with a share from 0 to 1, None where unknown."""
        self._show(message, share)

    def ingested(self, report: IngestReport, share: float | None = None) -> None:
        """Show a running ingest on a terminal; in a log the sum at the end says it all.

        Args:
            report: What was done so far.
            share: Of the bytes to read, from 0 to 1; None where unknown.
        """
        if not self.console.is_terminal:
            return
        self._show(
            f"{report.documents} documents, {report.source_tokens} tokens: {report.segments_compressed} segments "
            f"compressed, {report.segments_reused} reused",
            share,
            phase="ingest",
        )

    def _show(self, message: str, share: float | None, phase: str = "") -> None:
        if self.quiet:
            return
        if not self.console.is_terminal:
            if message != self._last:
                self.console.print(message, highlight=False)
            self._last = message
            return
        if self._live is None:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("to go:"),
                TimeRemainingColumn(),
            )
            self._live = Progress(*columns, console=self.console, transient=True)
            self._live.start()
            self._live.add_task(message, total=None)
        task = self._live.task_ids[0]
        total = None if share is None else 1.0
        # Within a phase the clock runs on: how long it has taken so far says how long it will take.
        if (phase or message) != self._phase:
            self._live.reset(task, description=message, total=total)
        self._live.update(task, description=message, total=total, completed=share or 0.0)
        self._last, self._phase = message, phase or message

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
