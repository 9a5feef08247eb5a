"""LOFT's metrics for RAG: em, subspan_em and f1 of one value, and for lists em, coverage and subspan_em by assignment.

As its evaluation code defines them (google-deepmind/loft, evaluation/rag.py), written anew. A list's subspan_em pairs
gold and answered values one to one so that as many as possible match, a match being containment either way: a single
letter can thus match. Coverage, which wants values to be equal, stands beside it for that reason.
"""

from __future__ import annotations

import ast
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from compllm_rag.evaluation.metrics import exact_match, f1, first_line, normalize, subspan_match


def parse_values(answer: str) -> list[str]:
    """The values of an answer: those of a Python list where there is one, else what commas and `and` part.

    Args:
        answer: Of the LLM; the first line counts, but for a bracketed list anywhere.
    """
    listed = re.search(r"\[.*\]", answer, re.DOTALL)
    if listed:
        try:
            found = ast.literal_eval(listed.group(0))
            return [str(value).strip() for value in found if str(value).strip()]
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    parts = re.split(r"[,;]|\band\b", first_line(answer).strip("[]"))
    return [part.strip(" '\"") for part in parts if part.strip(" '\"")]


def single_value(answer: str, golds: Sequence[str]) -> dict[str, float]:
    """em, subspan_em and f1, 0 to 100, the best over the gold answers."""
    answer, golds = _plain(answer), [_plain(gold) for gold in golds]
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
