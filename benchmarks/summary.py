"""A benchmark's record as people read it in a terminal: what `compllm-rag bench` shows at the end of a run.

Where docs/ has a section for it, that section; else a table of its own. Pictures are for the pages: none is drawn, so
that no plotting package is needed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import quality_report, storage_report
from benchmarks.pages.cells import number

Record = dict[str, Any]
# Benchmarks whose section is in the module of another's page.
_PAGE_OF = {"ingest_scale": "ingest"}


def summary(name: str, record: Record) -> str:
    """Markdown of a record.

    Args:
        name: The benchmark's.
        record: As it was written; for `quality` a record for each set, by the set's name.

    Returns:
        Markdown without pictures; nothing where neither a page nor this module knows the benchmark.
    """
    if name in _TABLES:
        return "\n".join(_TABLES[name](record))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = _section(name, record, folder) or ""
    return "\n".join(line for line in made.splitlines() if not line.startswith("!["))


def _section(name: str, record: Record, folder: Path) -> str | None:
    if name in storage_report.FILES:
        none: dict[str, Record | None] = dict.fromkeys(storage_report.FILES)
        page = storage_report.page(**(none | {name: record}))
        return page[page.index("\n## ") :]
    if name == "quality":
        (folder / "quality").mkdir()
        for part, one in record.items():
            (folder / "quality" / f"{part}.json").write_text(json.dumps(one), encoding="utf-8")
        return _unillustrated(quality_report).quality(folder, folder)  # type: ignore[no-any-return]
    page_name = f"benchmarks.pages.{_PAGE_OF.get(name, name)}"
    if importlib.util.find_spec(page_name) is None:
        return None
    (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    return _unillustrated(importlib.import_module(page_name)).section(folder, folder)  # type: ignore[no-any-return]


def _unillustrated(page: ModuleType) -> Any:
    """A page's module that draws nothing: a second copy, the first stays as it is."""
    spec = importlib.util.find_spec(page.__name__)
    if spec is None or spec.loader is None:
        raise ImportError(page.__name__)
    copy: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    if hasattr(copy, "plot"):
        copy.plot = lambda *_: None
    return copy


def _startup(record: Record) -> list[str]:
    lines = ["## Start-up", "", "| process | median |", "|---|---|"]
    return lines + [f"| {name} | {number(seconds, 2)} s |" for name, seconds in record["median_s"].items()]


def _query(record: Record) -> list[str]:
    lines = ["## One query", "", "| context, tokens | read as | positions | TTFT | of text's | over the bound |"]
    lines.append("|---|---|---|---|---|---|")
    for length, context in record["contexts"].items():
        for name, row in context.items():
            if isinstance(row, dict):
                quotients = [number(row[key]["median"], 2) for key in ("ttft_over_text", "ttft_over_bound")]
                cells = [length, name, str(row["prompt_positions"]), f"{number(row['ttft_s'], 2)} s", *quotients]
                lines.append("| " + " | ".join(cells) + " |")
    return lines


def _edits(record: Record) -> list[str]:
    head = ["text", "tokens", "first ingest", "segments again, most", "chunks again, most", "time of the first"]
    lines = ["## One sentence changed", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in record["texts"].items():
        share = row["share_of_first"]
        spread = f"{100 * share['median']:.1f} % ({100 * share['min']:.1f} to {100 * share['max']:.1f})"
        cells = [name, f"{row['source_tokens']:,}", f"{number(row['first_ingest_s'])} s"]
        cells += [str(row["most_segments"]), str(row["most_chunks"]), spread]
        lines.append("| " + " | ".join(cells) + " |")
    later = [row["share_reused"] for row in record["revisions"][1:]]
    if later:
        share = 100 * sum(later) / len(later)
        lines += ["", f"Revisions of a real text, {len(later)} after the first: {share:.0f} % of segments reused."]
    return lines


_TABLES: dict[str, Callable[[Record], list[str]]] = {"startup": _startup, "query": _query, "edits": _edits}
