"""Servers for tests: toy models behind the application itself, or behind a real uvicorn on the loopback address."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

import toy
from compllm_rag.server.app import create_app
from compllm_rag.server.registry import Registry
from compllm_rag.server.serving import bound_socket, make_server
from compllm_rag.server.settings import ServerSettings
from toy_embedder import HashEmbedder

QUESTION = "Who built the lighthouse on Gull Rock?"
DOCUMENTS = {"documents": [{"id": "rock.md", "text": toy.TEXT, "title": "Gull Rock", "metadata": {"year": 1871}}]}


def registry(folder: Path, compressor: Any, **options: Any) -> Registry:
    """A started registry over a new storage."""
    own: dict[str, Any] = {"compressor": compressor, "embedder": HashEmbedder()}
    create = {**own, "chunk_size": 60}
    settings = ServerSettings(**{"default_tokens": 8, "requests_per_minute": 1_000_000, **options.pop("settings", {})})
    made = Registry(folder, settings, create=create, **own, **options)
    made.start()
    return made


def client(made: Registry, **options: Any) -> httpx.AsyncClient:
    """A client of the application, without a network."""
    app = create_app(made, **options)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=60)


@contextlib.contextmanager
def running(made: Registry, **options: Any) -> Iterator[tuple[str, Any]]:
    """A real server in a thread: its address, and uvicorn's server."""
    with bound_socket("127.0.0.1", 0) as bound:
        server = make_server(made, **options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + 60
            while not server.started and thread.is_alive():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of server-sent events."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if lines:
            found.append((lines.get("event", ""), json.loads(lines["data"])))
    return found
