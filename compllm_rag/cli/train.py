"""The command line of training: `compllm-rag train reader | compressor`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compllm_rag.cli.base import AsJson, print_json, progress_show, reported
from compllm_rag.config import DEFAULT_LLM, checked

if TYPE_CHECKING:
    from compllm_rag.training.job_options import DataOptions
    from compllm_rag.training.run_config import RunConfig

train_app = typer.Typer(
    no_args_is_help=True,
    help="Train a reader or a compressor for an LLM of yours. Interrupted? Run the same command again.",
)

Out = Annotated[Path, typer.Option("--out", help="Folder of the run; best/ in it is what you load.")]
Llm = Annotated[str, typer.Option(help="Target LLM: alias, folder or org/name@revision.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Holds train/*.jsonl(.gz) with questions and text/*.jsonl(.gz) with texts.")
]
Questions = Annotated[list[Path] | None, typer.Option(help="A further file of questions; may be repeated.")]
Texts = Annotated[list[Path] | None, typer.Option(help="A further file of texts; may be repeated.")]
Hub = Annotated[list[str] | None, typer.Option(help="A hub dataset, org/name[:config][@revision]; may be repeated.")]
MaxContext = Annotated[int, typer.Option(help="Most source tokens of one example.", min=20, max=8000)]
Steps = Annotated[int, typer.Option(help="Optimizer steps of the whole run.", min=1)]
Minutes = Annotated[float | None, typer.Option(help="Stop after this long; the same command goes on.")]
Batch = Annotated[int, typer.Option(help="Examples of a step, on each process.", min=1)]
MicroTokens = Annotated[
    int, typer.Option(help="Positions of one forward: lower it if memory does not suffice.", min=64)
]
Lr = Annotated[float, typer.Option(help="Peak learning rate.")]
Warmup = Annotated[int, typer.Option(help="Steps of warming up.")]
Decay = Annotated[float, typer.Option(help="Share of the steps, at the end, in which the learning rate falls.")]
Seed = Annotated[int, typer.Option(help="Of examples and rates.")]
ValidateEvery = Annotated[int, typer.Option(help="Steps between two looks at held-out training data.", min=1)]
Validation = Annotated[int, typer.Option(help="Groups of held-out questions to look at.", min=1)]
Patience = Annotated[int, typer.Option(help="Looks without a better score before it stops; 0: never.")]
Dtype = Annotated[str | None, typer.Option(help="Of the frozen LLM: float32, bfloat16 or float16.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(train_app, name="train")


def _run(**fields: Any) -> RunConfig:
    from compllm_rag.training.run_config import RunConfig

    return checked(RunConfig, **fields)


def _data(
    data_dir: Path | None,
    questions: list[Path] | None,
    texts: list[Path] | None,
    hub: list[str] | None,
    max_context: int,
) -> DataOptions:
    from compllm_rag.training.job_options import DataOptions
    from compllm_rag.training.material import MaterialConfig

    material = MaterialConfig(max_context=max_context)
    return DataOptions(data_dir, tuple(questions or ()), tuple(texts or ()), tuple(hub or ()), material)


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
def reader(
    out: Out,
    data_dir: DataDir = None,
    questions: Questions = None,
    texts: Texts = None,
    hub: Hub = None,
    llm: Llm = DEFAULT_LLM,
    init: Annotated[Path | None, typer.Option(help="An adapter to go on from.")] = None,
    rank: Annotated[int, typer.Option(help="Of LoRA.", min=1)] = 16,
    keep_share: Annotated[float, typer.Option(help="Share of examples that are other prompts.", min=0, max=0.9)] = 0.1,
    max_context: MaxContext = 320,
    steps: Steps = 400,
    minutes: Minutes = None,
    batch: Batch = 8,
    micro_tokens: MicroTokens = 2048,
    lr: Lr = 4e-4,
    warmup: Warmup = 20,
    decay: Decay = 0.5,
    seed: Seed = 0,
    validate_every: ValidateEvery = 50,
    validation: Validation = 24,
    patience: Patience = 0,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Train a reader: a LoRA adapter that teaches a small instruct model to answer from passages.

    Example: compllm-rag train reader --data-dir data --out runs/reader
    """
    from compllm_rag.training.cards import plot_curves
    from compllm_rag.training.jobs import train_reader

    with progress_show(as_json) as show:
        record = train_reader(
            out,
            _data(data_dir, questions, texts, hub, max_context),
            llm=llm,
            rank=rank,
            keep_share=keep_share,
            init=init,
            run=_run(
                steps=steps,
                minutes=minutes,
                batch=batch,
                micro_tokens=micro_tokens,
                lr=lr,
                warmup=warmup,
                decay=decay,
                seed=seed,
                validate_every=validate_every,
                patience=patience,
            ),
            validation=validation,
            dtype=dtype,
            progress=show.fetching,
            command=_command(),
        )
        plot_curves(out)
    _report(record, as_json)


