"""What the commands share: options, errors as one line, progress and JSON."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compllm_rag.cli.terminal import can_print
from compllm_rag.errors import CompLLMError

if TYPE_CHECKING:
    from compllm_rag.cli.progress import ProgressShow

# Where the storage lies when no command says it.
STORAGE_VARIABLE = "COMPLLM_STORAGE"

# What runs the LLM when no command says it.
GENERATOR_VARIABLE = "COMPLLM_GENERATOR"

Storage = Annotated[Path, typer.Option("--storage", envvar=STORAGE_VARIABLE, help="Folder of the storage.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.")]
CodecName = Annotated[
    str | None,
    typer.Option(
        help="deep: concepts enter the LLM at a middle layer; input: at its input embeddings, as CompLLM has it [deep]."
    ),
]
GeneratorAddress = Annotated[
    str | None,
    typer.Option(
        "--generator",
        envvar=GENERATOR_VARIABLE,
        help="A server that runs the LLM: vllm:http://HOST:PORT, for text and concepts of --codec input; "
        "vllm-deep:http://HOST:PORT, for deep concepts. Default: this process runs it.",
    ),
]
ReaderName = Annotated[
    str, typer.Option("--reader", help="Folder of a reader adapter, `auto` for the shipped one, or `none`.")
]
CompressorName = Annotated[
    str,
    typer.Option(
        "--compressor",
        help="Folder of a compressor, `auto` for the shipped one, `none` for an untrained.",
    ),
]
EntryLayer = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Layer at which deep concepts enter; where no compressor ships for it they are untrained. Default: the "
        "layer of the one that ships, else half of them.",
    ),
]


def or_none(name: str) -> str | None:
    """The adapter that `--reader` or `--compressor` names; None for `none`."""
    return None if name == "none" else name


KEPT = "interrupted; what was finished is kept, run the same command again to go on"
LOST = "interrupted; nothing was kept"
LOST_WITHOUT_JOURNAL = "interrupted; what was finished is kept where --journal says, without it nothing was"


def reported(command: Callable[..., None], *, interrupted: str = KEPT) -> Callable[..., None]:
    """Print our own errors as one line and exit with 2; a Ctrl-C with 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except CompLLMError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo(interrupted, err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # Whoever read our output has gone; the interpreter must not try to flush it again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:
            # A full disk, a folder that may not be written: the system's own words are the best there are.
            where = f": {error.filename}" if error.filename else ""
            typer.echo(f"error: {error.strerror or error}{where}", err=True)
            raise typer.Exit(2) from None

    return run


def progress_show(quiet: bool) -> ProgressShow:
    """Progress on standard error, nothing at all where results are for a program."""
    from compllm_rag.cli.progress import ProgressShow

    return ProgressShow(quiet=quiet)


def in_words(value: object) -> str:
    """A value as people read it: numbers with three digits behind the point, several things in a row, `-` for none."""
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(each)}" for name, each in value.items()) or "-"
    if isinstance(value, list | tuple):
        return "; ".join(map(in_words, value)) or "-"
    return "-" if value is None else str(value)


def print_json(value: object) -> None:
    """One JSON value on standard output; with escapes where its encoding lacks a character."""
    text = json.dumps(value, ensure_ascii=False)
    typer.echo(text if can_print(text) else json.dumps(value))
