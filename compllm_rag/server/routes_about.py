"""Routes for whoever looks after the server, and the page."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from starlette.concurrency import run_in_threadpool

from compllm_rag import __version__
from compllm_rag.server.documents import counts
from compllm_rag.server.failures import Refusal
from compllm_rag.server.files import readable_types
from compllm_rag.server.schemas import Health, Info
from compllm_rag.server.service import caller_of, index_of, service_of

router = APIRouter(tags=["server"])
PAGE = Path(__file__).parent / "page"


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> Health:
    """The process lives."""
    return Health(status="ok")


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request) -> Health:
    """Models are loaded and requests are taken; 503 while it shuts down."""
    if service_of(request).generations.closing:
        raise Refusal(503, "shutting_down", "the server is shutting down")
    return Health(status="ok")


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> PlainTextResponse:
    """Counters of the server and of all open namespaces, as Prometheus text."""
    text = await run_in_threadpool(service_of(request).telemetry.text)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/info")
async def info(request: Request) -> Info:
    """What answers here."""
    service, index = service_of(request), await index_of(request)
    manifest, spec, settings = index.manifest, index.library.spec, service.settings
    n_documents, n_chunks = await run_in_threadpool(counts, index)
    return Info(
        version=__version__,
        namespace=index.config.namespace,
        may_write=caller_of(request).may_write and not service.registry.read_only,
        llm=_last(manifest.llm),
        embedder=_last(manifest.embedder),
        kind="deep" if spec.config.deep else "input",
        rate=index.config.rate,
        entry_layer=spec.config.entry_layer,
        depth=spec.depth,
        reading=service.registry.reading.shown(),
        documents=n_documents,
        chunks=n_chunks,
        file_types=readable_types(),
        limits={
            "upload_bytes": settings.upload_bytes,
            "request_bytes": settings.request_bytes,
            "max_tokens": settings.max_tokens,
        },
    )


def _last(source: str) -> str:
    """A model's name without the folders of this machine."""
    return Path(source).name if Path(source).is_absolute() else source
