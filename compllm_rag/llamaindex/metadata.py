"""Metadata that comes back as it went in: what JSON can say, and nothing turned into something else without a word.

| given | kept |
|---|---|
| texts, finite numbers, true, false, None, lists and dicts of these | as they are; half characters as U+FFFD |
| numpy numbers, times and texts | plain ones |
| dates and times, paths, UUIDs, members of an `Enum` | ISO 8601, the path, the digits, the value |
| tuples, sets of texts or of numbers | lists; those of sets in order |
| NaN, infinity, bytes, arrays, tensors, anything else, what holds itself | refused, naming document and key |
"""

from __future__ import annotations

import datetime
import math
import uuid
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np

from compllm_rag.errors import ConfigurationError
from compllm_rag.unicode_text import whole

_DEPTH = 64  # levels of lists and dicts
_EXPECTED = "what JSON can say: texts, finite numbers, lists and dicts; dates and paths are written out"


class _Unkept(Exception):
    """A value that cannot be kept.

    Args:
        path: The keys that lead to it.
        got: What it is.
    """

    def __init__(self, path: str, got: str) -> None:
        self.path, self.got = path, got
        super().__init__(path, got)


def plain_metadata(metadata: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Metadata in plain values; the same object where all of it is plain already.

    Args:
        metadata: Of a document or node.
        owner: Whose, in words, for messages.

    Raises:
        ConfigurationError: A value cannot be kept; the message names the owner and the key.
    """
    try:
        made = _mapping(metadata, "", 0)
    except _Unkept as unkept:
        raise ConfigurationError(
            f"metadata of {owner} cannot be kept",
            got=f"{unkept.got} under {unkept.path!a:.200}",
            expected=_EXPECTED,
            next_step="drop or convert it before the document is brought in; vectors do not belong there",
        ) from None
    return metadata if isinstance(metadata, dict) and _same(metadata, made) else made


def _plain(value: Any, path: str, depth: int) -> Any:
    if value is None or type(value) in (bool, int):
        return value
    if isinstance(value, Enum):
        return _plain(value.value, path, depth)
    if isinstance(value, str):
        return whole(str(value))
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, float) and not isinstance(value, np.generic):
        return _finite(float(value), path)
    if isinstance(value, np.generic):
        return _of_numpy(value, path, depth)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return _date(value, path)
    if isinstance(value, PurePath | uuid.UUID):
        return whole(str(value))
    return _several(value, path, depth)


def _several(value: Any, path: str, depth: int) -> Any:
    if depth > _DEPTH:
        raise _Unkept(path, f"more than {_DEPTH} levels of lists and dicts, or one that holds itself")
    if isinstance(value, Mapping):
        return _mapping(value, path, depth)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        items = [_plain(item, path, depth + 1) for item in value]
        if {type(item) for item in items} in ({str}, {int}, {float}, {int, float}, set()):
            return sorted(items)
        raise _Unkept(path, "a set of values that have no order")
    raise _Unkept(path, f"a value of type {type(value).__name__}")


def _mapping(value: Mapping[Any, Any], path: str, depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, item in value.items():
        if not isinstance(key, str | int) or isinstance(key, bool):
            raise _Unkept(path or repr(key), f"a key of type {type(key).__name__}")
        name = whole(str(key))
        if name in made:
            raise _Unkept(f"{path}.{name}".lstrip("."), "two keys that are written alike")
        made[name] = _plain(item, f"{path}.{name}".lstrip("."), depth + 1)
    return made


def _of_numpy(value: np.generic, path: str, depth: int) -> Any:
    if isinstance(value, np.datetime64):
        if np.isnat(value):
            raise _Unkept(path, "a time that is none (NaT)")
        return str(np.datetime_as_string(value))
    if isinstance(value, np.bool_ | np.integer | np.floating | np.str_):
        plain = value.item()
        if isinstance(plain, np.generic):  # longdouble has more digits than a float
            raise _Unkept(path, f"a number of type {type(value).__name__}")
        return _plain(plain, path, depth)
    raise _Unkept(path, f"a value of type {type(value).__name__}")


def _finite(value: float, path: str) -> float:
    if not math.isfinite(value):
        raise _Unkept(path, f"{value}, which is no number")
    return value


def _date(value: datetime.date | datetime.time, path: str) -> str:
    text = str(value.isoformat())
    if text == "NaT":  # pandas' own is a datetime, too
        raise _Unkept(path, "a time that is none (NaT)")
    return text


def _same(given: Any, made: Any) -> bool:
    """Whether nothing had to be changed, down to the types."""
    if type(given) is not type(made):
        return False
    if isinstance(given, dict):
        return list(given) == list(made) and all(_same(given[key], made[key]) for key in made)
    if isinstance(given, list):
        return all(_same(a, b) for a, b in zip(given, made, strict=True))
    return bool(given == made)
