"""The command line of training: `compllm-rag train reader | compressor | deep | selector | rates | relevance`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from compllm_rag.cli.base import LOST, AsJson, print_json, progress_show, reported
from compllm_rag.cli.flags import flagged
from compllm_rag.config import DEFAULT_LLM
from compllm_rag.training.job_options import (
    DEEP_DATA,
    READER_DATA,
    CompressorOptions,
    DataOptions,
    DeepOptions,
    ReaderOptions,
)
from compllm_rag.training.run_config import DEEP_RUN, READER_RUN, RunConfig

train_app = typer.Typer(
    no_args_is_help=True,
    help="Train a reader or a compressor for an LLM of yours. Interrupted? Run the same command again.",
)

ReaderFolder = Annotated[
    str,
    typer.Option("--reader", help="Folder of the reader it was made with; auto: the shipped one; none: no reader."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder of the run; best/ in it is what you load.")]
# What a compressor is made with but nobody chooses: versions, what follows from the LLM and from the rank, and what
# deep concepts alone have.
_UNASKED = (
    *("format_version", "segmenter_version", "scale", "lora_alpha"),
    *("entry_layer", "unit_length", "opening", "selector", "pins", "read_rank", "read_alpha", "read_modules"),
    *("marked", "prompt_rank", "prompt_alpha", "prompt_modules"),
)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(train_app, name="train")


def _command() -> str:
    return " ".join(["compllm-rag", *sys.argv[1:]])


def _report(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(record)
    else:
        _print(record)
    if record["interrupted"]:
        raise typer.Exit(130)


def _print(record: dict[str, Any]) -> None:
    skipped = f"; {record['skipped']} rows without context or answer were left out" if record["skipped"] else ""
    best = f", best score {record['best']:.4g}" if record["best"] is not None else ""
    typer.echo(f"step {record['step']}{best}{skipped}")
    typer.echo(
        f"finished: {record['out']}/best"
        if record["finished"]
        else f"not finished: run the same command again to go on; the best so far is {record['out']}/best"
    )


@train_app.command("reader")
@reported
@flagged(unasked=["head_lr"])
def reader(
    out: Out,
    options: ReaderOptions,
    data: DataOptions = READER_DATA,
    run: RunConfig = READER_RUN,
    as_json: AsJson = False,
) -> None:
    """Train a reader: a LoRA adapter that teaches a small instruct model to answer from passages.

    Example: compllm-rag train reader --data-dir data --out runs/reader
    """
    from compllm_rag.training.cards import plot_curves
    from compllm_rag.training.jobs import train_reader

    with progress_show(as_json) as show:
        record = train_reader(out, data, options, run, show.fetching, _command())
        plot_curves(out)
    _report(record, as_json)


@train_app.command("compressor")
@reported
@flagged(names={"lora_rank": "rank"}, unasked=_UNASKED)
def compressor(
    out: Out, data: DataOptions, options: CompressorOptions, run: RunConfig, as_json: AsJson = False
) -> None:
    """Train a compressor: LoRA and a linear head that write concepts for the LLM as it is.

    Example: compllm-rag train compressor --data-dir data --out runs/compressor --minutes 9
    """
    from compllm_rag.training.cards import plot_curves
    from compllm_rag.training.jobs import train_compressor

    config = options.config.model_copy(update={"lora_alpha": 2 * options.config.lora_rank})
    options = options.model_copy(update={"config": config})
    with progress_show(as_json) as show:
        record = train_compressor(out, data, options, run, show.fetching, _command())
        plot_curves(out)
    _report(record, as_json)


@train_app.command("deep")
@reported
@flagged(names={"lora_rank": "rank", "init": "from_"}, unasked=["head_lr"])
def deep(
    out: Out,
    options: DeepOptions,
    data: DataOptions = DEEP_DATA,
    run: RunConfig = DEEP_RUN,
    as_json: AsJson = False,
) -> None:
    """Train deep concepts: LoRA in the LLM's lower half that writes them, and one in its upper half that reads them.

    Example: compllm-rag train deep --data-dir data --out runs/deep --minutes 60
    """
    from compllm_rag.training.cards import plot_curves
    from compllm_rag.training.jobs import train_deep

    with progress_show(as_json) as show:
        record = train_deep(out, data, options, run, show.fetching, _command())
        plot_curves(out)
    _report(record, as_json)


@train_app.command("selector")
@partial(reported, interrupted=LOST)
def selector(
    out: Annotated[Path, typer.Option("--out", help="Folder of the compressor that is made.")],
    data_dir: Annotated[Path, typer.Option("--data-dir", help="Holds train/*.jsonl(.gz) with questions.")],
    from_: Annotated[
        str, typer.Option("--from", help="A compressor of deep concepts; auto: the shipped one, or an untrained one.")
    ] = "auto",
    llm: Annotated[str, typer.Option("--llm", help="Target LLM: alias, folder or org/name@revision.")] = DEFAULT_LLM,
    reader: ReaderFolder = "auto",
    other_reader: Annotated[
        bool, typer.Option("--other-reader", help="It was made with another reader; let it go on with this one.")
    ] = False,
    entry_layer: Annotated[
        int | None,
        typer.Option(
            "--entry-layer",
            min=1,
            help="Let the concepts enter at this layer: layers in between keep their LoRA. Train on from there.",
        ),
    ] = None,
    groups: Annotated[
        int, typer.Option("--groups", min=1, help="Groups of questions that share passages to learn from, at most.")
    ] = 1000,
    gates: Annotated[
        int, typer.Option("--gates", min=0, help="Of these, how many to learn from by derivatives of the loss; slower.")
    ] = 300,
    seed: Annotated[int, typer.Option("--seed", help="Of their choice.")] = 0,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the frozen LLM: float32, bfloat16 or float16.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="A torch device.")] = None,
    as_json: AsJson = False,
) -> None:
    """Learn which tokens deep concepts keep above rate 1: minutes, in closed form; LoRA stays as it is.

    Example: compllm-rag train selector --data-dir data --out runs/selector
    """
    from compllm_rag.training.selector import train_selector

    with progress_show(as_json) as show:
        record = train_selector(
            out,
            data_dir,
            from_,
            llm,
            show.fetching,
            reader=reader,
            other_reader=other_reader,
            entry_layer=entry_layer,
            n_groups=groups,
            n_gates=gates,
            seed=seed,
            dtype=dtype,
            device=device,
        )
    if as_json:
        print_json(record)
    else:
        typer.echo(f"learned from {record['groups']} groups of questions: {record['out']}")


@train_app.command("rates")
@partial(reported, interrupted=LOST)
def rates(
    out: Annotated[Path, typer.Option("--out", help="Folder of the compressor; may be the one it comes from.")],
    data_dir: Annotated[Path, typer.Option("--data-dir", help="Holds train/*.jsonl(.gz) with questions.")],
    from_: Annotated[
        str, typer.Option("--from", help="A compressor of deep concepts; auto: the shipped one, or an untrained one.")
    ] = "auto",
    llm: Annotated[str, typer.Option("--llm", help="Target LLM: alias, folder or org/name@revision.")] = DEFAULT_LLM,
    reader: ReaderFolder = "auto",
    groups: Annotated[
        int, typer.Option("--groups", min=1, help="Held-out groups of questions to read at all rates, at most.")
    ] = 400,
    seed: Annotated[int, typer.Option("--seed", help="Of their choice.")] = 0,
    gain_only: Annotated[
        bool,
        typer.Option(
            "--gain-only",
            help="Keep the losses that were fitted, and add what text gains over no passage; same --groups and --seed.",
        ),
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the frozen LLM: float32, bfloat16 or float16.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="A torch device.")] = None,
    as_json: AsJson = False,
) -> None:
    """Learn what rates lose of a chunk, for `ingest --rate learned`, `--budget` and `--guard loss`; concepts stay.

    Queries with a budget value concepts by it, too.

    Example: compllm-rag train rates --data-dir data --from runs/deep/best --out runs/deep/best
    """
    from compllm_rag.training.rates import train_rates

    with progress_show(as_json) as show:
        record = train_rates(
            out,
            data_dir,
            from_,
            llm,
            show.fetching,
            reader=reader,
            n_groups=groups,
            seed=seed,
            gain_only=gain_only,
            dtype=dtype,
            device=device,
        )
    if as_json:
        print_json(record)
        return
    for number, (rate, loss) in enumerate(zip(record["rates"], record["mean_loss"], strict=True)):
        told = f" (R² {record['explained'][number]:.2f} on rows left out)" if record["explained"] else ""
        typer.echo(f"rate {rate:g}: {loss:.3f} nats per token lost on average{told}")
    if not record["told_apart"]:
        typer.echo("what chunks look like foretells no loss on rows left out: the mean stands for every chunk")
    typer.echo(f"text gains {record['gain']:.3f} nats per token over no passage")
    typer.echo(f"learned from {record['units']} chunks: {record['out']}")


@train_app.command("relevance")
@reported
def relevance(
    out: Annotated[Path, typer.Option("--out", help="Folder of the compressor; may be the one it comes from.")],
    data_dir: Annotated[Path, typer.Option("--data-dir", help="Holds train/*.jsonl(.gz) with questions.")],
    from_: Annotated[
        str, typer.Option("--from", help="A compressor of deep concepts; auto: the shipped one, or an untrained one.")
    ] = "auto",
    llm: Annotated[str, typer.Option("--llm", help="Target LLM: alias, folder or org/name@revision.")] = DEFAULT_LLM,
    reader: ReaderFolder = "auto",
    groups: Annotated[
        int, typer.Option("--groups", min=1, help="Groups of questions that share their passages, at most.")
    ] = 2000,
    epochs: Annotated[float, typer.Option("--epochs", min=0.01, help="How often each question is seen.")] = 2.0,
    width: Annotated[int, typer.Option("--width", min=1, help="Of what states are projected to.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Of questions and their order.")] = 0,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the frozen LLM: float32, bfloat16 or float16.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="A torch device, of the LLM alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Learn which sentence answers a question, for queries with `--relevance learned`; concepts stay.

    Passages are compressed once and kept in OUT/states until it is done: run the same command again to go on.

    Example: compllm-rag train relevance --data-dir data --from runs/deep/best --out runs/deep/best
    """
    from compllm_rag.training.relevance import train_relevance

    with progress_show(as_json) as show:
        record = train_relevance(
            out,
            data_dir,
            from_,
            llm,
            show.fetching,
            reader=reader,
            n_groups=groups,
            epochs=epochs,
            width=width,
            seed=seed,
            dtype=dtype,
            device=device,
        )
    if as_json:
        print_json(record)
        return
    for name, found in (("before", record["before"]), ("after", record["after"])):
        typer.echo(
            f"{name}: a sentence that says the answer is first for {found['recall@1']:.0%} and among the first two for "
            f"{found['recall@2']:.0%} of held-out questions, NLL {found['nll']:.3f}"
        )
    typer.echo(f"learned from {record['questions']} questions: {record['out']}")
