"""The command that runs benchmarks: `compllm-rag bench`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import runpy
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from compllm_rag.cli_base import reported
from compllm_rag.errors import ConfigurationError

# Their modules are loaded when they run, so that --help answers at once.
BENCHMARKS = {
    "ttft": "Time to first token and KV cache, text against concepts, with the bound and the crossover length.",
    "ingest": "Tokens/s of ingestion, its linearity, memory, bytes per token.",
    "reuse": "Cost per query when passages come again, against text, prefix caching and stored chunk KV.",
    "equal_cost": "Quality over TTFT: text top-k against more passages as concepts.",
    "loft": "Retrieval and answers over a LOFT corpus.",
    "rivals": "Other ways to fill as many positions, on the same passages.",
    "domains": "What is lost in other kinds of text.",
    "quality": "Text, concepts, pruning and nothing on evaluation sets and probes; wants --out FOLDER.",
    "store_read": "Concepts from disk to tensor, against a flat file and other stores.",
    "storage_size": "Bytes per source token of storages, vectors, text and KV cache.",
    "storage_quality": "What fewer bits per concept cost.",
    "edits": "The cost of ingesting a document again after an edit.",
    "startup": "Time until the command line answers.",
}


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command("bench", context_settings=settings, add_help_option=False)(
        reported(bench, interrupted="interrupted; benchmarks that keep parts go on when run again")
    )


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="NAME")] = None,
) -> None:
    """Run a benchmark on the embedded LLM or on your own: `bench` alone lists them, `bench NAME --help` explains one.

    Example: compllm-rag bench ttft --llm my-model --json ttft.json
    """
    if name is None or name.startswith("-"):
        typer.echo("Usage: compllm-rag bench NAME [OPTIONS], with a NAME of:\n")
        for known, what in BENCHMARKS.items():
            typer.echo(f"  {known:<16} {what}")
        typer.echo("\n`compllm-rag bench NAME --help` tells the options of one. Results go to --json FILE.")
        return
    if name not in BENCHMARKS:
        raise ConfigurationError(
            "benchmark unknown",
            got=name,
            expected=f"one of {', '.join(BENCHMARKS)}",
            next_step="compllm-rag bench",
        )
    package = _package()
    words = [str(Path(str(package.__path__[0])) / f"{name}.py"), *context.args]
    printed = io.StringIO()
    before, sys.argv = sys.argv, words
    try:
        # What a benchmark prints is JSON for programs; people get the section of the page below.
        with contextlib.redirect_stdout(printed):
            runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    finally:
        sys.argv = before
        if "-h" in words or "--help" in words:
            typer.echo(printed.getvalue().replace(f"{name}.py", f"compllm-rag bench {name}", 1), nl=False)
    typer.echo(_summary(name, printed.getvalue()), nl=False)


def _package() -> ModuleType:
    """The benchmarks: beside this package in a checkout, inside it where it was installed."""
    if importlib.util.find_spec("compllm_rag._benchmarks") is not None:
        # They import one another as `benchmarks.NAME`, the name that they have in a checkout.
        sys.modules["benchmarks"] = importlib.import_module("compllm_rag._benchmarks")
    try:
        return importlib.import_module("benchmarks.common") and sys.modules["benchmarks"]
    except ImportError as error:
        raise ConfigurationError(
            "benchmarks cannot be loaded",
            got=str(error),
            expected="the package as installed, or a checkout of it",
            next_step="pip install --force-reinstall compllm-rag[train]",
        ) from error


def _summary(name: str, printed: str) -> str:
    """The record as the pages show it; as it is where no page has a section for it."""
    from rich.console import Console
    from rich.markdown import Markdown

    if not printed.strip():
        return ""
    try:
        section = importlib.import_module(f"benchmarks.pages.{name}").section
    except ModuleNotFoundError:
        return printed
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / f"{name}.json").write_text(json.dumps(json.loads(printed)), encoding="utf-8")
        text = section(folder, folder)
    console = Console(file=io.StringIO(), width=120 if not sys.stdout.isatty() else None)
    console.print(Markdown("\n".join(line for line in text.splitlines() if not line.startswith("!["))))
    shown: io.StringIO = console.file  # type: ignore[assignment]
    return shown.getvalue()
