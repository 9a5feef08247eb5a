"""LlamaIndex metadata filters, evaluated on one node's metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from compllm_rag.errors import ConfigurationError

_TESTS: dict[FilterOperator, Callable[[Any, Any], bool]] = {
    FilterOperator.EQ: lambda have, want: bool(have == want),
    FilterOperator.NE: lambda have, want: bool(have != want),
    FilterOperator.GT: lambda have, want: bool(have > want),
    FilterOperator.GTE: lambda have, want: bool(have >= want),
    FilterOperator.LT: lambda have, want: bool(have < want),
    FilterOperator.LTE: lambda have, want: bool(have <= want),
    FilterOperator.IN: lambda have, want: have in want,
    FilterOperator.NIN: lambda have, want: have not in want,
    FilterOperator.ANY: lambda have, want: any(value in have for value in want),
    FilterOperator.ALL: lambda have, want: all(value in have for value in want),
    FilterOperator.CONTAINS: lambda have, want: want in have,
    FilterOperator.TEXT_MATCH: lambda have, want: want in have,
    FilterOperator.TEXT_MATCH_INSENSITIVE: lambda have, want: want.lower() in have.lower(),
}
_LISTS = {FilterOperator.IN, FilterOperator.NIN, FilterOperator.ANY, FilterOperator.ALL}
_TEXTS = {FilterOperator.TEXT_MATCH, FilterOperator.TEXT_MATCH_INSENSITIVE}
_ABSENT = {FilterOperator.NE, FilterOperator.NIN}  # true of a node that lacks the key, as in LlamaIndex
_OF_DOCUMENT = ("ref_doc_id", "doc_id", "document_id")


def matches(filters: MetadataFilters, metadata: Mapping[str, Any], ref_doc_id: str) -> bool:
    """Tell whether a node passes. Filters nest; values that cannot be compared (a text with a number) do not match.

    Args:
        filters: What is asked.
        metadata: The node's metadata.
        ref_doc_id: Its document, for filters on `ref_doc_id`, `doc_id` or `document_id`.

    Raises:
        ConfigurationError: A filter makes no sense.
    """
    results = [
        matches(part, metadata, ref_doc_id) if isinstance(part, MetadataFilters) else _holds(part, metadata, ref_doc_id)
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
    have = metadata.get(part.key, ref_doc_id if part.key in _OF_DOCUMENT else None)
    if part.operator == FilterOperator.IS_EMPTY:
        return have is None or have == "" or have == []
    if part.operator in _LISTS and not isinstance(part.value, list):
        raise _senseless(part, "a list")
    if part.operator in _TEXTS and not isinstance(part.value, str):
        raise _senseless(part, "a text")
    if have is None:
        return part.operator in _ABSENT
    if part.operator in _TEXTS and not isinstance(have, str):
        return False
    try:
        return _TESTS[part.operator](have, part.value)
    except TypeError:
        return False


def _senseless(part: MetadataFilter, expected: str) -> ConfigurationError:
    return ConfigurationError(
        f"the filter {part.operator.value!r} on {part.key!r} makes no sense", got=repr(part.value), expected=expected
    )
