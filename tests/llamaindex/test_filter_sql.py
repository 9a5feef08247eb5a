"""Metadata filters in SQL give the answers of the reference in Python, whatever the metadata."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from compllm_rag.catalog.database import make_tables
from compllm_rag.catalog.rows import write_rows
from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex import filter_sql
from compllm_rag.llamaindex.filter_sql import ids_passing
from compllm_rag.llamaindex.filters import matches
from compllm_rag.llamaindex.nodes import encode_node
from tests.catalog.catalog_samples import axis, node

KEYS = st.sampled_from(["k", "doc_id", "ref_doc_id", 'a"b', "a\\b", "nul\0", "é.$[0]", "", "K"])
TEXTS = st.text(st.sampled_from('aAbßİéÉ日😀"\\\0\n %_'), max_size=4) | st.text(max_size=3)
INTEGERS = st.integers(-3, 3) | st.sampled_from([2**53 + 1, 2**63 - 1, -(2**63), 2**63, 2**70, 10**400]) | st.integers()
FLOATS = st.sampled_from([0.0, -0.0, 1.0, 0.1, 1e308, 5e-324, 2.0**63]) | st.floats(
    allow_nan=False, allow_infinity=False
)
SCALARS = st.none() | st.booleans() | INTEGERS.filter(lambda i: abs(i) < 10**300) | FLOATS | TEXTS
VALUES = (
    SCALARS
    | st.lists(SCALARS | st.lists(SCALARS, max_size=1), max_size=3)
    | st.dictionaries(TEXTS, SCALARS, max_size=2)
)
METADATA = st.dictionaries(KEYS, VALUES, max_size=3)


def filters_of(operator: FilterOperator) -> st.SearchStrategy[MetadataFilter]:
    one = INTEGERS | FLOATS | st.just(float("inf")) | TEXTS
    many = st.lists(INTEGERS, max_size=3) | st.lists(FLOATS, max_size=3) | st.lists(TEXTS, max_size=3)
    if operator in (FilterOperator.TEXT_MATCH, FilterOperator.TEXT_MATCH_INSENSITIVE):
        value: st.SearchStrategy[Any] = TEXTS
    elif operator in (FilterOperator.IN, FilterOperator.NIN, FilterOperator.ANY, FilterOperator.ALL):
        value = many
    elif operator in (FilterOperator.EQ, FilterOperator.NE):
        value = one | many
    else:
        value = st.none() if operator == FilterOperator.IS_EMPTY else one
    return st.builds(MetadataFilter, key=KEYS, value=value, operator=st.just(operator))


SINGLE = st.sampled_from(list(FilterOperator)).flatmap(filters_of)
CONDITIONS = st.sampled_from([*FilterCondition, None])
FILTERS = st.recursive(
    SINGLE,
    lambda inner: st.builds(MetadataFilters, filters=st.lists(inner, max_size=3), condition=CONDITIONS),
    max_leaves=5,
).map(lambda found: found if isinstance(found, MetadataFilters) else MetadataFilters(filters=[found]))


def passing(metadata: list[dict[str, Any]], filters: MetadataFilters) -> tuple[list[int], list[int]]:
    """Places of the nodes that pass, by SQL and by the reference."""
    connection = sqlite3.connect(":memory:")
    try:
        make_tables(connection, 4)
        nodes = [node(f"n{i}", axis(0), doc=f"d{i % 2}") for i in range(len(metadata))]
        for made, held in zip(nodes, metadata, strict=True):
            made.metadata = held
        rows = [encode_node(made) for made in nodes]
        write_rows(connection, rows)
        found = ids_passing(connection, filters)
    finally:
        connection.close()
    expected = [i for i, held in enumerate(metadata) if matches(filters, held, f"d{i % 2}")]
    return [id_ - 1 for id_ in found], expected


@settings(max_examples=400, deadline=None)
@given(st.lists(METADATA, min_size=1, max_size=4), FILTERS)
def test_sql_answers_like_the_reference(metadata: list[dict[str, Any]], filters: MetadataFilters) -> None:
    found, expected = passing(metadata, filters)
    assert found == expected


@settings(max_examples=600, deadline=None)
@given(VALUES, SINGLE)
def test_sql_answers_like_the_reference_where_the_key_is_there(value: Any, single: MetadataFilter) -> None:
    found, expected = passing([{single.key: value}], MetadataFilters(filters=[single]))
    assert found == expected


def test_plain_filters_never_leave_sqlite(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> bool:
        raise AssertionError("a row was read in Python")

    monkeypatch.setattr(filter_sql, "matches", refuse)
    connection = sqlite3.connect(":memory:")
    make_tables(connection, 4)
    write_rows(connection, [encode_node(node(f"n{i}", axis(0), year=i, tags=["x", f"t{i}"])) for i in range(9)])
    for single, expected in (
        (MetadataFilter(key="year", value=3, operator=FilterOperator.GTE), 6),
        (MetadataFilter(key="year", value=[1, 2], operator=FilterOperator.IN), 2),
        (MetadataFilter(key="tags", value=["t1", "t5"], operator=FilterOperator.ANY), 2),
        (MetadataFilter(key="tags", value="x", operator=FilterOperator.CONTAINS), 9),
    ):
        assert len(ids_passing(connection, MetadataFilters(filters=[single]))) == expected


def test_values_are_bound() -> None:
    attack = MetadataFilter(key="k') OR 1 --", value="' OR 1 --")
    assert passing([{"k": 1}, {}], MetadataFilters(filters=[attack])) == ([], [])


def test_an_operator_of_another_release_is_refused_by_name() -> None:
    strange = MetadataFilter.model_construct(key="place", value=1, operator="near")
    nested = MetadataFilters(filters=[MetadataFilters(filters=[])])
    nested.filters[0].filters.append(strange)
    with pytest.raises(ConfigurationError, match="'near' on 'place'.*expected.*text_match"):
        passing([{}], nested)


@pytest.mark.parametrize(
    ("value", "operator"),
    [
        (None, FilterOperator.EQ),
        ([1], FilterOperator.GT),
        ([1], FilterOperator.CONTAINS),
        (float("nan"), FilterOperator.NE),
        ("half \ud800", FilterOperator.EQ),
    ],
)
def test_values_without_an_answer_are_refused(value: Any, operator: FilterOperator) -> None:
    single = MetadataFilter.model_construct(key="k", value=value, operator=operator)
    asked = MetadataFilters(filters=[])
    asked.filters.append(single)
    with pytest.raises(ConfigurationError):
        passing([{"k": 1}], asked)
