"""Answers as objects of a pydantic model: its schema for decoding, and the text turned back into an object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NoReturn, TypeVar

from llama_index.core.llms import ChatMessage
from llama_index.core.output_parsers import PydanticOutputParser
from pydantic import BaseModel, ValidationError

from compllm_rag.errors import ConfigurationError, StructuredAnswerError
from compllm_rag.llamaindex.templates import text_of

Model = TypeVar("Model", bound=BaseModel)


def schema_of(output_cls: type[BaseModel]) -> str:
    """JSON schema of a model, as text.

    Raises:
        ConfigurationError: It is no pydantic model.
    """
    if not (isinstance(output_cls, type) and issubclass(output_cls, BaseModel)):
        raise ConfigurationError(
            "output_cls is no pydantic model",
            got=repr(output_cls),
            expected="a subclass of pydantic.BaseModel",
            next_step="pass the class itself, not an object of it",
        )
    return json.dumps(output_cls.model_json_schema(), ensure_ascii=False)


def instructions_for(output_cls: type[BaseModel]) -> str:
    """What the LLM is told of the form of its answer, in the words of LlamaIndex.

    Raises:
        ConfigurationError: See `schema_of`.
    """
    schema_of(output_cls)
    return "\n\n" + PydanticOutputParser(output_cls).get_format_string(escape_json=False)


def with_instructions(messages: Sequence[ChatMessage], output_cls: type[BaseModel]) -> list[ChatMessage]:
    """Messages, the last with the form of the answer behind it."""
    *before, last = messages
    return [*before, ChatMessage(role=last.role, content=text_of(last) + instructions_for(output_cls))]


def parsed(output_cls: type[Model], text: str, *, finish_reason: str, limit: int) -> Model:
    """The object that an answer spells.

    Args:
        output_cls: Its model.
        text: The answer.
        finish_reason: Why it ended.
        limit: Most tokens it could have.

    Raises:
        StructuredAnswerError: The answer was cut off by the limit, is no JSON, or breaks a rule of the model that no
            schema can tell.
    """
    try:
        # Grammars let control characters into strings, which strict JSON escapes.
        return output_cls.model_validate_json(json.dumps(json.loads(text, strict=False)))
    except ValueError as error:  # of JSON, and pydantic's ValidationError
        if finish_reason == "length":
            raise StructuredAnswerError(
                f"the answer was cut off before it was a whole {output_cls.__name__}",
                got=f"{limit} tokens, ending in {text[-40:]!r}",
                expected="an answer that ends by itself",
                next_step="raise max_new_tokens, or give texts and lists of the model a max_length",
            ) from error
        first = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error)
        raise StructuredAnswerError(
            f"the answer is no {output_cls.__name__}",
            got=f"{text[:80]!r} ({first})",
            expected="JSON that the model takes",
            next_step="ask again, or state the rule in the model's schema",
        ) from error


def refuse_stream() -> NoReturn:
    """Say that there are no streams of objects."""
    raise ConfigurationError(
        "structured answers are not streamed",
        got="output_cls with streaming",
        expected="one or the other",
        next_step="leave streaming out: the object is there once the answer is whole",
    )
