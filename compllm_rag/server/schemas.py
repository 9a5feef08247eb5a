"""What goes over the wire: bodies of requests, of responses and of events, for every route but OpenAI's.

Unknown fields of a request are refused, never ignored; so nobody can hand in embeddings or concepts. Times are in
seconds, sizes in bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Words = Annotated[str, Field(min_length=1, max_length=8_000)]


class Body(BaseModel):
    """Base of what clients send: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class Deleted(BaseModel):
    """A document or a session that is gone."""

    id: str
    deleted: Literal[True] = True


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's shape for every route.

    Attributes:
        message: In words, with the next step.
        type: `invalid_request_error`, `authentication_error`, `permission_error`, `not_found_error`,
            `rate_limit_error`, `overloaded_error`, `server_error`.
        code: For programs.
        param: The field of the request that is meant, if one is.
    """

    message: str
    type: str
    code: str
    param: str | None = None


class ErrorBody(BaseModel):
    """Body of every response that is an error, and event `error`."""

    error: ErrorDetail


class Health(BaseModel):
    """`GET /health` and `GET /ready`."""

    status: Literal["ok", "shutting_down"]


class Info(BaseModel):
    """`GET /v1/info`: what answers, for a page that shows it.

    Attributes:
        namespace: Whose documents these are.
        may_write: Whether this key may change documents.
        llm: Name of the LLM.
        embedder: Name of the embedder.
        kind: Of concepts: `deep` or `input`.
        rate: Asked for at ingestion: tokens per concept, or the name of what chooses them.
        entry_layer: See `Kept`.
        depth: Layers of the LLM.
        reading: How passages are read in all answers, where the server was told: options of `serve`.
        file_types: Endings of files that can be uploaded here.
        limits: `upload_bytes`, `request_bytes`, `max_tokens`.
    """

    version: str
    namespace: str
    may_write: bool
    llm: str
    embedder: str
    kind: Literal["deep", "input"]
    rate: float | str
    entry_layer: int
    depth: int
    reading: dict[str, Any]
    documents: int
    chunks: int
    file_types: list[str]
    limits: dict[str, int]
