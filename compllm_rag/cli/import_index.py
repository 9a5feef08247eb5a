"""`import-index`: an index that LlamaIndex persisted becomes a storage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("import-index")(reported(import_index))


def import_index(
    persist_dir: Annotated[
        Path, typer.Argument(metavar="PERSIST_DIR", help="Folder that `storage_context.persist` wrote.")
    ],
    storage: Storage,
    embedder: Annotated[
        str | None, typer.Option(help=f"Embedder that the index was made with. Default: {DEFAULT_EMBEDDER}.")
    ] = None,
    index_id: Annotated[str | None, typer.Option(help="Which index, where there are several.")] = None,
    later: Annotated[
        bool,
        typer.Option(
            "--later",
            help="Leave the concepts to the next process that opens the storage for writing; until then text is read.",
        ),
    ] = False,
    llm: Annotated[
        str | None, typer.Option(help=f"Target LLM: alias, folder or org/name@revision [{DEFAULT_LLM}].")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto|information|learned",
            help="Source tokens per concept, or what chooses them by the text [1 for deep concepts, 2 for input].",
        ),
    ] = None,
    reader: ReaderName = "auto",
    compressor: CompressorName = "auto",
    codec: CodecName = None,
    entry_layer: EntryLayer = None,
    encoding: Annotated[
        str | None, typer.Option(help="How concepts are kept: fp16, int8 (half the bytes) or int4 (a quarter) [fp16].")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", help="Tenant, one of several in this folder.")] = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Take an index over that LlamaIndex persisted: text and vectors as they are, nothing is embedded again.

    Interrupted? Run the same command again. Example: compllm-rag import-index ./persisted --storage storage
    """
    from compllm_rag.llamaindex.importing import import_index as run

    with progress_show(as_json) as show:
        report = run(
            persist_dir,
            storage,
            embedder=embedder,
            index_id=index_id,
            later=later,
            progress=show.fetching,
            namespace=namespace,
            llm=llm,
            rate=rate,
            reader=or_none(reader),
            compressor=or_none(compressor),
            codec=codec,
            entry_layer=entry_layer,
            encoding=encoding,
            dtype=dtype,
            offline=offline,
        )
    if as_json:
        print_json(report.fields())
        return
    typer.echo(
        f"{report.nodes} nodes of {report.documents} documents ({report.nodes_added} new), their vectors taken over; "
        f"{report.chunks_queued} still to be compressed; {report.seconds:.1f} s"
    )
    if report.chunks_failed:
        typer.echo(f"{report.chunks_failed} chunks could not be compressed and are read as text", err=True)
    elif report.chunks_queued:
        typer.echo(f"They are read as text until then: the next ingest into {storage} makes their concepts")
