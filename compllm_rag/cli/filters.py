"""`--filter KEY=VALUE`: conditions on metadata, as a user types them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compllm_rag.errors import ConfigurationError

if TYPE_CHECKING:
    from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters

Filters = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="KEY=VALUE",
        help="Only chunks whose metadata says so; also !=, >, >=, <, <=, and ~ for a part of a text. May be repeated.",
    ),
]
_FORM = re.compile(r"(?P<key>[^=!<>~]+)(?P<sign>!=|>=|<=|=|>|<|~)(?P<value>.*)", re.S)
_WORDS = {"true": 1, "false": 0}  # which compare equal to JSON's own


def parse_filters(asked: Sequence[str] | None) -> MetadataFilters | None:
    """Conditions that all have to hold; None where there are none.

    A value that looks like a number finds numbers and texts of that form; in double quotes it is a text only.

    Raises:
        ConfigurationError: One is not of the form KEY=VALUE, or asks for more or less than something that is no number.
    """
    from llama_index.core.vector_stores.types import MetadataFilters

    return MetadataFilters(filters=[_condition(text) for text in asked]) if asked else None


def _condition(text: str) -> MetadataFilter | MetadataFilters:
    from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

    form = _FORM.fullmatch(text)
    if form is None or not form["key"].strip():
        raise ConfigurationError(
            "--filter cannot be read",
            got=ascii(text),
            expected="KEY=VALUE, or one of != > >= < <= ~ in place of =",
            next_step="quote it for the shell, as in --filter 'year>=1871'",
        )
    key, sign, value = form["key"].strip(), form["sign"], form["value"].strip()
    number = _number(value)
    if sign == "~":
        return MetadataFilter(key=key, value=_text(value), operator=FilterOperator.TEXT_MATCH_INSENSITIVE)
    if sign in (">", ">=", "<", "<="):
        # Texts are compared as texts: dates as ISO 8601 has them stand in their order.
        wanted = _text(value) if number is None else number
        return MetadataFilter(key=key, value=wanted, operator=FilterOperator(sign))
    operator = FilterOperator.NE if sign == "!=" else FilterOperator.EQ
    values: list[Any] = [_text(value)] if number is None else [number, value]
    return MetadataFilters(
        filters=[MetadataFilter(key=key, value=each, operator=operator) for each in values],
        condition=FilterCondition.AND if sign == "!=" else FilterCondition.OR,
    )


def _number(value: str) -> int | float | None:
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    try:
        found = json.loads(value)
    except ValueError:
        return None
    return found if isinstance(found, int | float) and found == found and abs(found) != float("inf") else None


def _text(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            pass
    return value
