"""The command that runs benchmarks: `compllm-rag bench`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from compllm_rag.cli.base import reported
from compllm_rag.errors import ConfigurationError

# Their modules are loaded when they run, so that --help answers at once.
BENCHMARKS = {
    "ttft": "Time to first token and KV cache, text against concepts, with the bound; --codec input: the crossover.",
    "ttft_deep": "The same as ttft, of deep concepts alone, with what compressing them costs.",
    "ttft_long": "Prefill up to 128k tokens by an LLM's shape, text and deep concepts; hours, can be stopped.",
    "cost_model": "FLOPs, KV bytes and stored bytes of deep concepts up to 128k tokens, by arithmetic alone.",
    "query": "One query on sample texts: TTFT of text and concepts beside the bound; shorter than ttft.",
    "ingest": "Tokens/s of compressing into a store, against the least that the arithmetic costs.",
    "ingest_scale": "A growing storage: is ingestion linear, is memory flat; layers, batches, bytes per token.",
    "ingest_workers": "Ingestion by workers on Ray: what a second one brings.",
    "ingest_plan": "A terabyte of text by many workers, on paper: hours, bytes, money.",
    "reuse": "Cost per query when passages come again, against text, prefix caching and stored chunk KV.",
    "chat": "TTFT of each turn of a chat, with and without the KV cache of the turns before.",
    "batching": "Queries at the same time, decoded together, against the same queries one after the other.",
    "load": "Many users of one server at the same time: waits, refusals, memory, nothing lost.",
    "equal_cost": "Quality over TTFT: text top-k against more passages as concepts.",
    "loft": "Retrieval and answers over a LOFT corpus.",
    "rivals": "Other ways to fill as many positions, on the same passages.",
    "alike": "Rivals that are trained, on the same reader, data and minutes of CPU as deep concepts.",
    "rates": "Rates that follow the text against fixed ones, at the same cost.",
    "planner": "Read policies at a quarter and an eighth of text's prefill cost, against their rivals.",
    "relevance": "Rank, BM25, max-sim: which finds the sentence with the answer; needs the training data.",
    "domains": "What is lost in other kinds of text.",
    "anchors": "Which tokens concepts should start from; needs the training data.",
    "ablations": "What each choice in the compressor brings; trains small ones.",
    "quality": "Text, concepts, pruning and nothing on probes, with --data-dir on evaluation sets.",
    "chunks": "1, 2, 4, 8 passages in the prompt: needles, one passage, two hops; text against concepts.",
    "frontier": "Recovered over prefill cost by entry layer and rate, untrained and trained; needs the training data.",
    "narrowing": "Recovered over prefill cost where the LLM's last layers read but a share of the concepts; "
    "needs the training data.",
    "pins": "Deep concepts that keep numbers, dates and names first, on the probes and a file of questions.",
    "placeholders": "Deep concepts as another engine could read them: kept tokens below the entry layer, states above.",
    "store_read": "Concepts from disk to tensor, against a flat file and other stores.",
    "storage_size": "Bytes per source token of storages, vectors, text and KV cache.",
    "storage_quality": "What fewer bits per concept cost.",
    "commits": "Small uploads into a large storage, and searches beside them.",
    "edits": "The cost of ingesting a document again after an edit.",
    "editors": "Many editors of one document: time from an edit to an answer, chunks encoded again, nothing lost.",
    "editors_http": "Many editors of one document of a server: until a question finds an edit, nothing stale.",
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
    sys.path.insert(0, str(_folder()))
    benchmarks = importlib.import_module("benchmarks")
    try:
        record = benchmarks.benchmark(name).main(context.args)
        lines = benchmarks.page(name).tables(record)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("benchmarks", "compllm_rag")):
            raise
        raise ConfigurationError(
            "a package is missing",
            got=f"no {error.name}",
            expected=f"what `bench {name}` needs",
            next_step="pip install 'compllm-rag[train]'",
        ) from error
    _show(lines)


def _folder() -> Path:
    """The folder to import `benchmarks` from: that of the checkout, or inside this package where it was installed."""
    package = Path(__file__).parents[1]
    for folder in (package / "_bench", package.parent):
        if (folder / "benchmarks" / "common.py").exists():
            return folder
    raise ConfigurationError(
        "benchmarks are not there",
        got=str(package),
        expected="the package as installed, or a checkout of it",
        next_step="pip install --force-reinstall compllm-rag",
    )


def _show(lines: list[str]) -> None:
    """Print a page's tables; its pictures are for docs/."""
    from rich.console import Console
    from rich.markdown import Markdown

    text = "\n".join(line for line in lines if not line.startswith("!["))
    Console(width=None if sys.stdout.isatty() else 120).print(Markdown(text))
