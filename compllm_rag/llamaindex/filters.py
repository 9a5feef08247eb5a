"""LlamaIndex metadata filters: what they mean, checked and evaluated on one node's metadata.

`filter_sql` asks the same of all rows at once; this module is the reference that it is tested against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from compllm_rag.catalog.database import storable
from compllm_rag.errors import ConfigurationError

_ORDERS: dict[FilterOperator, Callable[[Any, Any], bool]] = {
    FilterOperator.GT: lambda have, want: bool(have > want),
    FilterOperator.GTE: lambda have, want: bool(have >= want),
    FilterOperator.LT: lambda have, want: bool(have < want),
    FilterOperator.LTE: lambda have, want: bool(have <= want),
}
LISTS = frozenset({FilterOperator.IN, FilterOperator.NIN, FilterOperator.ANY, FilterOperator.ALL})
TEXTS = frozenset({FilterOperator.TEXT_MATCH, FilterOperator.TEXT_MATCH_INSENSITIVE})
ABSENT = frozenset({FilterOperator.NE, FilterOperator.NIN})  # true of a node that lacks the key, as in LlamaIndex
OF_DOCUMENT = ("ref_doc_id", "doc_id", "document_id")
_SCALARS = frozenset({*_ORDERS, FilterOperator.CONTAINS})
_KNOWN = {*_ORDERS, *LISTS, *TEXTS, *ABSENT, FilterOperator.EQ, FilterOperator.CONTAINS, FilterOperator.IS_EMPTY}
_INT64 = 2**63


def check_filters(filters: MetadataFilters) -> None:
    """Refuse what cannot be answered, whatever the nodes are.

    Raises:
        ConfigurationError: An operator or a condition that is not known, or a value that its operator cannot take.
    """
    if filters.condition is not None and filters.condition not in set(FilterCondition):
        raise ConfigurationError(
            "this condition of metadata filters is not supported",
            got=repr(filters.condition),
            expected=", ".join(condition.value for condition in FilterCondition),
        )
    for part in filters.filters:
        if isinstance(part, MetadataFilters):
            check_filters(part)
        else:
            _check(part)


def leaves(filters: MetadataFilters) -> Iterator[MetadataFilter]:
    """All single filters, nested ones included."""
    for part in filters.filters:
        if isinstance(part, MetadataFilters):
            yield from leaves(part)
        else:
            yield part


def number(value: Any) -> Any:
    """The value itself; an integer that does not fit 64 bits as the nearest float, which is how SQLite has it."""
    if isinstance(value, int) and not -_INT64 <= value < _INT64:
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return value


def matches(filters: MetadataFilters, metadata: Mapping[str, Any], ref_doc_id: str) -> bool:
    """Tell whether a node passes. Filters nest; values that cannot be compared (a text with a number) do not match.

    Args:
        filters: What is asked.
        metadata: The node's metadata.
        ref_doc_id: Its document, for filters on `ref_doc_id`, `doc_id` or `document_id`.

    Raises:
        ConfigurationError: A filter makes no sense.
    """
    check_filters(filters)
    return _passes(filters, metadata, ref_doc_id)


def _passes(filters: MetadataFilters, metadata: Mapping[str, Any], ref_doc_id: str) -> bool:
    results = [
        _passes(part, metadata, ref_doc_id) if isinstance(part, MetadataFilters) else _holds(part, metadata, ref_doc_id)
        for part in filters.filters
    ]
    if not results:
        return True
    if filters.condition == FilterCondition.OR:
        return any(results)
    if filters.condition == FilterCondition.NOT:
        return not any(results)
    return all(results)


def _holds(part: MetadataFilter, metadata: Mapping[str, Any], ref_doc_id: str) -> bool:
    have = metadata.get(part.key, ref_doc_id if part.key in OF_DOCUMENT else None)
    operator, want = part.operator, part.value
    if operator == FilterOperator.IS_EMPTY:
        return have is None or have == "" or have == []
    if have is None:
        return operator in ABSENT
    if operator in ABSENT:
        return not _equal(have, want) if operator == FilterOperator.NE else not _among(have, want)
    if operator == FilterOperator.EQ:
        return _equal(have, want)
    if operator == FilterOperator.IN:
        return _among(have, want)
    if operator == FilterOperator.ANY:
        return any(_contains(have, value) for value in _list(want))
    if operator == FilterOperator.ALL:
        return all(_contains(have, value) for value in _list(want))
    if operator == FilterOperator.CONTAINS:
        return _contains(have, want)
    if operator in TEXTS:
        return isinstance(have, str) and (
            str(want) in have if operator == FilterOperator.TEXT_MATCH else str(want).lower() in have.lower()
        )
    comparable = isinstance(have, str) if isinstance(want, str) else isinstance(have, int | float)
    return comparable and _ORDERS[operator](number(have), number(want))


def _equal(have: Any, want: Any) -> bool:
    if isinstance(want, list):
        return isinstance(have, list) and len(have) == len(want) and all(map(_equal, have, want))
    return bool(number(have) == number(want))


def _among(have: Any, want: Any) -> bool:
    return any(_equal(have, value) for value in _list(want))


def _contains(have: Any, value: Any) -> bool:
    """Whether a list has such an element, a dict such a key, a text such a part."""
    if isinstance(have, list):
        return any(_equal(element, value) for element in have)
    if isinstance(have, dict):
        return value in have
    return isinstance(have, str) and isinstance(value, str) and value in have


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check(part: MetadataFilter) -> None:
    if part.operator not in _KNOWN:
        raise ConfigurationError(
            "this operator of metadata filters is not supported",
            got=f"{getattr(part.operator, 'value', part.operator)!r} on {part.key!r:.80}",
            expected=", ".join(operator.value for operator in FilterOperator if operator in _KNOWN),
            next_step="use one of these, or filter the retrieved nodes with a postprocessor",
        )
    storable(part.key)
    values = part.value if isinstance(part.value, list) else [part.value]
    for value in values:
        if isinstance(value, str):
            storable(value)
    if part.operator == FilterOperator.IS_EMPTY:
        return
    if part.operator in LISTS and not isinstance(part.value, list):
        raise _senseless(part, "a list")
    if part.operator in TEXTS and not isinstance(part.value, str):
        raise _senseless(part, "a text")
    if part.value is None:
        raise _senseless(part, f"a value; {FilterOperator.IS_EMPTY.value!r} finds nodes that lack one")
    if part.operator in _SCALARS and isinstance(part.value, list):
        raise _senseless(part, "a text or a number")
    if any(isinstance(value, float) and math.isnan(value) for value in values):
        raise _senseless(part, "a number; NaN equals nothing")


def _senseless(part: MetadataFilter, expected: str) -> ConfigurationError:
    return ConfigurationError(
        f"the filter {part.operator.value!r} on {part.key!r:.80} makes no sense",
        got=f"{part.value!r:.80}",
        expected=expected,
    )
