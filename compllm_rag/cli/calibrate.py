"""The command that measures how fast this machine reads: `compllm-rag calibrate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compllm_rag.cli.base import LOST, STORAGE_VARIABLE, AsJson, CodecName, Offline, print_json, progress_show, reported
from compllm_rag.config import DEFAULT_LLM
from compllm_rag.errors import ConfigurationError

if TYPE_CHECKING:
    from compllm_rag.generation.costs import CostModel

_EXAMPLES = (100, 1000)  # tokens of passages that are told of


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(reported(calibrate, interrupted=LOST))


def calibrate(
    storage: Annotated[
        Path | None,
        typer.Option(
            "--storage", envvar=STORAGE_VARIABLE, help="Folder of a storage, whose LLM and rate are measured."
        ),
    ] = None,
    llm: Annotated[
        str | None, typer.Option(help=f"Measure this LLM where there is no storage: alias, folder... [{DEFAULT_LLM}]")
    ] = None,
    codec: CodecName = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="Time to spend, about.")] = 20.0,
    namespace: Annotated[str | None, typer.Option("--namespace", help="Tenant of the storage.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto (the checkpoint's).")] = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Measure how fast this machine reads, once, so that `query --ttft-budget` can plan for a time.

    What is found is kept in the user's cache folder, for this LLM, dtype and number of threads. Measure with the
    threads (OMP_NUM_THREADS) and on the machine that questions are answered with, and while it does nothing else.

    Example: compllm-rag calibrate --storage storage
    """
    if llm is not None and storage is not None:
        raise ConfigurationError(
            "--llm and --storage exclude each other", got="both", expected="one", next_step="leave one out"
        )
    from compllm_rag.reading.calibrated import calibrated

    with progress_show(as_json) as show:
        if storage is not None:
            from compllm_rag.llamaindex.index import ConceptIndex

            options = {"namespace": namespace, "dtype": dtype, "offline": offline}
            with ConceptIndex.load(storage, read_only=True, progress=show.fetching, **options) as index:  # type: ignore[arg-type]
                found = calibrated(index.library, seconds=seconds, progress=show.fetching)
        else:
            from compllm_rag.cli.eval import own_rate
            from compllm_rag.compression.loading import load_compressor_for
            from compllm_rag.library import ConceptLibrary
            from compllm_rag.store import MemoryStore

            made = load_compressor_for(
                llm or DEFAULT_LLM, codec=codec or "deep", dtype=dtype, offline=offline, progress=show.fetching
            )
            library = ConceptLibrary(made, MemoryStore(made.spec.width), rate=own_rate(made))
            found = calibrated(library, seconds=seconds, progress=show.fetching)
    if as_json:
        print_json(asdict(found))
        return
    for line in told(found):
        typer.echo(line)


def told(found: CostModel) -> list[str]:
    """What was found, in plain words."""
    where = f"{found.dtype} on {found.device}, {found.threads} thread{'s' if found.threads > 1 else ''}"
    out = [f"{found.llm}, {where}; prompts of up to {found.longest} positions"]
    for n in _EXAMPLES:
        out.append(f"  {n} tokens of passages as text take {found.prefill_s(n, 0):.3f} s")
        if found.upper is not None:
            taken = found.upper(n)
            out.append(f"  as many deep concepts {taken:.3f} s, and their prompt's own tokens the layers below")
    out.append(f"  making concepts in line takes {1000 * found.compress_s_per_token:.2f} ms for each token")
    out.append('kept; `query --ttft-budget`, `ttft_budget_s` and `missing="auto"` heed it from now on')
    if found.longest < max(_EXAMPLES):
        out.append("longer prompts are reckoned by the curve")
    return out
