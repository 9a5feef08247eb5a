"""A folder a question: benchmark NAME is the module `benchmarks/FOLDER/NAME.py`, its record lies in results/NAME.json.

A benchmark has `main(argv)`, which returns its record. Its page has `tables(record)`, lines of Markdown, and where they
name a picture `plot(record)`, a figure of matplotlib; it is the module NAME_page.py, or the benchmark's own if short.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

FOLDERS = {
    "quality": (
        "quality",
        "chunks",
        "frontier",
        "narrowing",
        "pins",
        "placeholders",
        "anchors",
        "ablations",
        "domains",
    ),
    "ttft": ("ttft", "ttft_deep", "ttft_long", "cost_model", "query", "startup"),
    "loft": ("loft", "equal_cost"),
    "reuse": ("reuse",),
    "chat": ("chat",),
    "server": ("batching", "load"),
    "ingest": ("ingest", "ingest_scale", "ingest_workers", "ingest_plan", "edits"),
    "live": ("editors", "editors_http"),
    "storage": ("storage_size", "storage_quality", "store_read", "commits"),
    "rivals": ("rivals", "alike"),
    "rates": ("rates",),
    "planner": ("planner", "relevance"),
}


def benchmark(name: str) -> Any:
    """The module with `main`."""
    return importlib.import_module(_path(name))


def page(name: str) -> Any:
    """The module with `tables`."""
    own = f"{_path(name)}_page"
    return importlib.import_module(own if importlib.util.find_spec(own) else _path(name))


def _path(name: str) -> str:
    folder = next(folder for folder, names in FOLDERS.items() if name in names)
    return f"benchmarks.{folder}.{name}"
