"""The command line: `compllm-rag ingest | query | serve | stats | demo | models | eval | probe | bench | ...`.

Heavy libraries load inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compllm_rag.cli import bench as bench_commands
from compllm_rag.cli import calibrate as calibrate_command
from compllm_rag.cli import chat as chat_commands
from compllm_rag.cli import doctor as doctor_command
from compllm_rag.cli import eval as eval_commands
from compllm_rag.cli import import_index as import_commands
from compllm_rag.cli import ingest as ingest_commands
from compllm_rag.cli import models as models_commands
from compllm_rag.cli import namespace as namespace_commands
from compllm_rag.cli import serve as serve_commands
from compllm_rag.cli import storage as storage_commands
from compllm_rag.cli import train as train_commands
from compllm_rag.cli import watch as watch_command
from compllm_rag.cli.base import (
    AsJson,
    CodecName,
    GeneratorAddress,
    Offline,
    Storage,
    in_words,
    print_json,
    progress_show,
    reported,
)
from compllm_rag.cli.doctor import show_version
from compllm_rag.cli.filters import Filters, parse_filters
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
    because,
    explained,
    read_options,
)
from compllm_rag.cli.terminal import print_anything, question_of
from compllm_rag.config import DEFAULT_EMBEDDER, DEFAULT_LLM
from compllm_rag.errors import ConfigurationError

if TYPE_CHECKING:
    from compllm_rag.llamaindex.index import ConceptIndex

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Retrieval-augmented generation that never pays twice for the same passage.\n\n"
    "Ingest documents once: each is cut into chunks, embedded, and compressed into concepts. Every later query feeds "
    "the retrieved concepts to the LLM in place of their text, at half or a quarter of its prefill and KV cache.\n\n"
    "Start with: compllm-rag demo",
)

TenantName = Annotated[
    str | None, typer.Option("--namespace", help="Tenant, one of several in this folder that share nothing.")
]


ingest_commands.register(app)


@app.callback()
def everywhere(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Options of the command itself; the text of `--help` is the application's own."""


