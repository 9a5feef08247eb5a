"""Tables of pages, and what stands in their cells; a dash stands where there is nothing."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ADAPTERS = Path(__file__).parents[1] / "compllm_rag" / "data" / "adapters"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, and an empty one."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def number(value: float | None, digits: int = 1) -> str:
    """A number."""
    return "–" if value is None else f"{value:,.{digits}f}"


def with_interval(value: float | None, interval: Sequence[float] | None, digits: int = 1, ends: int = 0) -> str:
    """A number with its interval in brackets.

    Args:
        value: The number.
        interval: Its ends.
        digits: Of the number, behind the point.
        ends: Digits of the ends.
    """
    if value is None or not interval:
        return number(value, digits)
    return f"{value:.{digits}f} [{interval[0]:.{ends}f}, {interval[1]:.{ends}f}]"


def apart(interval: Sequence[float] | None) -> Sequence[float] | None:
    """An interval that is more than a point; None otherwise."""
    return interval if interval and interval[0] != interval[1] else None


def difference(paired: dict[str, Any] | None, digits: int = 1, ends: int | None = None) -> str:
    """A paired difference with its interval, signed; `ends` has as many digits unless told otherwise."""
    if not paired:
        return "–"
    low, high = paired["interval"]
    ends = digits if ends is None else ends
    return f"{paired['difference']:+.{digits}f} [{low:+.{ends}f}, {high:+.{ends}f}]"


def spread(quotient: dict[str, float]) -> str:
    """Median, least and most of quotients."""
    return f"{quotient['median']:.2f} ({quotient['min']:.2f} to {quotient['max']:.2f})"


def way(row: dict[str, Any]) -> str:
    """How passages are read: the mode, with its rate if it has one."""
    return str(row["mode"]) if row["rate"] is None else f"{row['mode']}, rate {row['rate']:g}"


def measured(record: dict[str, Any]) -> str:
    """The command and commit that a record comes from."""
    return f"`{record['command']}`, commit {record['environment']['commit'][:9]}{other_weights(record)}"


def source(record: dict[str, Any]) -> str:
    """The command, commit and machine that a record comes from."""
    where = record["environment"]
    device = where["gpu"] or f"{where['cpu']}, {where['torch_threads']} threads of {where['cores']} cores"
    versions = where["versions"]
    code = f"commit {where['commit'][:9]}" if where["commit"] else f"version {versions.get('compllm-rag', 'unknown')}"
    return f"`{record['command']}`, {code}, {device}, torch {versions['torch']}{other_weights(record)}"


def other_weights(record: dict[str, Any]) -> str:
    """By what weights a record was measured, where they are not those that ship now; else nothing."""
    # where a run changed a setting of the compressor, `weights` is the fingerprint without the change
    llm, fingerprint = record.get("llm"), record.get("weights") or record.get("fingerprint")
    shipped = shipped_fingerprints(ADAPTERS / llm) if isinstance(llm, str) and llm else frozenset[str]()
    if not fingerprint or not shipped or fingerprint in shipped:
        return ""
    return f", by weights `{fingerprint[:8]}`, which are not those that ship now"


@functools.cache
def shipped_fingerprints(folder: Path) -> frozenset[str]:
    """Fingerprints of the compressors in the folders of a folder; none where there is no such folder."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/config.json")]
    return frozenset(str(record["fingerprint"]) for record in found if "fingerprint" in record)
