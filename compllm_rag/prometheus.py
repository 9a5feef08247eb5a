"""The Prometheus text format, version 0.0.4, as far as it is needed here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

PREFIX = "compllm_"


@dataclass(frozen=True)
class Sample:
    """One value.

    Attributes:
        value: None leaves the sample out: there is nothing to tell yet.
        labels: By name.
        suffix: Of the family's name (`_bucket`, `_sum`, `_count`).
    """

    value: float | None
    labels: Mapping[str, str] = field(default_factory=dict)
    suffix: str = ""


@dataclass(frozen=True)
class Family:
    """Samples of one name.

    Attributes:
        name: Without `PREFIX`; a counter's ends in `_total`, and units are part of it.
        kind: `counter`, `gauge` or `histogram`.
        text: One sentence of help.
        samples: In order.
    """

    name: str
    kind: str
    text: str
    samples: list[Sample]


def exposition(families: Iterable[Family], labels: Mapping[str, str] | None = None) -> str:
    """Write families out; those without a value are left out.

    Args:
        families: Each name once.
        labels: Added to every sample.
    """
    lines = []
    for family in families:
        rows = [sample for sample in family.samples if sample.value is not None]
        if rows:
            name = PREFIX + family.name
            lines += [f"# HELP {name} {_escaped(family.text, quotes=False)}", f"# TYPE {name} {family.kind}"]
            lines += [f"{name}{row.suffix}{_labels({**(labels or {}), **row.labels})} {_number(row)}" for row in rows]
    return "".join(f"{line}\n" for line in lines)


def _labels(labels: Mapping[str, str]) -> str:
    inner = ",".join(f'{name}="{_escaped(value, quotes=True)}"' for name, value in labels.items())
    return f"{{{inner}}}" if inner else ""


def _escaped(text: str, *, quotes: bool) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(row: Sample) -> str:
    value = row.value if row.value is not None else math.nan
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(value) if isinstance(value, int) else repr(float(value))
