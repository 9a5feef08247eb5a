"""`compllm-rag watch`: folders whose changes are in the answers seconds later."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compllm_rag.cli.base import (
    AsJson,
    CodecName,
    CompressorName,
    EntryLayer,
    Offline,
    ReaderName,
    Storage,
    or_none,
    print_json,
    progress_show,
    reported,
)
from compllm_rag.config import DEFAULT_EMBEDDER, DEFAULT_LLM

if TYPE_CHECKING:
    from compllm_rag.llamaindex.watching.batch import WatchBatch

_MOST_PROBLEMS = 10


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(reported(watch))


def watch(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders, with all below them.")],
    storage: Storage,
    once: Annotated[
        bool, typer.Option("--once", help="Bring the storage up to date and end, for cron; 2 if files could be missed.")
    ] = False,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="PATTERN", help="As a line of a .gitignore; !PATTERN lets in. Repeatable."),
    ] = None,
    gitignore: Annotated[bool, typer.Option(help="Leave out what .gitignore and .git/info/exclude name.")] = True,
    quiet_s: Annotated[
        float, typer.Option("--quiet-s", help="Seconds without a change after which changes are brought in.")
    ] = 0.3,
    llm: Annotated[str | None, typer.Option(help=f"Target LLM of a new storage [{DEFAULT_LLM}].")] = None,
    embedder: Annotated[str | None, typer.Option(help=f"Embedder of a new storage [{DEFAULT_EMBEDDER}].")] = None,
    rate: Annotated[float | None, typer.Option(help="Compression rate of a new storage.")] = None,
    reader: ReaderName = "auto",
    compressor: CompressorName = "auto",
    codec: CodecName = None,
    entry_layer: EntryLayer = None,
    chunk_size: Annotated[int | None, typer.Option(help="Tokens per chunk of a new storage, about [200].")] = None,
    encoding: Annotated[str | None, typer.Option(help="fp16, int8 or int4, of a new storage [fp16].")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto (the checkpoint's).")] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", help="Tenant, one of several in this folder that share nothing.")
    ] = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Keep a storage as the files of some folders are: all of them at first, then what changes.

    Each step reads the files that changed, and compresses the chunks of them that are new. Ctrl-C finishes the step.

    Example: compllm-rag watch docs/ --storage storage
    """
    from compllm_rag.llamaindex.watching.folders import check_watched

    check_watched(folders)
    from compllm_rag.llamaindex.index import ConceptIndex
    from compllm_rag.llamaindex.watching.watcher import Watcher

    def tell(batch: WatchBatch) -> None:
        show.close()
        print_json(batch.fields()) if as_json else _tell(batch)

    with (
        progress_show(as_json) as show,
        ConceptIndex.create(
            storage,
            progress=show.fetching,
            namespace=namespace,
            llm=llm,
            embedder=embedder,
            rate=rate,
            reader=or_none(reader),
            compressor=or_none(compressor),
            codec=codec,
            entry_layer=entry_layer,
            chunk_size=chunk_size,
            encoding=encoding,
            dtype=dtype,
            offline=offline,
        ) as index,
        Watcher(index, folders, ignore=ignore or (), gitignore=gitignore, quiet_s=quiet_s) as watcher,
    ):
        if once:
            tell(watcher.sync(progress=show.ingested, strict=True))
            return
        with _until_interrupted() as stop:
            watcher.run(
                stop,
                tell,
                progress=show.ingested,
                on_wait=lambda error: typer.echo(f"waiting: {' '.join(str(error).split())}", err=True),
            )
    if not as_json:
        typer.echo("stopped; everything that was brought in is kept", err=True)


@contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C, or a request to end, sets; the second Ctrl-C interrupts."""
    stop = threading.Event()

    def asked(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        typer.echo("finishing what is being brought in; Ctrl-C again ends at once", err=True)

    former = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _tell(batch: WatchBatch) -> None:
    for problem in batch.problems[:_MOST_PROBLEMS]:
        line = f"left out: {problem.path}: {problem.what}"
        typer.echo("".join(char if char.isprintable() else ascii(char)[1:-1] for char in line), err=True)
    if len(batch.problems) > _MOST_PROBLEMS:
        typer.echo(f"... and {len(batch.problems) - _MOST_PROBLEMS} more; --json names them", err=True)
    since = "" if batch.edit_s is None else f", answerable {batch.edit_s:.1f} s after the edit"
    typer.echo(
        f"{'all files' if batch.full else 'changes'}: {batch.files} files read, {batch.documents_changed} documents "
        f"new or changed, {batch.documents_deleted} deleted; {batch.chunks_added} of their {batch.chunks} chunks "
        f"encoded, {batch.chunks_total} in all; {batch.seconds:.1f} s{since}"
    )
