"""What goes over the wire for documents: what is sent, what is kept of it, and how far its upload is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from compllm_rag.server.schemas import Body

MOST_TEXT = 8_000_000
DocumentId = Annotated[str, Field(min_length=1, max_length=500)]
State = Literal["ready", "waiting", "failed"]


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
