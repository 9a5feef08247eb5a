"""`compllm-rag ingest`: documents into a storage, and at the end what was left out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
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
from compllm_rag.errors import ConfigurationError, UnreadableFileError

if TYPE_CHECKING:
    from compllm_rag.llamaindex.corpus import IngestReport
    from compllm_rag.llamaindex.documents import StdinSource
    from compllm_rag.llamaindex.readers.found import FileNote, SkippedFile

_STDIN = Path("-")
_MOST_LINES = 50  # of what was left out, on a terminal; `--verbose` and `--json` tell all


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(ingest)


@reported
def ingest(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Files or folders; - reads one text from standard input.")
    ],
    storage: Storage,
    llm: Annotated[
        str | None, typer.Option(help=f"Target LLM: alias, folder or org/name@revision [{DEFAULT_LLM}].")
    ] = None,
    embedder: Annotated[str | None, typer.Option(help=f"Retrieval embedder. Default: {DEFAULT_EMBEDDER}.")] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto|information|learned",
            help="Source tokens per concept, or what chooses them by the text [1 for deep concepts, 2 for input].",
        ),
    ] = None,
    also_rate: Annotated[
        list[float] | None,
        typer.Option("--also-rate", help="Keep every chunk at this rate as well; may be given several times."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Most the storage may hold: positions (200000) or bytes (40MB); rates follow from it."),
    ] = None,
    guard: Annotated[
        str | None,
        typer.Option(
            metavar="off|exact|loss",
            help="Leave chunks as text: of digits and identifiers, or of high predicted loss [off].",
        ),
    ] = None,
    guard_limit: Annotated[
        float | None, typer.Option(help="From which share of such characters, or which loss, on.")
    ] = None,
    rate_bands: Annotated[
        str | None,
        typer.Option(metavar="R,R,R,R", help="Of rate information: rates from dense to thin text [1,1.5,3,4]."),
    ] = None,
    rate_window: Annotated[
        int | None, typer.Option(min=2, help="Of rate information: tokens that density is measured over [40].")
    ] = None,
    rate_measure: Annotated[
        str | None,
        typer.Option(
            metavar="unigram|surprisal",
            help="Of rate information: by a table of how rare tokens are, or by the LLM (one more pass) [unigram].",
        ),
    ] = None,
    most_loss: Annotated[
        float | None,
        typer.Option(help="Of rate learned: most predicted loss, in nats per token of an answer [0.1]."),
    ] = None,
    reader: ReaderName = "auto",
    compressor: CompressorName = "auto",
    codec: CodecName = None,
    entry_layer: EntryLayer = None,
    chunk_size: Annotated[int | None, typer.Option(help="Tokens per chunk, about. Default: 200.")] = None,
    encoding: Annotated[
        str | None, typer.Option(help="How concepts are kept: fp16, int8 (half the bytes) or int4 (a quarter) [fp16].")
    ] = None,
    concept_store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="redis://HOST:PORT/NUMBER: keep concepts there, shared with other storages [in the storage].",
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto (the checkpoint's).")] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete documents ingested from these paths that are not there any more.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 2 if a file could not be read; the others are brought in.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Name every file that was left out.")] = False,
    lines: Annotated[bool, typer.Option("--jsonl", help="Standard input is JSON lines, not one text.")] = False,
    key: Annotated[str | None, typer.Option("--id", help="Id of the text from standard input.")] = None,
    title: Annotated[str | None, typer.Option("--title", help="Title of the text from standard input.")] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", help="Tenant, one of several in this folder that share nothing.")
    ] = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Bring documents into a storage; unchanged ones are skipped, changed ones replaced.

    Reads text, Markdown, source code, JSON lines ({"id": ..., "title": ..., "text": ...}), CSV, HTML, PDF, DOCX. What
    cannot be read is left out and named at the end. Interrupted? Run the same command again.

    Example: compllm-rag ingest docs/ --storage storage
    """
    stdin = _stdin(paths, lines=lines, key=key, title=title)
    rate_options = _rate_options(rate_bands, rate_window, rate_measure, most_loss)
    from compllm_rag.llamaindex.documents import FileDocuments

    files = [path for path in paths if path != _STDIN]
    documents = FileDocuments(files, on_skip=lambda skipped: None, stdin=stdin)
    try:
        documents.first_read()
        from compllm_rag.llamaindex.index import ConceptIndex

        with (
            progress_show(as_json) as show,
            ConceptIndex.create(
                storage,
                progress=show.fetching,
                namespace=namespace,
                llm=llm,
                embedder=embedder,
                rate=None if also_rate else rate,
                rates=_rates(rate, also_rate),
                budget=budget,
                guard=guard,
                guard_limit=guard_limit,
                rate_options=rate_options,
                reader=or_none(reader),
                compressor=or_none(compressor),
                codec=codec,
                entry_layer=entry_layer,
                chunk_size=chunk_size,
                encoding=encoding,
                concept_store=concept_store,
                dtype=dtype,
                offline=offline,
            ) as index,
        ):
            total = documents.bytes_total
            report = index.ingest(
                documents,
                progress=lambda report: show.ingested(report, documents.bytes_read / total if total else None),
                within=files,
                prune=prune,
            )
            if len(index.pending):  # uploads that a server left unfinished
                index.uploads.wait(patient=False)
    finally:
        if not as_json:
            _tell(documents.skipped, documents.notes, verbose=verbose)
    if as_json:
        print_json(report.fields())
    else:
        _tell((), report.notes[len(documents.notes) :], verbose=verbose)
        _sum_up(report, prune=prune)
    missed = [one for one in documents.skipped if one.problem]
    if strict and missed:
        raise UnreadableFileError(
            f"{len(missed)} files could not be read, and --strict was given; the others were brought in",
            got=f"{missed[0].path}: {missed[0].reason}",
        )


