"""Metadata filters as SQL over the catalog's rows, so that SQLite reads the metadata and no Python does.

All values are bound, never written into the statement. Two things SQLite's JSON functions do not have are left to the
reference, row by row: texts with NUL, which they cut off, and keys that JSON has to escape.
"""

from __future__ import annotations

import json
import math
import sqlite3
from typing import Any

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from compllm_rag.llamaindex.filters import (
    ABSENT,
    LISTS,
    OF_DOCUMENT,
    check_filters,
    leaves,
    matches,
    number,
)

_METADATA = "json_each(nodes.node, '$.fields.metadata')"
_NUMBERS = "('integer', 'real', 'true', 'false')"
_SCALARS = "('integer', 'real', 'true', 'false', 'text')"
_ORDERS = {
    FilterOperator.GT: ">",
    FilterOperator.GTE: ">=",
    FilterOperator.LT: "<",
    FilterOperator.LTE: "<=",
}
_NUL = "\\u0000"  # as JSON has it
_REFERENCE, _LOWER = "compllm_matches", "compllm_lower"


def ids_passing(connection: sqlite3.Connection, filters: MetadataFilters) -> list[int]:
    """Ids of the rows that pass, in ascending order.

    Args:
        connection: Of the catalog, within a transaction.
        filters: What is asked; see `filters.matches` for what it means.

    Raises:
        ConfigurationError: A filter makes no sense, or is not supported.
    """
    check_filters(filters)

    def passes(node: str, ref_doc_id: str) -> bool:
        return matches(filters, json.loads(node)["fields"]["metadata"], ref_doc_id)

    connection.create_function(_REFERENCE, 2, passes, deterministic=True)
    connection.create_function(_LOWER, 1, str.lower, deterministic=True)  # SQLite's own knows ASCII only
    by_row = f"{_REFERENCE}(nodes.node, nodes.ref_doc_id)"
    if any(map(_beyond_json, leaves(filters))):
        condition, values = by_row, list[Any]()
    else:
        inner, values = _group(filters)
        condition, values = f"CASE WHEN instr(nodes.node, ?) THEN {by_row} ELSE {inner} END", [_NUL, *values]
    query = f"SELECT nodes.id FROM nodes WHERE {condition} ORDER BY nodes.id"
    return [id_ for (id_,) in connection.execute(query, values)]


def _beyond_json(part: MetadataFilter) -> bool:
    """Whether SQLite's JSON functions would read this filter's key or one of its values as something else."""
    values = [number(value) for value in (part.value if isinstance(part.value, list) else [part.value])]
    if any(isinstance(value, float) and math.isinf(value) for value in values):
        return True
    texts = [part.key, *(value for value in values if isinstance(value, str))]
    return any(character in '"\\' or character < " " for text in texts for character in text)


def _group(filters: MetadataFilters) -> tuple[str, list[Any]]:
    parts = [_group(part) if isinstance(part, MetadataFilters) else _single(part) for part in filters.filters]
    if not parts:
        return "1", []
    joint = " AND " if filters.condition in (None, FilterCondition.AND) else " OR "
    condition = f"({joint.join(sql for sql, _ in parts)})"
    if filters.condition == FilterCondition.NOT:
        condition = f"NOT {condition}"
    return condition, [value for _, values in parts for value in values]


def _single(part: MetadataFilter) -> tuple[str, list[Any]]:
    """One filter; `m` is the metadata's value under its key."""
    values: list[Any] = []
    if part.operator == FilterOperator.IS_EMPTY:
        test = "NOT (m.type = 'null' OR m.type = 'text' AND m.value = '' OR m.type = 'array' AND m.value = '[]')"
    else:
        test, values = _test(part)
        test = f"m.type <> 'null' AND {test}"
    there = f"EXISTS (SELECT 1 FROM {_METADATA} AS m WHERE m.key = ? AND {test})"
    asked = [part.key, *values]
    if part.key in OF_DOCUMENT:
        # Where the metadata has no such key, it is the row's own document.
        lacks = f"NOT EXISTS (SELECT 1 FROM {_METADATA} AS k WHERE k.key = ?)"
        own = f"EXISTS (SELECT 1 FROM (SELECT 'text' AS type, nodes.ref_doc_id AS value) AS m WHERE {test})"
        there = f"({there} OR {lacks} AND {own})"
        asked += [part.key, *values]
    negated = part.operator in ABSENT or part.operator == FilterOperator.IS_EMPTY
    return (f"NOT {there}" if negated else there), asked


def _test(part: MetadataFilter) -> tuple[str, list[Any]]:
    """What `m` must be; of an operator that holds where the key is absent, what it must not be."""
    operator, want = part.operator, part.value
    if operator in (FilterOperator.EQ, FilterOperator.NE):
        return _equals(want)
    if operator in LISTS:
        wanted = json.dumps(want)
        if operator in (FilterOperator.IN, FilterOperator.NIN):
            return f"EXISTS (SELECT 1 FROM json_each(?) AS w WHERE {_same('m')})", [wanted]
        if operator == FilterOperator.ANY:
            return f"EXISTS (SELECT 1 FROM json_each(?) AS w WHERE {_CONTAINED})", [wanted]
        return f"NOT EXISTS (SELECT 1 FROM json_each(?) AS w WHERE NOT {_CONTAINED})", [wanted]
    if operator == FilterOperator.CONTAINS:
        return f"EXISTS (SELECT 1 FROM json_each(?) AS w WHERE {_CONTAINED})", [json.dumps([want])]
    if operator == FilterOperator.TEXT_MATCH:
        return "m.type = 'text' AND instr(m.value, ?) > 0", [want]
    if operator == FilterOperator.TEXT_MATCH_INSENSITIVE:
        # CASE, since nothing else promises that a number never reaches the function.
        return f"CASE m.type WHEN 'text' THEN instr({_LOWER}(m.value), ?) > 0 ELSE 0 END", [str(want).lower()]
    return f"{_kind(want)} AND m.value {_ORDERS[operator]} ?", [number(want)]


def _equals(want: Any) -> tuple[str, list[Any]]:
    if not isinstance(want, list):
        return f"{_kind(want)} AND m.value = ?", [number(want)]
    # As many elements, and none that differs from the one at its place.
    other = f"NOT EXISTS (SELECT 1 FROM json_each(m.value) AS e WHERE e.key = w.key AND {_same('e')})"
    wanted = json.dumps(want)
    return (
        "CASE m.type WHEN 'array' THEN json_array_length(m.value) = json_array_length(?)"
        f" AND NOT EXISTS (SELECT 1 FROM json_each(?) AS w WHERE {other}) ELSE 0 END"
    ), [wanted, wanted]


def _kind(want: Any) -> str:
    return "m.type = 'text'" if isinstance(want, str) else f"m.type IN {_NUMBERS}"


def _same(have: str) -> str:
    """A scalar equals `w`, an element of the wanted list."""
    return f"({have}.type IN {_SCALARS} AND ({have}.type = 'text') = (w.type = 'text') AND {have}.value = w.value)"


_CONTAINED = f"""(CASE m.type
WHEN 'array' THEN EXISTS (SELECT 1 FROM json_each(m.value) AS e WHERE {_same("e")})
WHEN 'object' THEN w.type = 'text' AND EXISTS (SELECT 1 FROM json_each(m.value) AS e WHERE e.key = w.value)
WHEN 'text' THEN w.type = 'text' AND instr(m.value, w.value) > 0
ELSE 0 END)"""
