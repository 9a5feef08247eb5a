"""The commands that measure: `compllm-rag eval` and `compllm-rag probe`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compllm_rag.cli.base import (
    LOST,
    LOST_WITHOUT_JOURNAL,
    AsJson,
    CodecName,
    CompressorName,
    EntryLayer,
    Offline,
    ReaderName,
    or_none,
    print_json,
    progress_show,
    reported,
)
from compllm_rag.config import DEFAULT_LLM, DEFAULT_RATES, Narrowing
from compllm_rag.errors import ConfigurationError

if TYPE_CHECKING:
    from compllm_rag.cli.progress import ProgressShow
    from compllm_rag.compression.spec import ConceptCompressor
    from compllm_rag.evaluation.results import EvalResult

ModeOption = Annotated[
    str,
    typer.Option(
        help="How passages are read: `concepts`, `text`, `pruned` (the anchors alone), `budgeted` (what a read policy "
        "chooses, at the cost of concepts at --rate) or `none`."
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(help="Source tokens per concept; text and none have none. Default: 1 for deep concepts, 2 for input."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Ask only N, the first in the order of the seed.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the order and of the intervals.")]
Llm = Annotated[str, typer.Option(help="Target LLM: alias, folder or org/name@revision.")]
EvalNarrowing = Annotated[
    str | None,
    typer.Option("--narrow", help="Read but a SHARE of deep concepts from a LAYER on, LAYER:SHARE, such as 24:0.1."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions of one batch.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Records = Annotated[Path | None, typer.Option(help="Write one JSON line per question there.")]
Kept = Annotated[
    Path | None,
    typer.Option("--journal", help="Keep what is done there: after an interruption the same command goes on from it."),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("eval")(reported(eval_command, interrupted=LOST_WITHOUT_JOURNAL))
    app.command("probe")(reported(probe_command, interrupted=LOST))


def eval_command(
    data: Annotated[Path, typer.Option(help="Questions over passages, as JSON lines (.jsonl or .jsonl.gz).")],
    mode: ModeOption = "concepts",
    rate: Rate = None,
    limit: Limit = None,
    seed: Seed = 0,
    passages: Annotated[str, typer.Option(help="`all` passages of a row, or only the `gold` ones.")] = "all",
    llm: Llm = DEFAULT_LLM,
    reader: ReaderName = "auto",
    compressor: CompressorName = "auto",
    codec: CodecName = None,
    entry_layer: EntryLayer = None,
    narrow: EvalNarrowing = None,
    batch_size: BatchSize = 16,
    max_new_tokens: MaxNewTokens = 24,
    no_generate: Annotated[bool, typer.Option("--no-generate", help="Likelihoods only: no answers, no F1.")] = False,
    records: Records = None,
    journal: Kept = None,
    dtype: Dtype = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Measure answers over the passages of a file, beside text and no passages.

    A row is {"context", "question", "answers": [...], "options"?}, or {"context", "qas": [...]} with several questions,
    or {"question", "answers", "documents": [{"title", "text", "is_supporting"}]}. The first answer is the gold of nll.
    Values are in percent; nll is in nats per token.

    Example: compllm-rag eval --data squad_dev.jsonl.gz --mode concepts --rate 2 --limit 200
    """
    from compllm_rag.evaluation.bodies import Setting
    from compllm_rag.evaluation.journal import Journal
    from compllm_rag.evaluation.questions import read_questions
    from compllm_rag.evaluation.results import EvalConfig, record_lines
    from compllm_rag.evaluation.runner import evaluate

    narrowing = None if narrow is None else Narrowing.parse(narrow)
    Setting.of(mode, 1.0 if rate is None else rate, narrowing=narrowing)  # what is wrong is said before all loading
    _check_rate_heeded(mode, rate)
    config = EvalConfig(
        limit=limit,
        seed=seed,
        passages=_passages(passages),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        generate=not no_generate,
    )
    questions = read_questions(data)
    _check_target(records)
    kept = Journal(journal)
    with progress_show(as_json) as show:
        made = _load(llm, reader, compressor, codec, entry_layer, dtype, offline, show)
        rate = own_rate(made) if rate is None else rate
        result = evaluate(
            made,
            questions,
            mode=mode,
            rate=rate,
            config=config,
            data=data.name,
            progress=show.fetching,
            journal=kept,
            narrowing=narrowing,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result)
    _write(records, record_lines([result]))  # last: a full disk takes no result with it


