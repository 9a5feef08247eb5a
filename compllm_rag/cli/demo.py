"""The demo: the shipped sample corpus, ingested and asked, text and concepts side by side on the same passages."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from compllm_rag.cli.progress import ProgressShow
from compllm_rag.config import GenerationConfig, Mode
from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.metrics import f1

_MODES: tuple[Mode, Mode] = ("text", "concepts")
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
        console: Where to show; None means standard output.

    Returns:
        All that was shown, as plain values.

    Raises:
        ConfigurationError: `json_file` has no folder to lie in.
    """
    console = console or Console()
    if json_file is not None and not json_file.absolute().parent.is_dir():
        # Known now, and not when the work of minutes is done.
        raise ConfigurationError(
            "results cannot be written", got=json_file, expected="a file in a folder that exists", next_step="make it"
        )
    if storage is not None:
        return _run(console, json_file, rate, codec, top_k, limit, llm, embedder, storage, offline)
    with tempfile.TemporaryDirectory(prefix="compllm-demo-") as folder:
        return _run(console, json_file, rate, codec, top_k, limit, llm, embedder, Path(folder) / "storage", offline)


def _run(
    console: Console,
    json_file: Path | None,
    rate: float | None,
    codec: str | None,
    top_k: int,
    limit: int | None,
    llm: str,
    embedder: str,
    storage: Path,
    offline: bool,
) -> dict[str, Any]:
    from compllm_rag.llamaindex.corpus import IngestReport
    from compllm_rag.llamaindex.documents import load_documents
    from compllm_rag.llamaindex.index import ConceptIndex

    def read() -> IngestReport:
        return index.ingest(load_documents([sample_corpus() / "articles"]), progress=show.ingested)

    with ProgressShow() as show:
        show.fetching("loading the models", None)
        index = ConceptIndex.create(
            storage,
            llm=llm,
            embedder=embedder,
            rate=rate,
            codec=codec,
            offline=offline,
            progress=show.fetching,
            generation=GenerationConfig(max_new_tokens=_NEW_TOKENS),
        )
        with index:
            first, stats = read(), index.stats()
            show.close()
            _show_ingest(console, first, stats)
            asked = _ask(console, index, sample_questions()[:limit], top_k)
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


def _ask(console: Console, index: Any, questions: Sequence[dict[str, Any]], top_k: int) -> list[dict[str, Any]]:
    from compllm_rag.llamaindex.answer import answer, retrieve

    index.generator.prefixes = None  # each prompt is timed as if it were the first
    warm = retrieve(index, questions[0]["question"], top_k)
    for mode in _MODES:
        # The first forward of each shape pays for allocations that later ones do not; neither side may bear it alone.
        answer(index, questions[0]["question"], mode=mode, nodes=warm)
    asked = []
    for number, row in enumerate(questions):
        begun = time.perf_counter()
        nodes = retrieve(index, row["question"], top_k)
        retrieval_s = time.perf_counter() - begun
        # Whoever goes second finds warmer caches: the two take turns.
        order = _MODES if number % 2 == 0 else _MODES[::-1]
        answers = {mode: answer(index, row["question"], mode=mode, nodes=nodes) for mode in order}
        for found in answers.values():
            found["retrieval_s"] = retrieval_s
            found["f1"] = f1(found["answer"], row["answers"])
        asked.append({**row, "answers_by_mode": {mode: answers[mode] for mode in _MODES}})
        _show_question(console, number + 1, asked[-1])
    return asked


def _summary(asked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rows = {mode: [row["answers_by_mode"][mode] for row in asked] for mode in _MODES}
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
    means = {mode: {name: fmean(r[name] for r in rows[mode]) for name in fields} for mode in _MODES}
    shares = [r["ttft_s"] / t["ttft_s"] for t, r in zip(rows["text"], rows["concepts"], strict=True) if t["ttft_s"] > 0]
    return {
        "means": means,
        "concepts_over_text": {
            "prompt_positions": means["concepts"]["prompt_positions"] / means["text"]["prompt_positions"],
            "ttft_s": means["concepts"]["ttft_s"] / means["text"]["ttft_s"],
            "ttft_s_mean_of_each_question": fmean(shares),
        },
        "gold_title_retrieved": fmean(
            float(any(s["title"] == row["title"] for s in row["answers_by_mode"]["text"]["sources"])) for row in asked
        ),
    }


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
    for mode in _MODES:
        found = row["answers_by_mode"][mode]
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
    for name in ("", "text", "concepts", "concepts / text"):
        table.add_column(name, justify="left" if not name else "right")
    text, concepts = (summary["means"][mode] for mode in _MODES)
    table.add_row(
        "prompt positions",
        f"{text['prompt_positions']:.0f}",
        f"{concepts['prompt_positions']:.0f}",
        f"{summary['concepts_over_text']['prompt_positions']:.2f}",
    )
    table.add_row("prefill cost", *(f"{mode['prefill_cost']:.2f}" for mode in (text, concepts)), "")
    table.add_row(
        "KV cache",
        f"{text['kv_bytes'] / 2**20:.1f} MiB",
        f"{concepts['kv_bytes'] / 2**20:.1f} MiB",
        f"{concepts['kv_bytes'] / text['kv_bytes']:.2f}",
    )
    table.add_row(
        "TTFT",
        f"{text['ttft_s']:.2f} s",
        f"{concepts['ttft_s']:.2f} s",
        f"{summary['concepts_over_text']['ttft_s']:.2f}",
    )
    table.add_row("F1", f"{text['f1']:.1f}", f"{concepts['f1']:.1f}", "")
    console.print(table)
    console.print(
        f"Ingested again: {again.segments_compressed} segments compressed, {again.segments_reused} of "
        f"{again.segments} reused, {again.seconds:.2f} s.",
        highlight=False,
    )