@app.command()
@reported
def query(
    question: Annotated[str, typer.Argument(help="What you want to know; - reads it from standard input.")],
    storage: Storage,
    mode: Annotated[str, typer.Option(help="Read passages as `concepts` or as `text`.")] = "concepts",
    top_k: Annotated[int, typer.Option(min=1, help="Chunks to retrieve.")] = 4,
    retrieval: Annotated[
        str, typer.Option(help="Look for chunks by `vector`, by words (`bm25`), or by both (`hybrid`).")
    ] = "vector",
    filter_: Filters = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it is made.")] = False,
    namespace: TenantName = None,
    rate: ReadRate = None,
    narrow: NarrowingName = None,
    read_policy: PolicyName = None,
    relevance: RelevanceName = None,
    relevance_cutoff: RelevanceCutoff = None,
    position_budget: PositionBudget = None,
    prefill_budget: PrefillBudget = None,
    ttft_budget: TtftBudget = None,
    missing: MissingName = "recompress",
    explain: Annotated[
        bool, typer.Option("--explain", help="Tell what each passage was read as, sentence by sentence, and why.")
    ] = False,
    generator: GeneratorAddress = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto (the checkpoint's).")] = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Answer a question from a storage, with its sources.

    Example: compllm-rag query "Who built the lighthouse?" --storage storage
    """
    if mode not in ("concepts", "text"):
        raise ConfigurationError("unknown mode", got=mode, expected="concepts or text", next_step="pass one of them")
    if stream and as_json:
        raise ConfigurationError(
            "--stream and --json exclude each other", got="both", expected="one", next_step="leave one out"
        )
    question = question_of(question)
    # Bytes of an argument that are not UTF-8 arrive as lone surrogates.
    if not question.strip() or any("\ud800" <= c <= "\udfff" for c in question):
        raise ConfigurationError(
            "question cannot be read", got=ascii(question), expected="words in UTF-8", next_step="type it again"
        )
    if retrieval not in ("vector", "bm25", "hybrid"):
        raise ConfigurationError(
            "unknown way of retrieval", got=retrieval, expected="vector, bm25 or hybrid", next_step="pass one of them"
        )
    filters = parse_filters(filter_)
    reading = read_options(
        rate, read_policy, position_budget, prefill_budget, ttft_budget, missing, relevance, narrow, relevance_cutoff
    )
    from compllm_rag.config import GenerationConfig
    from compllm_rag.llamaindex.answer import answer

    with (
        progress_show(as_json) as show,
        _index(
            storage,
            show=show,
            namespace=namespace,
            read_only=True,
            dtype=dtype,
            offline=offline,
            generation=GenerationConfig(max_new_tokens=max_new_tokens),
            generator=generator,
        ) as index,
    ):
        show.close()
        each = (lambda piece: typer.echo(piece, nl=False)) if stream else None
        found = answer(
            index,
            question,
            mode=mode,  # type: ignore[arg-type]
            top_k=top_k,
            retrieval=retrieval,
            filters=filters,
            on_piece=each,
            **reading,
        )
        told = explained(found, index.library.spec.segmenter) if explain and not as_json else []
    if as_json:
        print_json(found)
        return
    typer.echo("" if stream else found["answer"])
    typer.echo("")
    for number, source in enumerate(found["sources"], 1):
        size = f"{source['n_concepts']} concepts" if source["used"] == "concepts" else "text"
        size += because(source) if not source["parts"] else ""
        title = source["title"] or source["doc_id"]
        typer.echo(f"[{number}] {title} (score {source['score']:.2f}, {source['n_tokens']} tokens as {size})")
    if found["dropped"]:
        typer.echo(f"left out, too long for the window: {', '.join(found['dropped'])}")
    for line in told:
        typer.echo(line)
    typer.echo(f"{found['prompt_positions']} prompt positions, first token after {found['ttft_s']:.2f} s")


@app.command()
@reported
def stats(
    storage: Storage,
    prometheus: Annotated[bool, typer.Option("--prometheus", help="Print Prometheus text.")] = False,
    namespace: TenantName = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a storage holds, and what was measured as it was made.

    Example: compllm-rag stats --storage storage
    """
    from compllm_rag.catalog.measures import storage_families
    from compllm_rag.metrics import exposition
    from compllm_rag.storage.namespaces import existing_namespace
    from compllm_rag.storage.stats import rate_notes, storage_stats

    if prometheus and as_json:
        raise ConfigurationError(
            "--prometheus and --json exclude each other", got="both", expected="one", next_step="leave one out"
        )
    found = storage_stats(existing_namespace(storage, namespace))
    if prometheus:
        typer.echo(exposition(storage_families(found), {"namespace": found["namespace"]}), nl=False)
        return
    if as_json:
        print_json(found)
        return
    found |= found.pop("metrics")
    notes = rate_notes(found)
    width = max(map(len, found))
    for name, value in found.items():
        typer.echo(f"{name:<{width}}  {in_words(value)}")
    for note in notes:
        typer.echo(note, err=True)


@app.command()
@reported
def demo(
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all results there.")] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Compression rate: source tokens per concept. Default: 1 for deep concepts, 2 for input."),
    ] = None,
    codec: CodecName = None,
    top_k: Annotated[int, typer.Option(min=1, help="Chunks to retrieve.")] = 4,
    questions: Annotated[int | None, typer.Option(min=1, help="Ask only the first N questions.")] = None,
    llm: Annotated[str, typer.Option(help="Target LLM: alias, folder or org/name@revision.")] = DEFAULT_LLM,
    embedder: Annotated[str, typer.Option(help="Retrieval embedder.")] = DEFAULT_EMBEDDER,
    storage: Annotated[Path | None, typer.Option(help="Keep the storage there; else it is thrown away.")] = None,
    narrow: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER:SHARE",
            help="How concepts are narrowed, which is a third way to read them; `auto` (default) or `none`, too.",
        ),
    ] = None,
    offline: Offline = False,
) -> None:
    """Ingest the sample corpus that ships, and answer its questions from text and from concepts, side by side."""
    from compllm_rag.cli.demo import run_demo

    run_demo(
        json_file=json_file,
        rate=rate,
        codec=codec,
        top_k=top_k,
        limit=questions,
        llm=llm,
        embedder=embedder,
        storage=storage,
        narrow=narrow,
        offline=offline,
    )


# In the order of `--help`, after those above: what a newcomer needs stands first.
_CARE = (storage_commands, doctor_command, calibrate_command, namespace_commands)
_GROUPS = (chat_commands, serve_commands, watch_command, models_commands, import_commands, *_CARE)
for _more in (*_GROUPS, eval_commands, bench_commands, train_commands):
    _more.register(app)


def _index(storage: Path, *, show: Any, **options: Any) -> ConceptIndex:
    from compllm_rag.llamaindex.index import ConceptIndex

    return ConceptIndex.load(storage, progress=show.fetching, **options)


def main() -> None:
    """Entry point of the `compllm-rag` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print_anything()
    app()


if __name__ == "__main__":
    main()
