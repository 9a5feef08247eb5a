"""What every request passes before a route sees it: host, origin, key, rate and size; and what the log says of it.

All of that comes before a body is read. It is plain ASGI, so that streams pass untouched and a client that goes away is
noticed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from compllm_rag.errors import CompLLMError
from compllm_rag.server.failures import Refusal, internal, log_fault, refusal_of
from compllm_rag.server.keys import ApiKey
from compllm_rag.server.service import Caller, Service

logger = logging.getLogger("compllm_rag.server.access")

_BODY_S = 60.0  # between two parts of a body
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_NOBODY = Caller("-", None, False)


class Gate:
    """Lets requests in.

    Args:
        app: What is behind it.
        service: Keys, limits, counters.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._told: type[Exception] | None = None  # why the file of keys cannot be read: each reason is logged once

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passage = _Passage(scope, receive, send)
        begun = time.perf_counter()
        try:
            try:
                self._admit(scope)
                passage.most_bytes = self._most_bytes(scope)
                passage.check_announced()
            except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer in the usual shape
                passage.refusal = refusal_of(error)
            else:
                try:
                    await self._app(scope, passage.receive, passage.send)
                except Exception as error:  # noqa: BLE001 - the last place where one becomes a response
                    passage.fail(error)
            await passage.finish()
        finally:
            self._tell(scope, passage, time.perf_counter() - begun)

    def _admit(self, scope: Scope) -> None:
        """Find out who asks, and whether they may.

        Raises:
            Refusal: They may not.
        """
        service, headers, path = self._service, Headers(scope=scope), path_of(scope)
        self._check_host(headers)
        guarded = path.startswith("/v1/") or path == "/metrics"
        scope.setdefault("state", {})["caller"] = _NOBODY
        if not guarded:
            return
        address = (scope.get("client") or ("-", 0))[0]
        key: ApiKey | None = None
        try:
            if service.keys is not None:
                key = self._key(headers, path)
        except Refusal:
            self._take(f"address {address}")  # whoever tries keys is slowed down, too
            raise
        self._take(f"address {address}" if key is None else f"key {key.name}")
        asked = _namespace(headers)
        if key is None:
            caller = Caller("-", asked, True)
        elif asked is not None and asked != key.namespace:
            raise Refusal(403, "not_allowed", "this key belongs to another namespace. Next step: leave X-Namespace out")
        else:
            caller = Caller(key.name, key.namespace, key.rights == "write")
        scope["state"]["caller"] = caller

    def _check_host(self, headers: Headers) -> None:
        """Refuse pages of others: by their origin, and by the name under which they have had us looked up."""
        hosts, host = self._service.hosts, headers.get("host", "")
        if hosts and _name(host) not in hosts:
            raise Refusal(
                400, "unknown_host", "this server is not called by this name. Next step: name it in --allow-host"
            )
        origin = headers.get("origin")
        if origin is None:
            return
        called = _place(origin)
        if called != host.lower() and _name(called) not in self._service.origins:
            raise Refusal(403, "other_origin", "pages of other origins may not use this server")

    def _key(self, headers: Headers, path: str) -> ApiKey:
        keys = self._service.keys
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip() or keys is None:
            raise Refusal(401, "missing_key", "an API key is needed. Next step: send Authorization: Bearer KEY")
        try:
            key = keys.find(given.strip())
        except (CompLLMError, OSError) as error:
            if self._told is not type(error):
                log_fault(error)
            self._told = type(error)
            raise internal() from None
        self._told = None
        if key is None:
            raise Refusal(401, "unknown_key", "this API key is not known. Next step: ask whoever runs the server")
        if (path == "/metrics") != (key.rights == "metrics"):
            raise Refusal(403, "not_allowed", "this key has other rights. Next step: see `compllm-rag keys add --help`")
        return key

    def _take(self, who: str) -> None:
        wait_s = self._service.rates.take(who)
        if wait_s is not None:
            raise Refusal(
                429, "rate_limited", "too many requests. Next step: wait as long as Retry-After says",
                retry_after_s=wait_s,
            )  # fmt: skip

    def _most_bytes(self, scope: Scope) -> int:
        settings = self._service.settings
        return settings.upload_bytes if path_of(scope).startswith("/v1/documents") else settings.request_bytes

    def _tell(self, scope: Scope, passage: _Passage, seconds: float) -> None:
        """Log and count; ids of documents are in paths, so the route stands for them."""
        route = getattr(scope.get("route"), "path", None) or "(none)"
        caller: Caller = scope.get("state", {}).get("caller", _NOBODY)
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        self._service.telemetry.answered(method, route, passage.status, seconds)
        if passage.refusal is not None:
            self._service.telemetry.refused(passage.refusal.code)
        logger.info("%s %s %d %.3f s key=%s", method, route, passage.status, seconds, caller.name)


