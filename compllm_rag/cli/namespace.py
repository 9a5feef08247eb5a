"""The commands for tenants: `namespace list`, `namespace delete`."""

from __future__ import annotations

from typing import Annotated

import typer

from compllm_rag.cli.base import AsJson, Storage, print_json, reported


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    group = typer.Typer(no_args_is_help=True, help="The tenants of a storage: list them, delete one.")
    group.command("list")(reported(list_all))
    group.command("delete")(reported(delete))
    app.add_typer(group, name="namespace")


def list_all(storage: Storage, as_json: AsJson = False) -> None:
    """List the namespaces of a storage, and where each lies: `verify`, `repair` and `compact` take that path.

    Example: compllm-rag namespace list --storage storage
    """
    from compllm_rag.storage.namespaces import list_namespaces

    found = list_namespaces(storage)
    if as_json:
        print_json([{"namespace": one.name, "path": str(one.path), "bytes": one.bytes} for one in found])
        return
    for one in found:
        name = one.name if one.name is not None else "(its making was interrupted, or it is damaged)"
        typer.echo(f"{name}  {one.bytes} bytes  {one.path}")


def delete(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The namespace.")],
    storage: Storage,
    as_json: AsJson = False,
) -> None:
    """Delete a namespace with all it holds: text, vectors, concepts. There is no way back.

    End processes that have it open first. Example: compllm-rag namespace delete acme --storage storage
    """
    from compllm_rag.storage.namespaces import delete_namespace

    freed = delete_namespace(storage, name)
    if as_json:
        print_json({"namespace": name, "bytes": freed})
        return
    typer.echo(f"deleted {name}: {freed} bytes")
