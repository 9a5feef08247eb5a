"""The server as a process: uvicorn around the application, and an end that loses nothing."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from compllm_rag.errors import ConfigurationError
from compllm_rag.server.app import create_app
from compllm_rag.server.keys import KeyFile
from compllm_rag.server.registry import Registry
from compllm_rag.server.service import Service

logger = logging.getLogger(__name__)
_CONNECTIONS = 1000


def checked_keys(path: Path | None, host: str) -> KeyFile | None:
    """The keys of a server that listens on an address.

    Raises:
        ConfigurationError: Others can reach the address and there are no keys, or the file holds none.
        UnsupportedFormatError: It is no file of keys.
    """
    if path is None:
        if not is_loopback(host):
            raise ConfigurationError(
                "without API keys a server listens on the loopback address only",
                got=host,
                expected="127.0.0.1, ::1 or localhost",
                next_step="make keys with `compllm-rag keys add NAME --api-keys FILE`, and pass --api-keys FILE",
            )
        return None
    keys = KeyFile(path)
    if not keys.keys:
        raise ConfigurationError(
            "this file holds no API keys, so nobody could ask",
            got=path,
            next_step=f"run `compllm-rag keys add NAME --api-keys {path}`",
        )
    return keys


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Server(uvicorn.Server):
    """uvicorn's, which tells the application as soon as it is to end."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say where."""
        await super().startup(sockets)
        for server in self.servers:
            for each in server.sockets:
                name = each.getsockname()
                host = f"[{name[0]}]" if ":" in name[0] else name[0]
                logger.info("listening on http://%s:%d", host, name[1])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what waits, and take nothing new; then wait for what runs. A second signal ends it at once."""
        app = self.config.app
        if isinstance(app, FastAPI):
            service: Service = app.state.service
            service.refuse_new()
        await super().shutdown(sockets)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at an address; nobody can connect to it before the server listens.

    Raises:
        OSError: The address is taken, or none of this machine's.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from error
    return made


def make_server(
    registry: Registry,
    *,
    host: str = "127.0.0.1",
    keys: KeyFile | None = None,
    allowed_hosts: Sequence[str] = (),
) -> Server:
    """A server that is ready to `run(sockets=[bound_socket(host, port)])`.

    Args:
        registry: Opens namespaces; `start` it first.
        host: Address that it is to listen on; see `checked_keys`.
        keys: API keys.
        allowed_hosts: Further names by which clients may call it.
    """
    # Streams are to be finished at the end, not broken off: uvicorn waits for them, and then cancels.
    AppStatus.enable_automatic_graceful_drain = False
    app = create_app(registry, keys=keys, host=host, allowed_hosts=allowed_hosts)
    config = uvicorn.Config(
        app,
        host=host,
        access_log=False,  # it would write ids of documents; the gate has a log of its own
        log_config=None,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=max(1, round(registry.settings.grace_s)),
    )
    return Server(config)
