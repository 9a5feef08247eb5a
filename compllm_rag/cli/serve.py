"""The commands of the HTTP server: `serve`, and `keys add | list | remove`."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compllm_rag.cli.base import (
    STORAGE_VARIABLE,
    AsJson,
    CodecName,
    GeneratorAddress,
    Offline,
    print_json,
    progress_show,
    reported,
)
from compllm_rag.cli.flags import flagged
from compllm_rag.cli.reading import (
    MissingName,
    NarrowingName,
    PolicyName,
    PositionBudget,
    PrefillBudget,
    ReadRate,
    RelevanceCutoff,
    RelevanceName,
    TtftBudget,
    read_options,
)
from compllm_rag.config import DEFAULT_EMBEDDER, DEFAULT_LLM
from compllm_rag.errors import ConfigurationError, MissingExtraError
from compllm_rag.server.settings import ServerSettings

if TYPE_CHECKING:
    from compllm_rag.server.keys import KeyFile

Keys = Annotated[Path, typer.Option("--api-keys", help="File of the API keys.")]
_NEEDED = ("fastapi", "multipart", "sse_starlette", "uvicorn")


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(reported(flagged()(serve), interrupted="ended"))
    group = typer.Typer(no_args_is_help=True, help="The API keys of a server: add one, list them, remove one.")
    group.command("add")(reported(add))
    group.command("list")(reported(list_all))
    group.command("remove")(reported(remove))
    app.add_typer(group, name="keys")


def serve(
    settings: ServerSettings,
    storage: Annotated[Path, typer.Argument(metavar="STORAGE", envvar=STORAGE_VARIABLE, help="Folder of the storage.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's need --api-keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    keys: Annotated[Path | None, typer.Option("--api-keys", help="File of API keys; see `compllm-rag keys`.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="A further name by which clients may call it; repeat it.")
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Take no documents.")] = False,
    create: Annotated[bool, typer.Option("--create", help="Make the storage where there is none.")] = False,
    llm: Annotated[
        str, typer.Option(help="Of a storage that is made: alias, folder or org/name@revision.")
    ] = DEFAULT_LLM,
    embedder: Annotated[str, typer.Option(help="Of a storage that is made.")] = DEFAULT_EMBEDDER,
    codec: CodecName = None,
    concept_store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="redis://HOST:PORT/NUMBER: concepts of a storage that is made are kept there; for one that keeps them "
            "in Redis already, where that is now.",
        ),
    ] = None,
    generator: GeneratorAddress = None,
    rate: ReadRate = None,
    narrow: NarrowingName = None,
    read_policy: PolicyName = None,
    relevance: RelevanceName = None,
    relevance_cutoff: RelevanceCutoff = None,
    position_budget: PositionBudget = None,
    prefill_budget: PrefillBudget = None,
    ttft_budget: TtftBudget = None,
    missing: MissingName = "recompress",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto (the checkpoint's).")] = None,
    offline: Offline = False,
) -> None:
    """Serve a storage over HTTP: documents, answers, chats, an OpenAI-compatible API and a page.

    What says how passages are read (`--rate`, `--read-policy`, budgets, ...) holds for all answers.

    Example: compllm-rag serve storage
    """
    _check_installed()
    from compllm_rag.generation.address import check_generator
    from compllm_rag.server.registry import Registry
    from compllm_rag.server.serving import bound_socket, checked_keys, make_server

    known = checked_keys(keys, host)
    check_generator(generator)
    reading = read_options(
        rate, read_policy, position_budget, prefill_budget, ttft_budget, missing, relevance, narrow, relevance_cutoff
    )
    if create and read_only:
        raise ConfigurationError("--create and --read-only exclude each other", got="both", next_step="leave one out")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for chatty in ("uvicorn", "httpx", "sentence_transformers", "faiss"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    options: dict[str, Any] = {"dtype": dtype, "offline": offline}
    if concept_store:  # an empty one is what compose makes of a variable that is not set
        options["concept_store"] = concept_store
    with bound_socket(host, port) as bound, progress_show(False) as show:
        new = {"llm": llm, "embedder": embedder, "codec": codec, "progress": show.fetching, **options}
        registry = Registry(
            storage,
            settings,
            read_only=read_only,
            create=new if create else None,
            generator=generator,
            reading={name: value for name, value in reading.items() if value != "recompress"},
            progress=show.fetching,
            **options,
        )
        try:
            registry.start()
            show.close()
            make_server(registry, host=host, keys=known, allowed_hosts=allow_host or ()).run(sockets=[bound])
        finally:
            registry.close()  # a second time, where the application has ended as it should


def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is; it stands in logs.")],
    keys: Keys,
    namespace: Annotated[str | None, typer.Option(help="The one it belongs to; default: default.")] = None,
    rights: Annotated[
        str, typer.Option(help="write (and read), read, or metrics: /metrics of all namespaces, and nothing else.")
    ] = "write",
    as_json: AsJson = False,
) -> None:
    """Make an API key and print it, this once: the file holds its digest only.

    Example: compllm-rag keys add alice --api-keys keys.json --namespace acme
    """
    if rights not in ("read", "write", "metrics"):
        raise ConfigurationError("unknown rights", got=rights, expected="read, write or metrics")
    if rights == "metrics" and namespace is not None:
        raise ConfigurationError(
            "a key for metrics belongs to no namespace", got="--namespace", next_step="leave it out"
        )
    from compllm_rag.server.keys import DEFAULT_NAMESPACE

    namespace = DEFAULT_NAMESPACE if namespace is None else namespace
    key = _file(keys).add(name, namespace, rights)  # type: ignore[arg-type]
    print_json({"name": name, "key": key}) if as_json else typer.echo(key)


def list_all(keys: Keys, as_json: AsJson = False) -> None:
    """List the API keys of a file: names, namespaces and rights.

    Example: compllm-rag keys list --api-keys keys.json
    """
    found = [key.model_dump(exclude={"sha256"}) for key in _file(keys).keys]
    if as_json:
        print_json(found)
        return
    for one in found:
        where = "all namespaces" if one["rights"] == "metrics" else one["namespace"]
        typer.echo(f"{one['name']}  {one['rights']}  {where}  {one['created']}")


def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")], keys: Keys, as_json: AsJson = False
) -> None:
    """Remove an API key; a running server refuses it from now on.

    Example: compllm-rag keys remove alice --api-keys keys.json
    """
    gone = _file(keys).remove(name)
    print_json({"removed": gone.name}) if as_json else typer.echo(f"removed {gone.name}")


def _file(path: Path) -> KeyFile:
    from compllm_rag.server.keys import KeyFile

    return KeyFile(path)


def _check_installed() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            "the HTTP server needs packages that are not installed",
            got=f"no {', '.join(missing)}",
            expected="the extra `server`",
            next_step="pip install 'compllm-rag[server]'",
        )
