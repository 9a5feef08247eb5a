"""Examples laid out as arrays of whole numbers, so that whoever trains on a GPU finds them ready.

What stands where in a prompt is decided by `examples`, as for every training; here it becomes indices that other
processes can make ahead and a GPU gathers by: no loop over examples is left for the process that drives it. Only the
answers' predictions are among the targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from compllm_rag.prompt import ConceptSpan, TextSpan
from compllm_rag.training.examples import Example, Row, row_of, without_concepts

Arrays = dict[str, np.ndarray]
# Places kept of each unit of each passage.
Kept = Sequence[Sequence[Sequence[int]]]
# Rows are as long as a multiple of this: attention kernels want masks aligned.
_MULTIPLE = 8


def text_rows(examples: Sequence[Example], branches: int) -> Arrays:
    """Examples as the LLM reads them as text.

    Args:
        examples: At least one.
        branches: Of the whole batch; each branch weighs as much, each token of its answer alike.

    Returns:
        `ids`, `owner` and `places`, (batch, n) each: token, whose slot (0: the prefix, -1: padding), position. `at`,
        `target` and `weight`, (n_predictions,) each: slot that predicts, counted through all rows, token and weight;
        `first`, whether it is the first of its answer.
    """
    rows = [row_of(example, None) for example in examples]
    return {"ids": _padded([_tokens(row) for row in rows], 0), **_slots(rows), **_targets(rows, examples, branches)}


def deep_rows(examples: Sequence[Example], kept: Sequence[Kept], opening: Sequence[int], branches: int) -> Arrays:
    """Examples as they are read as text, by a teacher, and with deep concepts.

    Args:
        examples: At least one.
        kept: Of each example, the places kept of each unit of each passage.
        opening: In front of every unit.
        branches: See `text_rows`.

    Returns:
        What `text_rows` gives, by names that begin with `text_`. `unit_ids` (units, u) and `unit_marks`, 1 where a
        token is kept and others of its unit are not; `low_ids`, `low_owner`, `low_places` (batch, l): the prompts' own
        tokens; `owner`, `places` and `at` of what the upper half reads, (batch, n), and `joined`, where each of its
        slots comes from: among the rows of tokens, then those of units, one behind the other, and a row of zeros.
    """
    teacher = {f"text_{name}": array for name, array in text_rows(examples, branches).items()}
    units: list[list[int]] = []
    marks: list[list[int]] = []
    rows: list[Row] = []
    sources: list[list[tuple[int, int]]] = []  # of each concept of a row: its unit, and its slot there
    for example, bodies in zip(examples, kept, strict=True):
        spans, source = [], list[tuple[int, int]]()
        for number, (body, chosen) in enumerate(zip(example.bodies, bodies, strict=True)):
            places, begin = list[int](), 0
            for unit, own in zip(body.segments, chosen, strict=True):
                slots = [len(opening) + place for place in own]
                source += [(len(units), slot) for slot in slots]
                places += [begin + place for place in own]
                units.append([*opening, *unit])
                marks.append(slots if len(own) < len(unit) else [])
                begin += len(unit)
            # Only how many there are counts here, and where: (n_concepts, 0) states.
            spans.append(ConceptSpan(torch.empty(len(places), 0), number, torch.tensor(places), len(body)))
        rows.append(row_of(example, spans))
        sources.append(source)
    low = [without_concepts(row) for row in rows]
    low_ids, unit_ids = _padded([_tokens(row) for row in low], 0), _padded(units, 0)
    unit_marks = np.zeros(unit_ids.shape, dtype=np.float32)
    for line, own_marks in zip(unit_marks, marks, strict=True):
        line[own_marks] = 1
    joined = []
    for number, (row, source) in enumerate(zip(rows, sources, strict=True)):
        tokens = iter(range(number * low_ids.shape[1], (number + 1) * low_ids.shape[1]))
        concepts = (low_ids.size + unit * unit_ids.shape[1] + slot for unit, slot in source)
        joined.append([next(tokens) if is_token else next(concepts) for is_token in row.tokens])
    return {
        **teacher,
        "unit_ids": unit_ids,
        "unit_marks": unit_marks,
        "low_ids": low_ids,
        **{f"low_{name}": array for name, array in _slots(low).items()},
        "joined": _padded(joined, low_ids.size + unit_ids.size),
        **_slots(rows),
        "at": _targets(rows, examples, branches)["at"],
    }


def kept_by_scores(scores: Mapping[tuple[int, ...], np.ndarray], unit: tuple[int, ...], n_concepts: int) -> list[int]:
    """The places of the highest scores, in order, as `selection.best_positions` chooses them."""
    if n_concepts >= len(unit):
        return list(range(len(unit)))
    order = np.argsort(-scores[unit], kind="stable")
    return sorted(int(place) for place in order[:n_concepts])


def _tokens(row: Row) -> list[int]:
    """Token ids slot by slot, 0 where a concept stands."""
    return [token for span in row.spans for token in (span.ids if isinstance(span, TextSpan) else [0] * len(span))]


def _slots(rows: Sequence[Row]) -> Arrays:
    return {"owner": _padded([row.owner for row in rows], -1), "places": _padded([row.places for row in rows], 0)}


def _targets(rows: Sequence[Row], examples: Sequence[Example], branches: int) -> Arrays:
    width = _width(rows)
    at: list[int] = []
    target: list[int] = []
    weight: list[float] = []
    first: list[bool] = []
    for number, (row, example) in enumerate(zip(rows, examples, strict=True)):
        columns = iter(row.columns)
        for branch in example.branches:
            for _ in branch.prompt[1:]:
                next(columns)  # what predicts the question is not learned
            at += [number * width + next(columns) for _ in branch.target]
            target += branch.target
            weight += [1 / len(branch.target) / branches] * len(branch.target)
            first += [place == 0 for place in range(len(branch.target))]
    return {
        "at": np.array(at),
        "target": np.array(target),
        "weight": np.array(weight, dtype=np.float32),
        "first": np.array(first),
    }


def _width(rows: Sequence[Row]) -> int:
    return -(-max(len(row.owner) for row in rows) // _MULTIPLE) * _MULTIPLE


def _padded(rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    """Rows of whole numbers, (batch, n), filled up behind."""
    made = np.full((len(rows), -(-max(map(len, rows)) // _MULTIPLE) * _MULTIPLE), fill, dtype=np.int64)
    for line, values in zip(made, rows, strict=True):
        line[: len(values)] = values
    return made
