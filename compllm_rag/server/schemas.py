"""What goes over the wire: bodies of requests, of responses and of events, for every route but OpenAI's.

Unknown fields of a request are refused, never ignored; so nobody can hand in embeddings or concepts. Times are in
seconds, sizes in bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compllm_rag.config import Mode
from compllm_rag.server.reading import ReadAccount, ReadAsked

MOST_TEXT = 8_000_000
Words = Annotated[str, Field(min_length=1, max_length=8_000)]
DocumentId = Annotated[str, Field(min_length=1, max_length=500)]
Retrieval = Literal["vector", "bm25", "hybrid"]
State = Literal["ready", "waiting", "failed"]


class Body(BaseModel):
    """Base of what clients send: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


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


class NewDocument(Body):
    """A document to bring in."""

    id: DocumentId | None = Field(default=None, description="None makes one of the text's digest")
    text: Annotated[str, Field(min_length=1, max_length=MOST_TEXT)]
    title: Annotated[str, Field(max_length=500)] = ""
    metadata: dict[str, str | int | float | bool | None] = Field(default_factory=dict, max_length=50)


class NewDocuments(Body):
    """`POST /v1/documents` as JSON."""

    documents: Annotated[list[NewDocument], Field(min_length=1, max_length=1000)]


class Replacement(Body):
    """`PUT /v1/documents/{document_id}`."""

    text: Annotated[str, Field(min_length=1, max_length=MOST_TEXT)]
    title: Annotated[str, Field(max_length=500)] = ""
    metadata: dict[str, str | int | float | bool | None] = Field(default_factory=dict, max_length=50)


class Skipped(BaseModel):
    """A file, or a line of one, that gave no document."""

    name: str
    reason: str


class UploadAccepted(BaseModel):
    """What an upload brought in (202). All of it is searchable now, and survives whatever happens to the server.

    Attributes:
        job_id: For `GET /v1/jobs/{job_id}`.
        documents: Ids of the documents that were met.
        changed: How many of them were new or differed.
        chunks: Chunks of those.
        chunks_added: Chunks that were not there before; only they are embedded.
        chunks_waiting: Chunks that are read as text until their concepts are made, those of earlier uploads included.
        removed: Ids of pages that a file, uploaded before, has no longer; they are deleted.
        skipped: What gave no document.
    """

    job_id: str
    documents: list[str]
    changed: int
    chunks: int
    chunks_added: int
    chunks_waiting: int
    removed: list[str] = []
    skipped: list[Skipped] = []


class Job(BaseModel):
    """`GET /v1/jobs/{job_id}`: how far the concepts of one upload are."""

    job_id: str
    state: State
    documents: list[str]
    chunks: int
    chunks_waiting: int
    chunks_failed: int


class QueueStatus(BaseModel):
    """`GET /v1/queue`: what waits for its concepts, and for an answer.

    Attributes:
        documents_waiting: Documents that wait for concepts, wholly or in part.
        chunks_waiting: Chunks of those.
        chunks_done: Chunks that got their concepts since the server started.
        chunks_failed: Chunks that could not be compressed, and stay text until the next start.
        held_up: Why no concepts are made just now, as a code of errors; null while nothing is in the way.
        generations_running: Answers that are being made now, of all namespaces.
        generations_waiting: Answers that wait for their turn, of all namespaces.
        generations_limit: Most that may wait.
    """

    documents_waiting: int
    chunks_waiting: int
    chunks_done: int
    chunks_failed: int
    held_up: str | None = None
    generations_running: int
    generations_waiting: int
    generations_limit: int


class DocumentSummary(BaseModel):
    """One line of a list of documents."""

    id: str
    title: str
    state: State
    chunks: int
    chunks_waiting: int


class DocumentList(BaseModel):
    """`GET /v1/documents`, in order of id."""

    documents: list[DocumentSummary]
    next_after: str | None = Field(description="pass it as `after` to get the next ones; null: there are no more")
    total: int


class Chunk(BaseModel):
    """A chunk of a document; `text` where it was asked for."""

    node_id: str
    state: State
    n_tokens: int
    n_concepts: int
    text: str | None = None


class DocumentDetail(DocumentSummary):
    """`GET /v1/documents/{document_id}`."""

    metadata: dict[str, Any]
    nodes: list[Chunk]


class Deleted(BaseModel):
    """A document or a session that is gone."""

    id: str
    deleted: Literal[True] = True


class KeptToken(BaseModel):
    """A piece of a passage; joined they are its text.

    Attributes:
        text: What it says; several tokens of one character give their text to the first.
        kept: Whether a concept stands for this position.
    """

    text: str
    kept: bool


class Kept(BaseModel):
    """`GET /v1/nodes/{node_id}/kept`: which of a passage's tokens its concepts stand for.

    Attributes:
        kind: `deep` (states in front of a middle layer) or `input` (concepts that start from these tokens).
        state: `waiting`: the concepts are still to be made, the passage is read as text meanwhile.
        rate: Achieved: tokens per concept.
        entry_layer: The layer at which concepts enter; 0: the input embeddings.
        prefill_cost: Of a token of the passage, text = 1; the same share holds for its KV cache.
    """

    node_id: str
    document_id: str
    title: str
    kind: Literal["deep", "input"]
    state: State
    rate: float
    entry_layer: int
    prefill_cost: float
    n_tokens: int
    n_concepts: int
    tokens: list[KeptToken]


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
