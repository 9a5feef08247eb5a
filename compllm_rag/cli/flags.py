"""Flags of a command, made from the settings models that it takes: names, types, defaults, bounds and help stand there.

A field `validate_every: int = Field(default=50, ge=1, description="...")` becomes `--validate-every INTEGER`, a field
that is a settings model itself gives one flag for each of its own fields.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from compllm_rag.config import Frozen, checked


def flagged(
    *, names: Mapping[str, str] | None = None, unasked: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace each parameter of a command that is a settings model by one option for each field.

    The parameter's own default, if it has one, says what the defaults of its options are.

    Args:
        names: Flags that are not called as their field is, by field.
        unasked: Fields without a flag; they keep their default.
    """
    named = dict(names or {})

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        defaults: dict[str, Frozen] = {}
        parameters: list[inspect.Parameter] = []
        for name, given in signature.parameters.items():
            if not (isinstance(given.annotation, type) and issubclass(given.annotation, Frozen)):
                parameters.append(given.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            defaults[name] = given.annotation() if given.default is given.empty else given.default
            for field, info, value in fields_of(defaults[name], unasked):
                parameters.append(_option(named.get(field, field), info, value))

        @functools.wraps(command)
        def run(**values: Any) -> None:
            typed = {field: values.pop(flag) for field in flags for flag in [named.get(field, field)]}
            command(**values, **{name: _filled(default, typed) for name, default in defaults.items()})

        flags = [field for default in defaults.values() for field, _, _ in fields_of(default, unasked)]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def fields_of(default: Frozen, unasked: Collection[str] = ()) -> Iterator[tuple[str, FieldInfo, Any]]:
    """Name, definition and value of every field, those of settings within settings in their place."""
    for name, info in type(default).model_fields.items():
        value = getattr(default, name)
        if isinstance(value, Frozen):
            yield from fields_of(value, unasked)
        elif name not in unasked:
            yield name, info, value


def _option(name: str, info: FieldInfo, default: Any) -> inspect.Parameter:
    kind, choices = _plain(info.annotation), get_args(info.annotation)
    bounds = {key: getattr(rule, key) for rule in info.metadata for key in ("ge", "le") if hasattr(rule, key)}
    text, none = info.description or "", _none(info, default)
    if none is not None:
        text, bounds = text.replace("None", str(none)), bounds | ({"ge": none} if none == 0 else {})
    option = typer.Option(
        *([f"--{name[:-1]}"] if name.endswith("_") else []),  # a word that Python keeps for itself: `from_`
        help=f"{text[:1].upper()}{text[1:]}.",
        metavar="|".join(choices) if get_origin(info.annotation) is Literal else None,
        min=bounds.get("ge"),
        max=bounds.get("le"),
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=list(default) if isinstance(default, tuple) else default,
        annotation=Annotated[kind, option],
    )


def _plain(annotation: Any) -> Any:
    """The type that the command line reads a field as; what else pydantic demands, it checks afterwards."""
    if get_origin(annotation) is Literal:
        return str
    if get_origin(annotation) is tuple:
        return list[get_args(annotation)[0]]  # type: ignore[misc]
    choices = get_args(annotation)
    return (choices[0] | None) if NoneType in choices else annotation


def _none(info: FieldInfo, default: Any) -> str | int | None:
    """How None is written where leaving the flag out means something else: `none`, or 0 for a number."""
    if default is None or NoneType not in get_args(info.annotation):
        return None
    return "none" if isinstance(default, str | Path) else 0


def _filled(default: Frozen, typed: Mapping[str, Any]) -> Frozen:
    """Settings with what was typed.

    Raises:
        ConfigurationError: A value is out of bounds.
    """
    fields = {}
    for name, info in type(default).model_fields.items():
        value = getattr(default, name)
        if isinstance(value, Frozen):
            value = _filled(value, typed)
        elif name in typed:
            none = _none(info, value)
            value = None if none is not None and typed[name] == none else typed[name]
        fields[name] = value
    return checked(type(default), **fields)
