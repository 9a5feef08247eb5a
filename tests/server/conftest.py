"""Fixtures of the tests that use the page: a browser, a server, and visits that end with a look at what was heard."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import toy
from compllm_rag.server.registry import Registry
from compllm_rag.server.settings import ServerSettings
from tests.server.browser import chromium
from tests.server.server_samples import running
from toy_embedder import HashEmbedder
from trained import trained_deep


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server of two namespaces at least: `default` holds one document."""
    folder = tmp_path_factory.mktemp("page")
    own = {"compressor": trained_deep(toy.llm(layers=4)), "embedder": HashEmbedder()}
    # One answer at a time: the tests of the page hold the first answer back and look at the second.
    settings = ServerSettings(requests_per_minute=1_000_000, max_upload_mb=1, generations=1)
    made = Registry(folder / "s", settings, create={**own, "chunk_size": 60, "rate": 2.0}, **own)
    made.start()
    from llama_index.core import Document

    made.get(None).ingest([Document(id_="rock.md", text=toy.TEXT, metadata={"title": "Gull Rock"})])
    with running(made) as (url, uvicorn):
        yield SimpleNamespace(url=url, service=uvicorn.config.app.state.service, registry=made, folder=folder, own=own)


@pytest.fixture
def visit(browser: Any, server: SimpleNamespace) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end, looks at what it asked for and what it complained about."""
    complaints: list[str] = []
    strangers: list[str] = []
    contexts = []

    def opened(namespace: str | None = None, url: str = server.url, errors: str = "", **options: Any) -> Any:
        headers = {"X-Namespace": namespace} if namespace else {}
        context = browser.new_context(extra_http_headers=headers, reduced_motion="reduce", **options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()

        def heard(message: Any) -> None:
            if message.type in ("error", "warning") and not (errors and re.search(errors, message.text)):
                complaints.append(message.text)

        page.on("console", heard)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith(f"{url}/") or strangers.append(request.url))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert (complaints, strangers) == ([], [])
