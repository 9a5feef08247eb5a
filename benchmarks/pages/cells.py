"""Cells of tables that sections share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def finished(path: Path) -> dict[str, Any] | None:
    """The record in a file; None where there is none, or where a run was interrupted and will go on."""
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record if "environment" in record else None


def number(value: float | None, digits: int = 1) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def with_interval(value: float | None, interval: Sequence[float] | None, digits: int = 1) -> str:
    """A number with its interval in brackets."""
    if value is None or interval is None:
        return number(value, digits)
    return f"{value:.{digits}f} [{interval[0]:.0f}, {interval[1]:.0f}]"


def source(record: dict[str, Any]) -> str:
    """The command, commit and machine that a record comes from."""
    where = record["environment"]
    device = where["gpu"] or f"{where['cpu']}, {where['torch_threads']} threads of {where['cores']} cores"
    versions = where["versions"]
    code = f"commit {where['commit'][:9]}" if where["commit"] else f"version {versions.get('compllm-rag', 'unknown')}"
    return f"`{record['command']}`, {code}, {device}, torch {versions['torch']}"
