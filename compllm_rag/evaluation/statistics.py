"""What a list of records comes to: means, recovered, and bootstrap intervals over questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compllm_rag.evaluation.metrics import same_answer

Array = NDArray[np.float64]

RESAMPLES = 1000
# Under this many nats between no passages and passages as text there is nothing to recover (docs/design.md section 7).
LEAST_GAIN = 0.3
_PAIRED = ("em", "f1", "subspan_em", "accuracy", "nll")
_CHUNK = 200


@dataclass(frozen=True)
class Record:
    """One question in one setting.

    Attributes:
        id: Of the question.
        question: What was asked.
        golds: Gold answers.
        answer: What the LLM said, None where it only scored.
        em: Exact match, 0 or 100; None without an answer, as are the next two.
        f1: Word overlap, 0 to 100.
        subspan_em: Containment, 0 or 100.
        option: The likeliest option, None where there are none.
        correct: Whether it is the right one.
        nll: Nats per token of the first gold answer with its end token.
        n_tokens: Those tokens.
        positions: Prompt positions.
        source_tokens: Tokens of the passages as text.
        concepts: Positions that stand for them, None in modes text and none.
        cost: What these take at prefill, in text tokens; a concept passes the layers from the entry layer on.
    """

    id: str
    question: str
    golds: tuple[str, ...]
    answer: str | None
    em: float | None
    f1: float | None
    subspan_em: float | None
    option: int | None
    correct: bool | None
    nll: float
    n_tokens: int
    positions: int
    source_tokens: int
    concepts: int | None
    cost: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a line of `--records`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Record:
        """What `to_dict` gave, also after JSON."""
        return cls(**{**line, "golds": tuple(line["golds"])})


Sums = dict[str, tuple[Array, Array]]


@dataclass(frozen=True)
class Statistics:
    """Values, intervals and differences to text; a value that does not exist is None."""

    values: dict[str, float | None]
    intervals: dict[str, list[float] | None]
    paired: dict[str, dict[str, Any] | None]


def statistics(
    records: Sequence[Record],
    text: Sequence[Record],
    none: Sequence[Record],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Statistics:
    """Means over questions, and how far other questions of the same kind might move them.

    Args:
        records: Of the setting.
        text: Of the same questions with the passages as text.
        none: Of the same questions without passages.
        seed: Of the bootstrap.
        resamples: Of the questions, with replacement; the 2.5th and 97.5th percentiles make an interval. Resamples in
            which a value does not exist are left out of its interval.
    """
    mine, theirs = _sums(records, text), _sums(text, text)
    bare = _sums(none, text)["nll"]
    once = _values(np.ones((1, len(records))), mine, theirs, bare)
    names = [name for name, value in once.items() if not np.isnan(value[0])]
    drawn: dict[str, list[Array]] = {name: [] for name in names}
    rng = np.random.default_rng(seed)
    for begin in range(0, resamples, _CHUNK):
        weights = _weights(rng, min(_CHUNK, resamples - begin), len(records))
        found = _values(weights, mine, theirs, bare)
        for name in names:
            drawn[name].append(found[name])
    ends = {name: _interval(np.concatenate(parts)) for name, parts in drawn.items()}

    def value(name: str) -> float | None:
        return float(once[name][0]) if name in ends else None

    own = [name for name in once if not name.startswith("-")]
    return Statistics(
        {name: value(name) for name in own},
        {name: ends.get(name) for name in own},
        {
            name: {"difference": value(f"-{name}"), "interval": ends[f"-{name}"]} if f"-{name}" in ends else None
            for name in _PAIRED
        },
    )


def differences(
    records: Sequence[Record],
    others: Sequence[Record],
    text: Sequence[Record],
    none: Sequence[Record],
    *,
    names: Sequence[str] = ("f1", "recovered"),
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, dict[str, Any] | None]:
    """How much higher values are in one setting than in another, on the same questions.

    Args:
        records: Of the one.
        others: Of the other.
        text: Of the same questions with the passages as text.
        none: Of the same questions without passages.
        names: Of the values.
        seed: Of the bootstrap.
        resamples: See `statistics`; both settings are drawn together.

    Returns:
        `difference` and 95 % `interval` by name; None where a value does not exist.
    """
    mine, theirs, reference = (_sums(each, text) for each in (records, others, text))
    bare = _sums(none, text)["nll"]

    def values(weights: Array) -> dict[str, Array]:
        one, other = (_values(weights, sums, reference, bare) for sums in (mine, theirs))
        return {name: one[name] - other[name] for name in names}

    once, rng = values(np.ones((1, len(records)))), np.random.default_rng(seed)
    sizes = [min(_CHUNK, resamples - begin) for begin in range(0, resamples, _CHUNK)]
    drawn = [values(_weights(rng, size, len(records))) for size in sizes]
    return {
        name: None
        if np.isnan(once[name][0])
        else {
            "difference": float(once[name][0]),
            "interval": _interval(np.concatenate([part[name] for part in drawn])),
        }
        for name in names
    }


def _sums(records: Sequence[Record], text: Sequence[Record]) -> Sums:
    """Numerator and denominator (n,) of each mean, per question."""
    ones = np.ones(len(records))
    agreement = [
        None if r.answer is None or t.answer is None else 100.0 * same_answer(r.answer, t.answer)
        for r, t in zip(records, text, strict=True)
    ]
    chosen = [None if r.correct is None else 100.0 * r.correct for r in records]
    tokens = np.array([r.n_tokens for r in records], dtype=np.float64)
    return {
        "em": _present([r.em for r in records]),
        "f1": _present([r.f1 for r in records]),
        "subspan_em": _present([r.subspan_em for r in records]),
        "accuracy": _present(chosen),
        "nll": (np.array([r.nll for r in records]) * tokens, tokens),
        "agreement": _present(agreement),
        "positions": (np.array([r.positions for r in records], dtype=np.float64), ones),
        "achieved_rate": (
            np.array([r.source_tokens if r.concepts is not None else 0 for r in records], dtype=np.float64),
            np.array([r.concepts or 0 for r in records], dtype=np.float64),
        ),
    }


def _present(values: Sequence[float | None]) -> tuple[Array, Array]:
    return (
        np.array([0.0 if value is None else value for value in values]),
        np.array([float(value is not None) for value in values]),
    )


def _weights(rng: np.random.Generator, rows: int, n: int) -> Array:
    """How often each of n questions is in each of `rows` resamples (rows, n)."""
    drawn = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _values(weights: Array, mine: Sums, theirs: Sums, bare: tuple[Array, Array]) -> dict[str, Array]:
    """Each value (rows,) under weights (rows, n); differences to text are named with a dash in front."""
    out = {name: _mean(weights, sums) for name, sums in mine.items()}
    text, none = _mean(weights, theirs["nll"]), _mean(weights, bare)
    gain = none - text
    there = gain >= LEAST_GAIN
    out["recovered"] = np.where(there, 100 * ((none - out["nll"]) / np.where(there, gain, 1)), np.nan)
    return out | {f"-{name}": out[name] - _mean(weights, theirs[name]) for name in _PAIRED}


def _mean(weights: Array, sums: tuple[Array, Array]) -> Array:
    above, below = weights @ sums[0], weights @ sums[1]
    return np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)


def _interval(values: Array) -> list[float]:
    low, high = np.percentile(values[~np.isnan(values)], [2.5, 97.5])
    return [float(low), float(high)]
