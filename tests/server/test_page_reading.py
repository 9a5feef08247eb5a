"""The page of a server that was told how passages are read: it says which of them were left out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from llama_index.core import Document

import toy
from compllm_rag.server.registry import Registry
from compllm_rag.server.settings import ServerSettings
from tests.server.browser import ask
from tests.server.server_samples import running

pytest.importorskip("playwright", reason="the page is tested with playwright: pip install playwright")
from playwright.sync_api import Page, expect

expect.set_options(timeout=60_000)  # many tests share a machine


def test_passages_that_a_budget_left_out(tmp_path: Path, server: SimpleNamespace, visit: Callable[..., Page]) -> None:
    settings = ServerSettings(requests_per_minute=1_000_000)
    made = Registry(tmp_path / "s", settings, create=server.own, reading={"prefill_budget": 45.0}, **server.own)
    made.start()
    parts = toy.TEXT.split("\n\n")
    made.get(None).ingest([Document(id_=f"{n}.md", text=part) for n, part in enumerate(parts)])
    with running(made) as (url, _):
        page = visit(url=url)
        ask(page)
        told = page.locator("#passage-list .readings")
        expect(told.filter(has_text=re.compile("left out as (text|concepts)")).first).to_be_visible()
        expect(
            told.filter(has_text=re.compile(r"as (text|concepts)( in both answers,)? \d+ position")).first
        ).to_be_visible()
        assert all(told.all_inner_texts()) and len(told.all_inner_texts()) > 1
