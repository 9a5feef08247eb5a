"""OpenAI's chat completions and models, as far as they are heeded here; anything else is refused by name.

Fields that ask for nothing (`n=1`, `presence_penalty=0`, ...) are taken, since many clients always send them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator

from compllm_rag.server.answer_schemas import Citation
from compllm_rag.server.reading import ReadAccount, ReadAsked
from compllm_rag.server.schemas import Body

MODELS = {"compllm-rag": "concepts", "compllm-rag-text": "text"}
"""Model ids, and how each reads the passages."""

# What the value of a field must be, so that it asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "logprobs": (False,), "logit_bias": ({},),
    "response_format": ({"type": "text"},), "store": (False,), "tools": ([],), "tool_choice": ("none",),
    "top_logprobs": (0,), "modalities": (["text"],), "functions": ([],), "service_tier": ("auto", "default"),
}  # fmt: skip


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class InMessage(Body):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=100_000)] | Annotated[list[TextPart], Field(max_length=100)]
    name: None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Body):
    """What a stream ends with."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class CompletionRequest(Body):
    """`POST /v1/chat/completions`."""

    model: str
    messages: Annotated[list[InMessage], Field(min_length=1, max_length=200)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    reading: ReadAsked | None = Field(default=None, description="None of OpenAI's: see `POST /v1/query`")

    @field_validator("messages")
    @classmethod
    def _ends_with_a_question(cls, messages: list[InMessage]) -> list[InMessage]:
        if messages[-1].role != "user" or not messages[-1].text.strip():
            raise ValueError("the last message must be one of role user, with text")
        return messages


class OutMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The one answer."""

    index: Literal[0] = 0
    message: OutMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class CachedTokens(BaseModel):
    """Positions of the prompt whose KV cache was there."""

    cached_tokens: int


class Usage(BaseModel):
    """What it took. `prompt_tokens` are positions that the LLM read: a concept counts as one."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Sources(BaseModel):
    """Beside OpenAI's own fields: what the answer was read from."""

    citations: list[Citation]
    prefill_cost: float | None
    kv_bytes: int
    ttft_s: float
    reading: ReadAccount | None = None


class Completion(BaseModel):
    """The response where nothing is streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    compllm: Sources


class Delta(BaseModel):
    """A piece of the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The one answer, in part."""

    index: Literal[0] = 0
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: None = None


class CompletionChunk(BaseModel):
    """One line of a stream; `[DONE]` ends it."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    compllm: Sources | None = None


class Model(BaseModel):
    """One model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "compllm-rag"


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]
