"""The demo: the shipped sample corpus, ingested and asked; the same passages as text, as concepts, and narrowed."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from compllm_rag.cli.progress import ProgressShow
from compllm_rag.config import GenerationConfig, Narrowing
from compllm_rag.errors import ConfigurationError, UnsupportedModelError
from compllm_rag.evaluation.metrics import f1

# How passages are read: a name for tables and JSON, and options of `answer`.
Ways = dict[str, dict[str, Any]]
_NEW_TOKENS = 24


def sample_corpus() -> Path:
    """Folder of the sample corpus: one Markdown file per article."""
    return Path(str(resources.files("compllm_rag"))) / "data" / "sample"


def sample_questions() -> list[dict[str, Any]]:
    """The sample questions: `{"id", "question", "answers", "title"}`."""
    lines = (sample_corpus() / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def run_demo(
    *,
    json_file: Path | None,
    rate: float | None,
    codec: str | None,
    top_k: int,
    limit: int | None,
    llm: str,
    embedder: str,
    storage: Path | None,
    offline: bool,
    narrow: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the demo and show it.

    Args:
        json_file: Also write everything there.
        rate: Source tokens per concept; None takes the codec's own.
        codec: `deep` or `input`; None takes deep.
        top_k: Chunks retrieved per question.
        limit: Ask only the first so many questions.
        llm: Target LLM.
        embedder: Retrieval embedder.
        storage: Keep the storage there; None uses a temporary folder.
        offline: Never touch the network.
        narrow: How concepts are narrowed, which is a third way to read them: `LAYER:SHARE`, `auto`, or `none` to leave
            that out. None narrows as `auto` does where there are deep concepts that can be.
        console: Where to show; None means standard output.

    Returns:
        All that was shown, as plain values.

    Raises:
        ConfigurationError: `json_file` has no folder to lie in, or nothing can be narrowed as `narrow` says.
    """
    console = console or Console()
    if json_file is not None and not json_file.absolute().parent.is_dir():
        # Known now, and not when the work of minutes is done.
        raise ConfigurationError(
            "results cannot be written", got=json_file, expected="a file in a folder that exists", next_step="make it"
        )
    if narrow not in (None, "auto", "none"):
        Narrowing.parse(narrow)
    made: dict[str, Any] = {"llm": llm, "embedder": embedder, "rate": rate, "codec": codec, "offline": offline}
    if storage is not None:
        return _run(console, json_file, top_k, limit, narrow, storage, made)
    with tempfile.TemporaryDirectory(prefix="compllm-demo-") as folder:
        return _run(console, json_file, top_k, limit, narrow, Path(folder) / "storage", made)


def _run(
    console: Console,
    json_file: Path | None,
    top_k: int,
    limit: int | None,
    narrow: str | None,
    storage: Path,
    options: dict[str, Any],
) -> dict[str, Any]:
    from compllm_rag.llamaindex.answer import retrieve
    from compllm_rag.llamaindex.corpus import IngestReport
    from compllm_rag.llamaindex.documents import load_documents
    from compllm_rag.llamaindex.index import ConceptIndex

    def read() -> IngestReport:
        return index.ingest(load_documents([sample_corpus() / "articles"]), progress=show.ingested)

    with ProgressShow() as show:
        show.fetching("loading the models", None)
        index = ConceptIndex.create(
            storage,
            progress=show.fetching,
            generation=GenerationConfig(max_new_tokens=_NEW_TOKENS),
            **options,
        )
        with index:
            ways = _ways(index, narrow)
            first, stats = read(), index.stats()
            questions = sample_questions()[:limit]
            show.close()
            _show_ingest(console, first, stats)
            begin = questions[0]["question"]
            ways = _warmed(index, begin, retrieve(index, begin, top_k), ways, all_asked_for=narrow is not None)
            asked = _ask(console, index, questions, top_k, ways)
            again = read()
    summary = _summary(asked)
    _show_summary(console, summary, len(asked), again)
    result = {
        "ingest": first.fields(),
        "stats": stats,
        "questions": asked,
        "summary": summary,
        "second_ingest": again.fields(),
    }
    if json_file is not None:
        json_file.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        console.print(f"Everything above, and more, is in {json_file}.", highlight=False)
    return result


def _ways(index: Any, narrow: str | None) -> Ways:
    """How passages are read, side by side.

    Raises:
        ConfigurationError: Nothing can be narrowed as `narrow` says; known before minutes of ingestion.
    """
    from compllm_rag.llamaindex.read_options import narrowing_of

    ways: Ways = {"text": {"mode": "text"}, "concepts": {"mode": "concepts"}}
    if narrow == "none":
        return ways
    if narrow is not None:
        narrowing_of(index.library, mode="concepts", decides_otherwise=False, options={"narrowing": narrow})
    return ways | {"narrowed": {"mode": "concepts", "narrowing": narrow or "auto"}}


def _warmed(index: Any, question: str, nodes: Any, ways: Ways, *, all_asked_for: bool) -> Ways:
    """Answer once in every way: the first forward of each shape pays for allocations that later ones do not.

    Returns:
        The ways without a narrowed one that nobody asked for and that this LLM cannot go, such as one with windows.
    """
    from compllm_rag.llamaindex.answer import answer

    index.generator.prefixes = None  # each prompt is timed as if it were the first
    gone = {}
    for name, way in ways.items():
        try:
            answer(index, question, nodes=nodes, **way)
        except (ConfigurationError, UnsupportedModelError):
            if all_asked_for or name != "narrowed":
                raise
            continue
        gone[name] = way
    return gone


