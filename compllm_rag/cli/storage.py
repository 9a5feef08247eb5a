"""The commands that look after a storage: `verify`, `repair`, `compact`, `migrate`, `export`, `import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compllm_rag.cli.base import LOST, STORAGE_VARIABLE, AsJson, Offline, print_json, progress_show, reported

UNSOUND = 1  # exit code of a verification that found something; 2 is for errors

StorageFolder = Annotated[
    Path, typer.Argument(metavar="STORAGE", envvar=STORAGE_VARIABLE, help="Folder of the storage.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (verify, repair, compact, migrate):
        app.command()(reported(command))
    app.command("export")(reported(export, interrupted=LOST))
    app.command("import")(reported(import_, interrupted=LOST))


def verify(
    storage: StorageFolder,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every row and every payload, and prove all digests.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look for damage. Ends with 0 when the storage is sound, with 1 when it is not. Writes nothing, loads no model.

    Example: compllm-rag verify storage --deep
    """
    from compllm_rag.storage.verification import verify_storage

    with progress_show(as_json) as show:
        check = verify_storage(storage, deep=deep, progress=show.fetching)
    if as_json:
        print_json(check.fields())
    else:
        for finding in check.findings:
            typer.echo(f"{finding.part}: {finding.what}")
        if check.n_findings > len(check.findings):
            typer.echo(f"... and {check.n_findings - len(check.findings)} more")
        typer.echo(
            f"{'sound' if check.sound else 'DAMAGED'}: {check.documents} documents, {check.chunks} chunks, "
            f"{check.records} concept records in {check.pack_bytes} bytes, {check.dead_bytes} of them dead"
            + ("" if check.dead_records is None else f"; {check.dead_records} records nothing refers to")
        )
        if not check.sound:
            typer.echo(f"Next step: compllm-rag repair {storage}")
    if not check.sound:
        raise typer.Exit(UNSOUND)


def repair(
    storage: StorageFolder,
    llm: Annotated[
        str | None, typer.Option(help="Where the target LLM lies now [the storage's own name for it].")
    ] = None,
    embedder: Annotated[str | None, typer.Option(help="The same for the embedder.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto (the checkpoint's).")] = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Make a damaged storage whole again from its text: vectors are embedded, concepts compressed again where needed.

    Example: compllm-rag repair storage
    """
    from compllm_rag.llamaindex.repair import repair_storage

    with progress_show(as_json) as show:
        report = repair_storage(
            storage, llm=llm, embedder=embedder, dtype=dtype, offline=offline, progress=show.fetching
        )
    if as_json:
        print_json(report.fields())
    elif not report.findings:
        typer.echo("sound: nothing to repair")
    else:
        typer.echo(
            f"{report.findings} findings: {report.records_dropped} concept records dropped, "
            f"{report.segments_compressed} segments compressed again, {report.chunks_reembedded} chunks embedded again"
        )
        if report.chunks_lost:
            typer.echo(f"{report.chunks_lost} chunks lost their text. Ingest these documents again:")
            for doc_id in report.documents_lost:
                typer.echo(f"  {doc_id}")
    if not report.sound:
        typer.echo(f"not all of it could be repaired. Next step: compllm-rag verify {storage} --deep", err=True)
        raise typer.Exit(UNSOUND)


def compact(storage: StorageFolder, as_json: AsJson = False) -> None:
    """Reclaim the space of what was deleted or replaced. May be killed and run again at any time.

    Example: compllm-rag compact storage
    """
    from compllm_rag.storage.compaction import compact_storage

    with progress_show(as_json) as show:
        report = compact_storage(storage, progress=show.fetching)
    if as_json:
        print_json(report.fields())
        return
    typer.echo(
        f"{report.concepts.records_dropped} of {report.concepts.records + report.concepts.records_dropped} concept "
        f"records dropped; {report.bytes_before} bytes before, {report.bytes_after} now"
    )


def migrate(storage: StorageFolder, as_json: AsJson = False) -> None:
    """Bring a storage to the format of this release; the former one is kept beside it.

    Example: compllm-rag migrate storage
    """
    from compllm_rag.storage.migration import migrate_storage

    with progress_show(as_json) as show:
        show.fetching("looking at the format", None)
        report = migrate_storage(storage)
    if as_json:
        print_json(report.fields())
        return
    if report.changed:
        typer.echo(f"format {report.from_version} before, {report.to_version} now")
        typer.echo(
            f"The former storage, with what will be deleted from the new one, is yours to remove: {report.backup}"
        )
    else:
        typer.echo(f"format {report.to_version}: nothing to do")


_ExportFile = Annotated[Path, typer.Argument(metavar="FILE", help="The export, a tar archive.")]
_OneNamespace = Annotated[str | None, typer.Option("--namespace", help="Only this tenant [all of them].")]


def export(
    storage: Annotated[Path, typer.Argument(metavar="STORAGE", help="Folder of the storage.")],
    file: _ExportFile,
    namespace: _OneNamespace = None,
    as_json: AsJson = False,
) -> None:
    """Write a storage into one file, whoever writes to it meanwhile. The file is there as a whole, or not at all.

    Example: compllm-rag export storage backup.tar
    """
    from compllm_rag.storage.exporting import export_storage

    with progress_show(as_json) as show:
        made = export_storage(storage, file, namespace=namespace, progress=show.fetching)
    if as_json:
        print_json(made.fields())
        return
    typer.echo(
        f"{_tenants(made.namespaces)}, {made.chunks} chunks: {made.files} files of {made.bytes} bytes in {made.file}, "
        f"{made.seconds:.1f} s"
    )


def import_(
    file: _ExportFile,
    storage: Annotated[
        Path, typer.Argument(metavar="STORAGE", help="A new folder, or a storage without these tenants.")
    ],
    namespace: _OneNamespace = None,
    as_json: AsJson = False,
) -> None:
    """Make a storage of an export, proven by its digests; whole or not at all, and nothing is overwritten.

    Example: compllm-rag import backup.tar storage
    """
    from compllm_rag.storage.importing import import_storage

    with progress_show(as_json) as show:
        made = import_storage(file, storage, namespace=namespace, progress=show.fetching)
    if as_json:
        print_json(made.fields())
        return
    typer.echo(
        f"{_tenants(made.namespaces)}: {made.documents} documents, {made.chunks} chunks, {made.bytes} bytes in "
        f"{made.folder}, {made.seconds:.1f} s"
    )


def _tenants(names: tuple[str, ...]) -> str:
    return f"namespace {names[0]}" if len(names) == 1 else f"{len(names)} namespaces"
