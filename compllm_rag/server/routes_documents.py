"""Routes of documents, uploads, the queue, and single passages."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from compllm_rag.server import documents, files, passages
from compllm_rag.server.document_schemas import (
    DocumentDetail,
    DocumentList,
    Job,
    Kept,
    NewDocument,
    NewDocuments,
    QueueStatus,
    Replacement,
    UploadAccepted,
)
from compllm_rag.server.failures import Refusal
from compllm_rag.server.schemas import Deleted
from compllm_rag.server.service import index_of, must_write, service_of

router = APIRouter(tags=["documents"])
_MOST_FILES = 1000
_FILES = {
    "type": "object",
    "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}},
    "required": ["files"],
}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/NewDocuments"}},
            "multipart/form-data": {"schema": _FILES},
        },
    }
}


@router.post("/v1/documents", status_code=202, openapi_extra=_BODY)
async def upload(request: Request) -> UploadAccepted:
    """Bring documents in, as JSON or as files; they are found from the response on."""
    service = must_write(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        read = files.read_json(_parsed(await request.body()).documents)
        index = await index_of(request, create=True)
        made = await service.uploads.admit().run(lambda: documents.upload(index, read, service.jobs))
    elif kind == "multipart/form-data":
        async with request.form(max_files=_MOST_FILES, max_fields=_MOST_FILES) as form:
            given = _files(form.multi_items())
            index = await index_of(request, create=True)
            made = await service.uploads.admit().run(
                lambda: documents.upload(index, files.read_files(given), service.jobs)
            )
    else:
        raise Refusal(
            415,
            "unsupported_media_type",
            "documents come as application/json or multipart/form-data",
            param="Content-Type",
        )
    service.telemetry.accepted(len(made.documents))
    return made


@router.get("/v1/documents")
async def list_documents(
    request: Request,
    after: Annotated[str, Query(max_length=500)] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> DocumentList:
    """List documents in order of id."""
    index = await index_of(request)
    return await run_in_threadpool(documents.listed, index, after, limit)


@router.get("/v1/documents/{document_id:path}")
async def get_document(document_id: str, request: Request, text: bool = False) -> DocumentDetail:
    """One document with its chunks; with `text` what they say, too."""
    index = await index_of(request)
    return await run_in_threadpool(documents.detail, index, document_id, text=text)


@router.put("/v1/documents/{document_id:path}", status_code=202)
async def replace_document(document_id: str, body: Replacement, request: Request) -> UploadAccepted:
    """Replace a document, or bring it in."""
    if len(document_id) > 500:
        raise Refusal(422, "invalid_request", "an id has 500 characters at most", param="document_id")
    service = must_write(request)
    new = NewDocument(text=body.text, title=body.title, metadata=body.metadata)
    read = files.Read([files.document_of(new, document_id)], [])
    index = await index_of(request, create=True)
    made = await service.uploads.admit().run(lambda: documents.upload(index, read, service.jobs))
    service.telemetry.accepted(1)
    return made


@router.delete("/v1/documents/{document_id:path}")
async def delete_document(document_id: str, request: Request) -> Deleted:
    """Delete a document: text, vectors, and the concepts that no other shares."""
    service, index = must_write(request), await index_of(request)
    await service.uploads.admit().run(lambda: documents.delete(index, document_id))
    return Deleted(id=document_id)


@router.get("/v1/jobs/{job_id}")
async def get_job(job_id: str, request: Request) -> Job:
    """How far the concepts of one upload are."""
    index = await index_of(request)
    job = service_of(request).jobs.get(job_id, index.config.namespace)
    return await run_in_threadpool(documents.job_status, index, job)


@router.get("/v1/queue")
async def get_queue(request: Request) -> QueueStatus:
    """What waits for its concepts, and for an answer."""
    index = await index_of(request)
    return await run_in_threadpool(documents.queue_status, index, service_of(request).generations)


@router.get("/v1/nodes/{node_id}/kept")
async def get_kept(node_id: str, request: Request) -> Kept:
    """The tokens of a passage, and which of them became concepts."""
    index = await index_of(request)
    return await run_in_threadpool(passages.kept, index, node_id)


def _parsed(body: bytes) -> NewDocuments:
    try:
        return NewDocuments.model_validate(json.loads(body))
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from error
    except (ValueError, RecursionError):
        raise Refusal(422, "invalid_request", "the body is no JSON") from None


def _files(items: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Names and bytes of uploaded files.

    Raises:
        Refusal: There is something else, or nothing.
    """
    strange = [name for name, value in items if name != "files" or not isinstance(value, UploadFile)]
    if strange or not items:
        raise Refusal(
            422, "invalid_request", "files come in fields called `files`, each with a file name", param="files"
        )
    return [(value.filename or "file", value.file) for _, value in items]
