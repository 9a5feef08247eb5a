"""What the routes of one server share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from compllm_rag.server.failures import Refusal
from compllm_rag.server.limits import RateLimit
from compllm_rag.server.sessions import Sessions
from compllm_rag.server.telemetry import Telemetry
from compllm_rag.server.work import Workers

if TYPE_CHECKING:
    from compllm_rag.config import Mode
    from compllm_rag.llamaindex.index import ConceptIndex
    from compllm_rag.server.jobs import Jobs
    from compllm_rag.server.keys import KeyFile
    from compllm_rag.server.reading import ReadAsked, ReadDefaults
    from compllm_rag.server.registry import Registry
    from compllm_rag.server.settings import ServerSettings


class Caller(NamedTuple):
    """Who asks.

    Attributes:
        name: Of the key; `-` where the server has none.
        namespace: The one they may see; None for the one in the storage folder itself.
        may_write: Whether they may change documents.
    """

    name: str
    namespace: str | None
    may_write: bool


@dataclass
class Service:
    """Models, limits and what is remembered.

    Attributes:
        registry: Opens namespaces.
        settings: Limits.
        keys: API keys; None where everybody who reaches the server may do everything.
        hosts: Names by which clients may call it; empty for any.
        origins: Names whose pages may use it beside its own, behind a proxy that changes the name.
        jobs: Uploads of this process.
    """

    registry: Registry
    settings: ServerSettings
    keys: KeyFile | None
    hosts: frozenset[str]
    origins: frozenset[str]
    jobs: Jobs
    sessions: Sessions = field(default_factory=Sessions)
    generations: Workers = field(init=False)
    uploads: Workers = field(init=False)
    rates: RateLimit = field(init=False)
    telemetry: Telemetry = field(init=False)

    def __post_init__(self) -> None:
        self.generations = Workers("answers", self.settings.generations, self.settings.waiting)
        # One writes at a time to each namespace anyway; further uploads wait with their text in memory, so few may.
        self.uploads = Workers("uploads", 2, 16)
        self.rates = RateLimit(self.settings.requests_per_minute)
        self.telemetry = Telemetry(
            self.generations, lambda: len(self.sessions), lambda: self.registry.indexes, self.registry.measures
        )

    def refuse_new(self) -> None:
        """Begin to shut down: finish what runs, refuse all else."""
        self.generations.refuse_new()
        self.uploads.refuse_new()

    def close(self) -> None:
        """Let go of everything; what runs has its time to end."""
        self.uploads.close(self.settings.grace_s)
        self.generations.close(self.settings.grace_s)
        self.registry.close()


def service_of(request: Request) -> Service:
    """The service behind a request."""
    return cast(Service, request.app.state.service)


def caller_of(request: Request) -> Caller:
    """Who sent a request; `gate` has seen to it that they may."""
    return cast(Caller, request.state.caller)


def must_write(request: Request) -> Service:
    """The service, for whoever may change documents.

    Raises:
        Refusal: They may not.
    """
    service = service_of(request)
    if not caller_of(request).may_write or service.registry.read_only:
        raise Refusal(
            403, "not_allowed", "documents may not be changed with this key, or on this server. Next step: use a key"
            " with the right to write",
        )  # fmt: skip
    return service


async def index_of(request: Request, *, create: bool = False) -> ConceptIndex:
    """The index of whoever asks.

    Args:
        request: The request.
        create: Make it where it is missing; see `must_write`.

    Raises:
        Refusal: It is not there.
    """
    name, registry = caller_of(request).namespace, service_of(request).registry
    opened = registry.opened(name)
    if opened is not None:
        return opened
    return await run_in_threadpool(registry.get, name, create=create)


async def asked_reading(service: Service, index: ConceptIndex, mode: Mode, asked: ReadAsked | None) -> ReadDefaults:
    """How the passages of one answer are read: as the server was told, but for what a request asks for.

    Raises:
        CompLLMError: It cannot be; see `ReadDefaults.with_request` and `ReadDefaults.check`.
    """
    told = service.registry.reading
    reading = told.with_request(asked)
    if reading is not told:
        await run_in_threadpool(reading.check, index, (mode,))
    return reading
