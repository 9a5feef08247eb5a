"""What LlamaIndex calls the settings of decoding, as a `GenerationConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from compllm_rag.config import GenerationConfig
from compllm_rag.errors import ConfigurationError

_OTHER_NAMES = {"max_tokens": "max_new_tokens"}


def generation_of(base: GenerationConfig, given: Mapping[str, Any]) -> GenerationConfig:
    """Settings with some of them set anew.

    Args:
        base: What holds where nothing is given.
        given: By their names in `GenerationConfig` or in LlamaIndex: `max_tokens`, `temperature`, `top_p`, `stop` (a
            text or several), ...; None leaves one as it is.

    Raises:
        ConfigurationError: There is no such setting, or a value is out of bounds.
    """
    known = {*GenerationConfig.model_fields, *_OTHER_NAMES}
    if unknown := sorted(set(given) - known):
        raise ConfigurationError(
            "this LLM has no such option",
            got=", ".join(unknown),
            expected=", ".join(sorted(known)),
            next_step="leave it out",
        )
    fields = {_OTHER_NAMES.get(name, name): value for name, value in given.items() if value is not None}
    if isinstance(fields.get("stop"), str):
        fields["stop"] = (fields["stop"],)
    try:
        return GenerationConfig(**{**base.model_dump(exclude_unset=True), **fields})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigurationError(
            f"{name or 'a setting of decoding'} makes no sense",
            got=", ".join(f"{name}={value!r}" for name, value in given.items()),
            expected=str(first["msg"]).removeprefix("Input should be ").removeprefix("Value error, "),
            next_step="change it, or leave it out",
        ) from error