def probe_command(
    mode: ModeOption = "concepts",
    rate: Rate = None,
    limit: Limit = None,
    seed: Seed = 0,
    llm: Llm = DEFAULT_LLM,
    reader: ReaderName = "auto",
    compressor: CompressorName = "auto",
    codec: CodecName = None,
    entry_layer: EntryLayer = None,
    batch_size: BatchSize = 16,
    max_new_tokens: MaxNewTokens = 24,
    records: Records = None,
    dtype: Dtype = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Measure what is lost, kind by kind: numbers, dates, names, code, negation, order, needles.

    Example: compllm-rag probe --mode concepts --rate 4
    """
    from compllm_rag.evaluation.bodies import Setting
    from compllm_rag.evaluation.probes import run_probes
    from compllm_rag.evaluation.results import EvalConfig, record_lines

    Setting.of(mode, 1.0 if rate is None else rate)  # whatever is wrong is said before anything is loaded
    _check_rate_heeded(mode, rate)
    _check_target(records)
    config = EvalConfig(limit=limit, seed=seed, batch_size=batch_size, max_new_tokens=max_new_tokens)
    with progress_show(as_json) as show:
        made = _load(llm, reader, compressor, codec, entry_layer, dtype, offline, show)
        rate = own_rate(made) if rate is None else rate
        found = run_probes(made, mode=mode, rate=rate, config=config, progress=show.fetching)
    if as_json:
        print_json(found.to_dict())
    else:
        _show_probes(found.to_dict())
    _write(records, ({"kind": found.kinds[line["id"]], **line} for line in record_lines([found.result])))


def _show_probes(shown: dict[str, Any]) -> None:
    at = "" if shown["rate"] is None else f" at rate {shown['rate']:g} (achieved {shown['achieved_rate']:.2f})"
    typer.echo(f"{shown['mode']}{at}, {shown['n']} probes, {shown['llm']}; f1 of text on the same probes")
    typer.echo(f"{'':<14}{'n':>5}{'em':>8}{'f1':>8}{'subspan':>9}{'accuracy':>10}{'text f1':>9}")
    for group, label in (("kinds", "{}"), ("depths", "needle at {} %")):
        for name, scores in shown[group].items():
            cells = [_cell(scores[key]) for key in ("em", "f1", "subspan_em", "accuracy")]
            cells.append(_cell(shown["text"][group][name]["f1"]))
            widths = (8, 8, 9, 10, 9)
            line = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            typer.echo(f"{label.format(name):<14}{scores['n']:>5}{line}")


def _passages(name: str) -> Literal["all", "gold"]:
    if name == "all":
        return "all"
    if name == "gold":
        return "gold"
    raise ConfigurationError(
        "unknown choice of passages", got=name, expected="all or gold", next_step="pass one of them"
    )


def _check_rate_heeded(mode: str, rate: float | None) -> None:
    if rate is not None and mode in ("text", "none"):
        raise ConfigurationError(
            f"mode {mode} has no compression rate",
            got=f"--mode {mode} and --rate {rate:g}",
            next_step="leave --rate out, or choose another mode",
        )


def own_rate(compressor: ConceptCompressor) -> float:
    """The rate of a compressor where nobody asks for another."""
    return DEFAULT_RATES["deep" if compressor.config.deep else "input"]


def _load(
    llm: str,
    reader: str,
    compressor: str,
    codec: str | None,
    entry_layer: int | None,
    dtype: str | None,
    offline: bool,
    show: ProgressShow,
) -> ConceptCompressor:
    from compllm_rag.compression.loading import load_compressor_for
    from compllm_rag.llamaindex.opening_checks import check_compressor

    made = load_compressor_for(
        llm,
        reader=or_none(reader),
        compressor=or_none(compressor),
        codec=codec or "deep",
        entry_layer=entry_layer,
        dtype=dtype,
        offline=offline,
        progress=show.fetching,
    )
    check_compressor(made.config, codec, entry_layer, None)  # a folder that is named says itself what it holds
    return made


def _check_target(path: Path | None) -> None:
    """Say so before the work is done that the records would have nowhere to go."""
    if path is None:
        return
    if not path.resolve().parent.is_dir():
        raise ConfigurationError(
            "records cannot be written", got=path, expected="a file in an existing folder", next_step="make the folder"
        )
    if path.is_dir():
        raise ConfigurationError(
            "records cannot be written", got=f"the folder {path}", expected="a file", next_step="name a file in it"
        )
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
        raise ConfigurationError(
            "records cannot be written", got=f"{path}, which may not be written", next_step="name another file"
        )


def _write(path: Path | None, lines: Iterable[dict[str, Any]]) -> None:
    if path is not None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8")


def _show(result: EvalResult) -> None:
    at = "" if result.rate is None else f" at rate {result.rate:g} (achieved {result.achieved_rate or 0:.2f})"
    from compllm_rag.evaluation.results import METRICS

    typer.echo(f"{result.mode}{at}, {result.n} questions of {result.data}, {result.llm}")
    compared = "" if result.mode == "text" else f"{'to text':>9}  95 %"
    typer.echo(f"{'':<12}{'':>9}  {'95 %':<18}{compared}".rstrip())
    for name in METRICS:
        value, paired = getattr(result, name), result.paired.get(name) if result.mode != "text" else None
        if value is None:
            continue
        digits = 3 if name == "nll" else 1
        line = f"{name:<12}{value:>9.{digits}f}  {_interval(result.intervals[name], digits):<18}"
        if paired is not None:
            line += f"{paired['difference']:>+9.{digits}f}  {_interval(paired['interval'], digits)}"
        typer.echo(line.rstrip())
    typer.echo(f"{'positions':<12}{result.positions:>9.1f}")
    if result.skipped:
        name, reason = result.skipped[0]
        typer.echo(f"left out: {len(result.skipped)}, such as {name}: {reason}")
    typer.echo(f"{result.seconds:.1f} s")


def _interval(ends: list[float] | None, digits: int) -> str:
    return "" if ends is None else f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