@train_app.command("compressor")
@reported
def compressor(
    out: Out,
    data_dir: DataDir = None,
    questions: Questions = None,
    texts: Texts = None,
    hub: Hub = None,
    llm: Llm = DEFAULT_LLM,
    reader_adapter: Annotated[
        str, typer.Option("--reader", help="Folder of a reader adapter; auto: the shipped one; none.")
    ] = "auto",
    reader_rank: Annotated[
        int, typer.Option(help="LoRA rank of a reader trained along, for small LLMs; 0: the LLM stays as it is.", min=0)
    ] = 0,
    init: Annotated[Path | None, typer.Option(help="A compressor to go on from; its settings are kept.")] = None,
    layers: Annotated[int, typer.Option(help="First layers of the LLM that compress; 0: all.", min=0)] = 12,
    rank: Annotated[int, typer.Option(help="Of LoRA.", min=1)] = 32,
    segment_length: Annotated[int, typer.Option(help="S, the most tokens of a segment.", min=2)] = 20,
    queries: Annotated[
        str, typer.Option(help="What a concept starts from: anchor or eos (as in the paper).")
    ] = "anchor",
    anchor_positions: Annotated[str, typer.Option(help="Rotary positions of the anchors: continue or source.")] = (
        "continue"
    ),
    anchor_words: Annotated[bool, typer.Option(help="Choose the tokens of a word together.")] = True,
    answer_weight: Annotated[
        float, typer.Option(help="How much tokens that answers are made of count where anchors are chosen.", min=0)
    ] = 2.0,
    sink: Annotated[bool, typer.Option("--sink", help="Put the beginning-of-sequence token in front.")] = False,
    rates: Annotated[list[float] | None, typer.Option(help="A rate to train at; may be repeated.")] = None,
    labels: Annotated[str, typer.Option(help="gold answers, or own: the LLM's answers to the questions.")] = "gold",
    kl: Annotated[float, typer.Option(help="Weight of the KL divergence of the output.")] = 1.0,
    hidden: Annotated[float, typer.Option(help="Weight of the distance of hidden states.")] = 1.0,
    ce: Annotated[float, typer.Option(help="Weight of the cross-entropy on the answers.")] = 0.1,
    max_context: MaxContext = 320,
    steps: Steps = 2000,
    minutes: Minutes = None,
    batch: Batch = 8,
    micro_tokens: MicroTokens = 2048,
    lr: Lr = 4e-4,
    head_lr: Annotated[float, typer.Option(help="Learning rate of the head, as a factor.")] = 2.0,
    warmup: Warmup = 50,
    decay: Decay = 0.25,
    seed: Seed = 0,
    validate_every: ValidateEvery = 50,
    validation: Validation = 24,
    patience: Patience = 0,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Train a compressor: LoRA and a linear head that write concepts for the LLM as it is.

    Example: compllm-rag train compressor --data-dir data --out runs/compressor --minutes 9
    """
    from compllm_rag.training.cards import plot_curves
    from compllm_rag.training.job_options import CompressorOptions
    from compllm_rag.training.jobs import train_compressor

    with progress_show(as_json) as show:
        record = train_compressor(
            out,
            _data(data_dir, questions, texts, hub, max_context),
            CompressorOptions(
                llm=llm,
                reader=None if reader_adapter == "none" else reader_adapter,
                answer_weight=answer_weight,
                reader_rank=reader_rank,
                init=init,
                config=_compressor_config(
                    layers=layers or None,
                    rank=rank,
                    segment_length=segment_length,
                    queries=queries,
                    anchor_positions=anchor_positions,
                    anchor_words=anchor_words,
                    sink=sink,
                ),
                objective=_objective(kl=kl, hidden=hidden, ce=ce),
                rates=_rates(rates),
                labels=labels,
                validation=validation,
                dtype=dtype,
            ),
            _run(
                steps=steps,
                minutes=minutes,
                batch=batch,
                micro_tokens=micro_tokens,
                lr=lr,
                head_lr=head_lr,
                warmup=warmup,
                decay=decay,
                seed=seed,
                validate_every=validate_every,
                patience=patience,
            ),
            show.fetching,
            _command(),
        )
        plot_curves(out)
    _report(record, as_json)


def _compressor_config(*, rank: int, **fields: Any) -> Any:
    from compllm_rag.config import CompressorConfig
    from compllm_rag.training.reader_task import LINEARS

    return checked(CompressorConfig, lora_rank=rank, lora_alpha=2 * rank, lora_modules=LINEARS, **fields)


def _objective(**weights: float) -> Any:
    from compllm_rag.training.objective import ObjectiveConfig

    return checked(ObjectiveConfig, **weights)


def _rates(rates: list[float] | None) -> Any:
    from compllm_rag.training.compressor_task import RatesConfig

    return checked(RatesConfig, rates=tuple(rates)) if rates else RatesConfig()
