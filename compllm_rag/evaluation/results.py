"""What an evaluation is told, and what it finds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from compllm_rag.config import Frozen
from compllm_rag.evaluation.statistics import Record

METRICS = ("em", "f1", "subspan_em", "accuracy", "nll", "recovered", "agreement")
_SHOWN = 5


class EvalConfig(Frozen):
    """How questions are chosen and asked."""

    limit: int | None = Field(default=None, ge=1, description="first N questions of the seeded order")
    seed: int = Field(default=0, ge=0, description="of the order and of the bootstrap")
    passages: Literal["all", "gold"] = Field(default="all", description="gold leaves the distractors out")
    batch_size: int = Field(default=16, ge=1)
    max_new_tokens: int = Field(default=24, ge=1)
    generate: bool = Field(default=True, description="False: likelihoods only, no answers")


@dataclass(frozen=True)
class EvalResult:
    """One setting on one set of questions.

    Attributes:
        data: Where the questions came from.
        mode: See `Setting`.
        rate: See `Setting`.
        narrowing: See `Setting`, as `LAYER:SHARE`.
        llm: Source of the target LLM.
        seed: Of order and bootstrap.
        n: Questions asked.
        em: Exact match in percent.
        f1: Word overlap in percent.
        subspan_em: Percent of answers that contain a gold answer.
        accuracy: Percent of questions whose right option is the likeliest; None where no question has options.
        nll: Nats per token of the gold answers with their end token.
        recovered: Percent of what text gains over none (docs/design.md section 7); None where text gains too little.
        agreement: Percent of answers that are those of text.
        positions: Prompt positions, mean.
        achieved_rate: Source tokens per concept; None for text and none.
        prefill_cost: Of a token of a passage, text = 1; None without passages.
        intervals: Bootstrap 95 % intervals of the values above, over questions.
        paired: Differences to text on the same questions, each with its interval.
        skipped: (id, reason) of every question that was left out.
        seconds: Of this setting's own run; what the comparison with text and none took is not in it.
        records: One per question, in seeded order.
    """

    data: str
    mode: str
    rate: float | None
    narrowing: str | None
    llm: str
    seed: int
    n: int
    em: float | None
    f1: float | None
    subspan_em: float | None
    accuracy: float | None
    nll: float | None
    recovered: float | None
    agreement: float | None
    positions: float
    achieved_rate: float | None
    prefill_cost: float | None
    intervals: dict[str, list[float] | None]
    paired: dict[str, dict[str, Any] | None]
    skipped: tuple[tuple[str, str], ...]
    seconds: float
    records: tuple[Record, ...] = field(repr=False, default=())

    def to_dict(self) -> dict[str, Any]:
        """As `eval --json` prints it: rounded, without records, the first few of the skipped."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "records"}
        first = [f"{name}: {reason}" for name, reason in self.skipped[:_SHOWN]]
        rounded: dict[str, Any] = _rounded(fields | {"skipped": {"count": len(self.skipped), "first": first}})
        return rounded


def record_lines(results: Sequence[EvalResult]) -> Iterator[dict[str, Any]]:
    """Lines of `--records`: each setting's records, with mode and rate in front."""
    for result in results:
        for record in result.records:
            yield {"mode": result.mode, "rate": result.rate, **record.to_dict()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
