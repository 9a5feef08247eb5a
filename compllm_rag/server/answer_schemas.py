"""What goes over the wire for questions, chats and their answers: requests, events, and the answer as a whole."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from compllm_rag.config import Mode
from compllm_rag.server.reading import ReadAccount, ReadAsked
from compllm_rag.server.schemas import Body, Words

Retrieval = Literal["vector", "bm25", "hybrid"]


class Decoding(Body):
    """How an answer is decoded; what is left out takes the server's default (greedy)."""

    max_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None


class QueryRequest(Decoding):
    """`POST /v1/query`."""

    query: Words
    mode: Mode = "concepts"
    top_k: Annotated[int, Field(ge=1, le=32)] = 4
    retrieval: Retrieval = "vector"
    reading: ReadAsked | None = None
    stream: bool = False


class ChatRequest(Decoding):
    """`POST /v1/chat`."""

    message: Words
    session_id: Annotated[str, Field(max_length=64)] | None = Field(default=None, description="None begins a new one")
    mode: Mode = "concepts"
    top_k: Annotated[int, Field(ge=1, le=32)] = 4
    reading: ReadAsked | None = None
    stream: bool = False


class FoundNode(BaseModel):
    """A passage that was retrieved; `number` is its marker in the prompt, `[1]` the best."""

    number: int
    node_id: str
    document_id: str
    title: str
    score: float | None
    text: str


class Retrieved(BaseModel):
    """Event `retrieved`."""

    nodes: list[FoundNode]
    retrieval_s: float


class PlannedNode(BaseModel):
    """How one passage stands in the prompt.

    Attributes:
        mode: Read as `concepts` or as `text`; text in a request for concepts where they are not made yet.
        positions: It takes in the prompt.
        prefill_cost: Of reading it, as a share of what reading it as text would take.
        kv_bytes: Of its part of the KV cache.
        why: Why it is read like that, where something was decided; null else.
        parts: Where a read policy decided: what each run of its tokens is read as, with `used`, `start`, `end`,
            `rate`, `why` and `kept`; null else.
        guard: Where it was left as text when it was ingested: `by` which guard, what was `expected` of it, and the
            `limit`; null else.
    """

    node_id: str
    mode: str
    n_tokens: int
    n_concepts: int
    positions: int
    prefill_cost: float
    kv_bytes: int
    why: str | None = None
    parts: list[dict[str, Any]] | None = None
    guard: dict[str, Any] | None = None


class Plan(BaseModel):
    """Event `plan`: what the LLM is about to read, beside the same prompt as text.

    Attributes:
        positions: Of the whole prompt.
        prefill_cost: Positions times the layers they pass, as a share of the same for the prompt as text.
        kv_bytes: Of the KV cache behind the prompt.
        dropped: Nodes that did not fit the LLM's window.
        reading: How passages are read, where the server or the request said how; null else.
    """

    mode: Mode
    nodes: list[PlannedNode]
    positions: int
    prefill_cost: float
    kv_bytes: int
    text_positions: int
    text_kv_bytes: int
    dropped: list[str]
    reading: ReadAccount | None = None


class Token(BaseModel):
    """Event `token`: a piece of the answer; joined they are the answer."""

    text: str


class Citation(BaseModel):
    """A passage that the answer was read from."""

    number: int
    node_id: str
    document_id: str
    title: str
    score: float | None
    mode: str
    n_tokens: int
    n_concepts: int


class Timings(BaseModel):
    """Where the time went, in seconds; `queue_s` is the wait for a free place, and no part of `ttft_s`."""

    queue_s: float
    retrieval_s: float
    fetch_s: float
    layout_s: float
    prefill_s: float
    decode_s: float
    total_s: float


class Answer(BaseModel):
    """Event `done`, and the whole response where nothing is streamed.

    Attributes:
        answer: All of it.
        mode: As asked for.
        citations: The passages that it was read from.
        finish_reason: `stop`, or `length`: cut off by `max_tokens`.
        positions: Of the prompt.
        new_tokens: Of the answer.
        reused_positions: Of the prompt, those whose KV cache was there from the request before.
        prefill_cost: See `Plan`; null where nothing was read.
        kv_bytes: See `Plan`.
        reading: See `Plan`.
        ttft_s: From retrieved passages in hand to the first token.
        session_id: Of a chat; null else.
        question: Of a chat: what was looked for; null else.
        turns: Of a chat: how many earlier turns stood in the prompt.
        turns_dropped: Of a chat: how many did not fit.
    """

    answer: str
    mode: Mode
    citations: list[Citation]
    finish_reason: str
    positions: int
    new_tokens: int
    reused_positions: int
    prefill_cost: float | None
    kv_bytes: int
    reading: ReadAccount | None = None
    ttft_s: float
    timings: Timings
    session_id: str | None = None
    question: str | None = None
    turns: int = 0
    turns_dropped: int = 0
