"""LOFT's metrics for RAG: em, subspan_em and f1 of one value, and for lists em, coverage and subspan_em by assignment.

As its evaluation code defines them (google-deepmind/loft, evaluation/rag.py), written anew. A list's subspan_em pairs
gold and answered values one to one so that as many as possible match, a match being containment either way: a single
letter can thus match. Coverage, which wants values to be equal, stands beside it for that reason.

Two things are stricter here: a single gold value of which normalising leaves nothing must be met exactly (there every
answer contains it), and an answer without values counts as coverage 0 (there it is left out of the mean).
"""

from __future__ import annotations

import ast
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from benchmarks.loft.data import LoftSet, Query
from compllm_rag.evaluation.metrics import exact_match, f1, first_line, normalize, subspan_match
from compllm_rag.evaluation.statistics import RESAMPLES, Record

# An apostrophe within a word would end a Python string that stands between apostrophes.
_WITHIN_WORD = re.compile(r"(?<=\w)'(?=\w)")


def bracketed_values(answer: str) -> list[str] | None:
    """The values of the list in an answer, None where no line is a list or tells a final answer as one."""
    for line in answer.replace("*", "").replace("`", "").splitlines():
        start, end = line.find("["), line.rfind("]")
        if not 0 <= start < end or not ("final answer" in line.lower() or line.strip() == line[start : end + 1]):
            continue
        try:
            found = ast.literal_eval(_WITHIN_WORD.sub(r"\'", line[start : end + 1]))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return _listed(line[start + 1 : end])
        return [str(value).strip() for value in found if str(value).strip()]
    return None


def parse_values(answer: str) -> list[str]:
    """The values of an answer: those of a Python list where there is one, else what commas and `and` part.

    Args:
        answer: Of the LLM; the first line counts, but for a bracketed list anywhere.
    """
    values = bracketed_values(answer)
    return _listed(first_line(answer)) if values is None else values


def _listed(line: str) -> list[str]:
    """Values between commas; the last two may have an `and` between them."""
    *parts, last = re.split(r"[,;]", line)
    ends = re.split(r"\band\b", last, maxsplit=1) if parts else [last]
    return [value for part in [*parts, *ends] if (value := part.strip(" '\".[]"))]


def single_value(answer: str, golds: Sequence[str]) -> dict[str, float]:
    """em, subspan_em and f1, 0 to 100, the best over the gold answers; of a list the first value counts."""
    values = bracketed_values(answer)
    answer, golds = _plain(answer if values is None else next(iter(values), "")), [_plain(gold) for gold in golds]
    return {
        "em": exact_match(answer, golds),
        "subspan_em": subspan_match(answer, golds),
        "f1": f1(answer, golds),
    }


def multi_value(answer: str, golds: Sequence[str]) -> dict[str, float]:
    """em, coverage and subspan_em of a list of values, 0 to 100.

    Args:
        answer: Of the LLM, see `parse_values`.
        golds: All the values that are asked for.
    """
    wanted = [normalize(_plain(gold)) for gold in golds]
    given = [normalize(_plain(value)) for value in parse_values(answer)]
    if not given:
        return {"em": 0.0, "coverage": 0.0, "subspan_em": 0.0}
    matches = np.array([[float(g in a or a in g) for a in given] for g in wanted])
    rows, columns = linear_sum_assignment(matches, maximize=True)
    return {
        "em": 100.0 * (set(wanted) == set(given)),
        "coverage": 100.0 * len(set(wanted) & set(given)) / len(wanted),
        "subspan_em": 100.0 * (matches[rows, columns].sum() == len(wanted)),
    }


def _plain(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def scores(loft: LoftSet, queries: Mapping[str, Query], records: Iterable[Record], seed: int = 0) -> dict[str, Any]:
    """LOFT's metrics over the records of a setting, each with its bootstrap 95 % interval over questions."""
    score = multi_value if loft.multi_value else single_value
    rows = [score(record.answer or "", queries[record.id].answers) for record in records]
    drawn = np.random.default_rng(seed).integers(0, len(rows), size=(RESAMPLES, len(rows)))
    made = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
        made[name] = {"value": float(values.mean()), "interval": [float(low), float(high)]}
    return made