def path_of(scope: Scope) -> str:
    """The path that routes are matched against: within an application that this one is mounted in, without its prefix.

    Servers and mounts leave the prefix in `path` and tell it as `root_path`.
    """
    path, root = str(scope["path"]), str(scope.get("root_path") or "").rstrip("/")
    return path[len(root) :] or "/" if root and (path == root or path.startswith(f"{root}/")) else path


class _Passage:
    """One request and its response: counts the bytes of the one, adds headers to the other.

    Where the body turns out too large or too slow, whatever the application makes of that is replaced.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.most_bytes, self.refusal = 0, None  # type: int, Refusal | None
        self.status = 499  # as nginx has it: the client went away before there was one
        self._met, self._whole, self._begun, self._ended = 0, False, False, False

    def check_announced(self) -> None:
        """Refuse a body that says itself that it is too large.

        Raises:
            Refusal: It is.
        """
        length = Headers(scope=self._scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self.most_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        """The next part of the request."""
        if self._whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), _BODY_S)
        except TimeoutError:
            self.refusal = Refusal(408, "too_slow", f"the request has not come on for {_BODY_S:g} s")
            raise self.refusal from None
        if message["type"] == "http.request":
            self._met += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._met > self.most_bytes:
                self.refusal = self._too_large()
                raise self.refusal
        return message

    async def send(self, message: Message) -> None:
        """The next part of the response."""
        if self.refusal is not None and not self._begun:
            return  # it is answered by `finish`
        if message["type"] == "http.response.start":
            self._begun, self.status = True, message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            # The page's parts are asked after each time, so that none of an earlier version is among them.
            kept = "no-store" if path_of(self._scope).startswith("/v1/") else "no-cache"
            headers.setdefault("Cache-Control", kept)
        if message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        await self._send(message)

    def fail(self, error: Exception) -> None:
        """The application has failed; the response says so if there is none yet."""
        if isinstance(error, ClientDisconnect):
            return  # whoever stops sending has no fault of ours to be told of
        if self._begun:
            log_fault(error)
        elif self.refusal is None:
            self.refusal = refusal_of(error)

    async def finish(self) -> None:
        """Answer with the refusal, if there is one and nothing was sent."""
        if self.refusal is None or self._begun:
            return
        refusal, headers = self.refusal, dict(self.refusal.headers)
        if not self._whole:
            headers["Connection"] = "close"  # the rest of the body is not wanted
        self.refusal = None
        await JSONResponse(refusal.body.model_dump(), refusal.status, headers)(self._scope, self._receive, self.send)
        self.refusal = refusal

    def _too_large(self) -> Refusal:
        return Refusal(
            413, "too_large", f"a request here may have {self.most_bytes} bytes. Next step: send less at once"
        )


def _namespace(headers: Mapping[str, str]) -> str | None:
    given = headers.get("x-namespace")
    if given is None:
        return None
    try:
        return given.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        raise Refusal(400, "bad_request", "X-Namespace is no UTF-8", param="X-Namespace") from None


def _place(origin: str) -> str:
    """Host and port of an origin; empty where it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _name(host: str) -> str:
    """The host without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def host_names(given: Iterable[str]) -> frozenset[str]:
    """Names without ports, in small letters."""
    return frozenset(_name(each) for each in given)


def accepted_hosts(host: str, allowed: Iterable[str], *, keys: bool) -> frozenset[str]:
    """Names by which clients may call the server; empty for any.

    Without keys only those of this machine, so that no page can reach it by a name of its own (DNS rebinding). With
    keys every request needs one, which no page of others has.
    """
    named = host_names(allowed)
    if keys and not named:
        return frozenset()
    return frozenset({"127.0.0.1", "localhost", "::1", _name(host) if ":" not in host else host} | named)