def _ask(
    console: Console, index: Any, questions: Sequence[dict[str, Any]], top_k: int, ways: Ways
) -> list[dict[str, Any]]:
    from compllm_rag.llamaindex.answer import answer, retrieve

    asked, names = [], list(ways)
    for number, row in enumerate(questions):
        begun = time.perf_counter()
        nodes = retrieve(index, row["question"], top_k)
        retrieval_s = time.perf_counter() - begun
        # Whoever goes later finds warmer caches: they take turns.
        first = number % len(names)
        order = names[first:] + names[:first]
        answers = {name: answer(index, row["question"], nodes=nodes, **ways[name]) for name in order}
        for found in answers.values():
            found["retrieval_s"] = retrieval_s
            found["f1"] = f1(found["answer"], row["answers"])
        asked.append({**row, "answers_by_mode": {name: answers[name] for name in names}})
        _show_question(console, number + 1, asked[-1])
    return asked


def _summary(asked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = list(asked[0]["answers_by_mode"])
    rows = {name: [row["answers_by_mode"][name] for row in asked] for name in names}
    fields = (
        "prompt_positions",
        "prefill_cost",
        "kv_bytes",
        "ttft_s",
        "prefill_s",
        "fetch_s",
        "layout_s",
        "total_s",
        "f1",
    )
    means = {name: {field: fmean(r[field] for r in rows[name]) for field in fields} for name in names}
    return {
        "means": means,
        **{f"{name}_over_text": _over_text(rows[name], rows["text"]) for name in names if name != "text"},
        "gold_title_retrieved": fmean(
            float(any(s["title"] == row["title"] for s in row["answers_by_mode"]["text"]["sources"])) for row in asked
        ),
    }


def _over_text(mine: Sequence[dict[str, Any]], text: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Shares of text, of the means; and of TTFT the mean of each question's share, too."""
    shares = [r["ttft_s"] / t["ttft_s"] for t, r in zip(text, mine, strict=True) if t["ttft_s"] > 0]
    fields = ("prompt_positions", "kv_bytes", "ttft_s")
    of_means = {field: fmean(r[field] for r in mine) / fmean(t[field] for t in text) for field in fields}
    return {**of_means, "ttft_s_mean_of_each_question": fmean(shares)}


def _show_ingest(console: Console, report: Any, stats: dict[str, Any]) -> None:
    table = Table(title="Ingested once", show_header=False)
    rows = {
        "documents": f"{stats['documents']}",
        "chunks": f"{stats['chunks']}",
        "segments": f"{stats['segments']} ({report.segments_compressed} compressed, {report.segments_reused} reused)",
        "source tokens": f"{stats['source_tokens']}",
        "concepts": f"{stats['concepts']}",
        "achieved rate": f"{stats['achieved_rate']:.2f} tokens per concept (asked for {stats['rate']:g})",
        "entry layer": f"{stats['entry_layer']}, prefill cost of a passage {stats['prefill_cost']:.2f} (text = 1)",
        "concept bytes": f"{stats['concept_bytes']} ({stats['bytes_per_source_token']:.0f} per source token)",
        "time": f"{report.seconds:.1f} s, {report.tokens_per_s:.0f} tokens/s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _show_question(console: Console, number: int, row: dict[str, Any]) -> None:
    table = Table(title=f"{number}. {row['question']}", title_justify="left", expand=True)
    for name, width in (("read as", 8), ("answer", None), ("cited sources", None), ("positions", 9), ("TTFT", 7)):
        right = name in ("positions", "TTFT")
        table.add_column(name, justify="right" if right else "left", width=width, ratio=None if width else 1)
    for mode, found in row["answers_by_mode"].items():
        cited: dict[str, list[str]] = {}
        for i, source in enumerate(found["sources"], 1):
            cited.setdefault(source["title"], []).append(f"[{i}]")
        titles = ", ".join(f"{''.join(numbers)} {title}" for title, numbers in cited.items())
        answer = " ".join(found["answer"].split()) or "(none)"
        table.add_row(mode, answer, titles, str(found["prompt_positions"]), f"{found['ttft_s']:.2f} s")
    table.add_row("gold", " | ".join(dict.fromkeys(row["answers"])), "", "", "", style="dim")
    console.print(table)


def _show_summary(console: Console, summary: dict[str, Any], n: int, again: Any) -> None:
    table = Table(title=f"Means over {n} questions")
    means = summary["means"]
    for name in ("", *means):
        table.add_column(name, justify="right" if name else "left")

    def row(title: str, field: str, shown: Callable[[float], str]) -> None:
        cells = []
        for name, values in means.items():
            share = summary.get(f"{name}_over_text", {}).get(field)
            cells.append(shown(values[field]) + ("" if share is None else f" ({share:.2f})"))
        table.add_row(title, *cells)

    row("prompt positions", "prompt_positions", lambda n: f"{n:.0f}")
    row("prefill cost", "prefill_cost", lambda cost: f"{cost:.2f}")
    row("KV cache", "kv_bytes", lambda n: f"{n / 2**20:.1f} MiB")
    row("TTFT", "ttft_s", lambda s: f"{s:.2f} s")
    row("F1", "f1", lambda f: f"{f:.1f}")
    table.caption = "in brackets: share of text's"
    console.print(table)
    console.print(
        f"Ingested again: {again.segments_compressed} segments compressed, {again.segments_reused} of "
        f"{again.segments} reused, {again.seconds:.2f} s.",
        highlight=False,
    )
