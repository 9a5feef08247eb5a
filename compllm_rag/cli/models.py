"""The models that have an alias, and those that were trained: `compllm-rag models list | fetch | export | push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compllm_rag.cli.base import AsJson, print_json, progress_show, reported
from compllm_rag.config import DEFAULT_EMBEDDER, DEFAULT_LLM
from compllm_rag.errors import ConfigurationError

models_app = typer.Typer(no_args_is_help=True, help="The models that answer to an alias: list them, fetch them.")
Llm = Annotated[str, typer.Option(help="Target LLM: alias, folder or org/name@revision.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(models_app, name="models")
    for name, command in (
        ("list", models_list),
        ("fetch", models_fetch),
        ("export", export_model),
        ("push", push_model),
    ):
        models_app.command(name)(reported(command))


def models_list(as_json: AsJson = False) -> None:
    """List the aliases: what each is for, its licence, and whether it is fetched."""
    from compllm_rag.models import list_models

    found = list_models()
    if as_json:
        print_json([{**vars(m), "path": str(m.path) if m.path else None} for m in found])
        return
    for m in found:
        typer.echo(f"{m.alias}  ({m.licence}, {'fetched' if m.fetched else 'not fetched'})\n    {m.role}")


def models_fetch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Aliases or org/name@revision.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch models into the user's cache and verify them; without names the two defaults."""
    from compllm_rag.models import resolve_model

    found = []
    with progress_show(as_json) as show:
        for name in names or [DEFAULT_LLM, DEFAULT_EMBEDDER]:
            files = resolve_model(name, progress=show.fetching, verify=True)
            found.append({"model": name, "path": str(files.path), "digests": files.digests})
    if as_json:
        print_json(found)
        return
    for entry in found:
        typer.echo(f"{entry['model']}  verified  {entry['path']}")


def export_model(
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint goes.")],
    llm: Llm = DEFAULT_LLM,
    reader_adapter: Annotated[
        str, typer.Option("--reader", help="Folder of a reader adapter; auto: the shipped one; none.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    deep: Annotated[
        bool, typer.Option("--deep", help="So that vLLM reads deep concepts, with this package installed beside it.")
    ] = False,
    compressor: Annotated[
        str, typer.Option(help="With --deep: folder of their compressor; auto: the shipped one; none: untrained.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Write the LLM with its reader merged as an ordinary checkpoint, for vLLM and the like.

    Example: compllm-rag models export smollm2-with-reader
    """
    from compllm_rag.training.exporting import export_checkpoint, export_deep_checkpoint

    if compressor != "auto" and not deep:
        raise ConfigurationError(
            "an ordinary checkpoint has no compressor", got=f"--compressor {compressor}", next_step="add --deep"
        )
    reader = None if reader_adapter == "none" else reader_adapter
    with progress_show(as_json) as show:
        if deep:
            own = None if compressor == "none" else compressor
            path = export_deep_checkpoint(
                folder, llm, reader=reader, compressor=own, dtype=dtype, progress=show.fetching
            )
        else:
            path = export_checkpoint(folder, llm, reader=reader, dtype=dtype, progress=show.fetching)
    if as_json:
        print_json({"path": str(path)})
        return
    typer.echo(f"written: {path}")


def push_model(
    folder: Annotated[Path, typer.Argument(help="The best/ folder of a training run.")],
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a trained reader or compressor with its model card to the hub, with your own token.

    Example: compllm-rag models push runs/compressor/best me/my-compressor
    """
    from compllm_rag.compression.pretrained import push_folder

    commit = push_folder(folder, repo_id, private=private)
    if as_json:
        print_json({"repo_id": repo_id, "commit": commit})
        return
    typer.echo(f"uploaded: {repo_id}@{commit}")