def _rates(rate: str | None, also: Sequence[float] | None) -> list[float | str] | None:
    """All rates that are asked for, the default of queries first."""
    if not also:
        return None
    if rate is None:
        raise ConfigurationError(
            "--also-rate needs --rate, the one that queries read", got="--also-rate alone", next_step="add --rate 1"
        )
    return [rate, *also]


def _rate_options(
    bands: str | None, window: int | None, measure: str | None, most_loss: float | None
) -> dict[str, Any] | None:
    """The options of rate policies that are asked for; None where none are.

    Raises:
        ConfigurationError: Bands are not four numbers.
    """
    given = {"bands": bands, "window": window, "measure": measure, "most_loss": most_loss}
    found: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if bands is not None:
        try:
            dense, below, above, thin = map(float, bands.split(","))
            found["bands"] = dense, below, above, thin
        except ValueError:
            raise ConfigurationError(
                "--rate-bands cannot be read",
                got=bands,
                expected="four rates from dense to thin text",
                next_step="write them as 1,1.5,3,4",
            ) from None
    return found or None


def _stdin(paths: Sequence[Path], *, lines: bool, key: str | None, title: str | None) -> StdinSource | None:
    """Standard input as a source, where the paths name it.

    Raises:
        ConfigurationError: An option for it makes no sense.
    """
    asked = {"--jsonl": lines, "--id": key is not None, "--title": title is not None}
    named = [name for name, given in asked.items() if given]
    if _STDIN not in paths:
        if named:
            raise ConfigurationError(
                "this is an option for standard input", got=" ".join(named), next_step="name - among the paths"
            )
        return None
    if lines and len(named) > 1:
        raise ConfigurationError(
            "JSON lines have ids and titles of their own", got=" ".join(named), next_step="leave one out"
        )
    if key is not None and not key.strip():
        raise ConfigurationError("an id cannot be empty", got=repr(key), next_step="name the text, or leave it out")
    from compllm_rag.llamaindex.documents import StdinSource

    return StdinSource(sys.stdin.buffer, lines=lines, key=key, title=title or "")


def _tell(skipped: Sequence[SkippedFile], notes: Sequence[FileNote], *, verbose: bool) -> None:
    """What was assumed and what was left out, on standard error: problems by name, the rest by number."""
    named = [one for one in skipped if one.problem or verbose]
    told = [f"note: {note.path}: {note.what}" for note in notes]
    told += [f"left out: {one.path}: {one.reason}" for one in named]
    for line in told if verbose else told[:_MOST_LINES]:
        typer.echo("".join(char if char.isprintable() else ascii(char)[1:-1] for char in line), err=True)
    if len(told) > _MOST_LINES and not verbose:
        typer.echo(f"... and {len(told) - _MOST_LINES} more; --verbose names them", err=True)
    others = [one for one in skipped if not one.problem]
    if others and not verbose:
        kinds = Counter(
            (Path(one.path).suffix.lower() or "without an ending")
            if one.kind == "unknown"
            else one.reason.split(";")[0]
            for one in others
        )
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))
        more = f", {len(kinds) - 8} more kinds" if len(kinds) > 8 else ""
        typer.echo(f"left out as no part of the corpus: {counts}{more}; --verbose names them", err=True)


def _sum_up(report: IngestReport, *, prune: bool) -> None:
    moved = f", {report.documents_moved} of them moved" if report.documents_moved else ""
    deleted = f", {report.documents_deleted} deleted" if prune else ""
    missed = sum(one.problem for one in report.skipped)
    left_out = f"; {missed} files could not be read" if missed else ""
    typer.echo(
        f"{report.documents} documents ({report.documents_changed} new or changed{moved}{deleted}), "
        f"{report.chunks} chunks, {report.segments} segments: {report.segments_compressed} compressed, "
        f"{report.segments_reused} reused; {report.source_tokens} tokens in {report.seconds:.1f} s{left_out}"
    )
