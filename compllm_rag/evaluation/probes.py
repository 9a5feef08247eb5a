"""Fidelity probes: what compression loses, kind by kind.

The probes ship with the package (`pipelines/build_probes.py` made them): short questions for numbers, dates, names,
code identifiers, negation, the order of events, and a needle at five depths of a longer passage. They are small and
made by templates: they tell kinds apart, and are no measure of quality at large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.evaluation.questions import read_questions, read_rows
from compllm_rag.evaluation.results import EvalConfig, EvalResult
from compllm_rag.evaluation.runner import Progress, evaluate_many
from compllm_rag.evaluation.statistics import Record


@dataclass(frozen=True)
class ProbeResult:
    """Scores of one setting on the probes, beside those of text.

    Attributes:
        result: Of all probes in the setting.
        text: Of the same probes as text.
        kinds: Of each probe by its id.
        depths: Percent of the passage in front of each needle, by its id.
    """

    result: EvalResult
    text: EvalResult
    kinds: dict[str, str]
    depths: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """As `probe --json` prints it."""
        whole = self.result.to_dict()
        scores = {"kinds": self.by_kind(self.result), "depths": self.by_depth(self.result)}
        text = {"kinds": self.by_kind(self.text), "depths": self.by_depth(self.text)}
        names = ("mode", "rate", "llm", "seed", "n", "positions", "achieved_rate")
        return {name: whole[name] for name in names} | scores | {"text": text, "seconds": whole["seconds"]}

    def by_kind(self, result: EvalResult) -> dict[str, dict[str, Any]]:
        """Scores of each kind."""
        return _grouped(result.records, lambda record: self.kinds[record.id])

    def by_depth(self, result: EvalResult) -> dict[str, dict[str, Any]]:
        """Scores of needles at each depth."""
        needles = [record for record in result.records if record.id in self.depths]
        needles.sort(key=lambda record: self.depths[record.id])
        return _grouped(needles, lambda record: str(self.depths[record.id]))


def probe_file() -> Path:
    """The probes that ship; rows are those of `read_questions`, with `kind` and `depth`."""
    return Path(str(resources.files("compllm_rag"))) / "data" / "probes.jsonl.gz"


def run_probes(
    compressor: ConceptCompressor,
    *,
    mode: str = "concepts",
    rate: float | None = 2.0,
    config: EvalConfig | None = None,
    progress: Progress | None = None,
) -> ProbeResult:
    """Ask the probes in one setting and as text.

    Args:
        compressor: With its target LLM.
        mode: See `evaluate`.
        rate: See `evaluate`.
        config: See `evaluate`.
        progress: See `evaluate`.

    Raises:
        ConfigurationError, RateOutOfReachError, PromptTooLongError: See `evaluate`.
    """
    file = probe_file()
    rows = {str(row["id"]): row for _, row in read_rows(file)}
    settings = [(mode, rate), ("text", None)]
    result, text = evaluate_many(
        compressor, read_questions(file), settings, config=config, data=file.name, progress=progress
    )
    kinds = {name: str(row["kind"]) for name, row in rows.items()}
    depths = {name: int(row["depth"]) for name, row in rows.items() if "depth" in row}
    return ProbeResult(result, text, kinds, depths)


def _grouped(records: Sequence[Record], key: Callable[[Record], str]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return {name: _scores(group) for name, group in groups.items()}


def _scores(records: Sequence[Record]) -> dict[str, Any]:
    tokens = sum(r.n_tokens for r in records)
    return {
        "n": len(records),
        "em": _mean([r.em for r in records]),
        "f1": _mean([r.f1 for r in records]),
        "subspan_em": _mean([r.subspan_em for r in records]),
        "accuracy": _mean([None if r.correct is None else 100.0 * r.correct for r in records]),
        "nll": round(sum(r.nll * r.n_tokens for r in records) / tokens, 4),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of those that exist."""
    found = [value for value in values if value is not None]
    return round(fmean(found), 4) if found else None
