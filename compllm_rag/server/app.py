"""The application: routes, the gate in front of them, and errors in one shape."""

from __future__ import annotations

import mimetypes
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount
from starlette.types import Scope

from compllm_rag import __version__
from compllm_rag.errors import CompLLMError
from compllm_rag.server import routes_about, routes_documents, routes_openai, routes_query
from compllm_rag.server.document_schemas import NewDocuments
from compllm_rag.server.failures import Refusal, refusal_of
from compllm_rag.server.gate import Gate, accepted_hosts, host_names, path_of
from compllm_rag.server.jobs import Jobs
from compllm_rag.server.keys import KeyFile
from compllm_rag.server.openai_schemas import CompletionRequest
from compllm_rag.server.registry import Registry
from compllm_rag.server.schemas import ErrorBody
from compllm_rag.server.service import Service
from compllm_rag.server.settings import ServerSettings

_CODES = {400: "bad_request", 404: "no_such_route", 405: "method_not_allowed", 415: "unsupported_media_type"}


def create_app(
    registry: Registry,
    settings: ServerSettings | None = None,
    *,
    keys: KeyFile | None = None,
    host: str = "127.0.0.1",
    allowed_hosts: Iterable[str] = (),
) -> FastAPI:
    """The server as an ASGI application, for `serve` or for an ASGI server of one's own.

    Args:
        registry: Opens namespaces; `start` it first. It is closed when the application ends.
        settings: Limits; None takes the registry's.
        keys: API keys; None lets everybody who reaches the server do everything.
        host: The address that it will listen on.
        allowed_hosts: Further names by which clients may call it.
    """
    further = list(allowed_hosts)
    hosts = accepted_hosts(host, further, keys=keys is not None)
    service = Service(registry, settings or registry.settings, keys, hosts, host_names(further), Jobs())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        service.refuse_new()
        await run_in_threadpool(service.close)

    # The pages of FastAPI that show the API load scripts from elsewhere.
    app = FastAPI(title="compllm-rag", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    for part in (routes_about, routes_query, routes_documents, routes_openai):
        app.include_router(part.router, responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}})
    if routes_about.PAGE.is_dir():
        mimetypes.add_type("text/javascript", ".js")  # some systems say text/plain, and browsers refuse such modules
        app.router.routes.append(_Page(routes_about.PAGE))
    for kind in (Refusal, CompLLMError):
        app.add_exception_handler(kind, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain)
    app.add_middleware(Gate, service=service)
    _describe(app)
    return app


class _Page(Mount):
    """The page's files, and no other path: of one that is not known 404 is said, of a wrong method 405, as without it.

    Args:
        folder: Holds them.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__("/", StaticFiles(directory=folder, html=True), name="page")
        files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        self._known = {"/", *(f"/{name}" for name in files)}

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """As of a mount, for its own files."""
        if scope["type"] != "http" or path_of(scope) not in self._known:
            return Match.NONE, {}
        return super().matches(scope)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    return _response(request, refusal_of(error))


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """What is wrong with a field, without its value: that may be a whole document."""
    first: dict[str, Any] = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    place = [str(part) for part in first.get("loc", ()) if part != "body"]
    where = ".".join(place)[:200] or None
    message = str(first.get("msg", "the request makes no sense"))[:300]
    return _response(request, Refusal(422, "invalid_request", f"{where}: {message}" if where else message, param=where))


async def _plain(request: Request, error: Exception) -> JSONResponse:
    status = error.status_code if isinstance(error, HTTPException) else 500
    told = str(error.detail)[:300] if isinstance(error, HTTPException) else ""
    made = _response(request, Refusal(status, _CODES.get(status, "bad_request"), told))
    if isinstance(error, HTTPException):
        made.headers.update(error.headers or {})
    return made


def _response(request: Request, refusal: Refusal) -> JSONResponse:
    service: Service = request.app.state.service
    service.telemetry.refused(refusal.code)
    return JSONResponse(refusal.body.model_dump(), refusal.status, dict(refusal.headers))


def _describe(app: FastAPI) -> None:
    """Add to /openapi.json the bodies that routes read by themselves."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            known = made["components"]["schemas"]
            for model in (NewDocuments, CompletionRequest):
                own = model.model_json_schema(ref_template="#/components/schemas/{model}")
                known.update(own.pop("$defs", {}))
                known[model.__name__] = own
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
