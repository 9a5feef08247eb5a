"""A server that decodes the answers of all namespaces together: the same answers, counted, and given up one by one."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from llama_index.core import Document

import toy
from compllm_rag.generation.batching import BatchingGenerator
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.generation.scheduler import Scheduler
from compllm_rag.server.registry import Registry
from tests.server.server_samples import QUESTION, events, registry, running
from trained import trained_deep

ASKED: list[dict[str, Any]] = [
    {"query": QUESTION, "max_tokens": 12},
    {"query": QUESTION, "max_tokens": 9, "mode": "text"},
    {"query": "When did she die?", "max_tokens": 6},
    {"query": "What keeps the museum?", "max_tokens": 10, "mode": "text", "temperature": 1.2, "seed": 3},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    compressor = trained_deep(toy.llm(layers=4))
    compressor.llm.model.generation_config.eos_token_id = None
    made = registry(tmp_path_factory.mktemp("batched") / "s", compressor, settings={"waiting": 4, "generations": 4})
    for name in (None, "other"):
        made.get(name, create=True).ingest([Document(id_="rock.md", text=toy.TEXT)])
    return made


def test_a_server_and_those_who_ask_at_the_same_time(made: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """One server for all of it: a toy starts in no time, a server does not."""
    one, other = made.get(None).generator, made.get("other").generator
    assert isinstance(one, BatchingGenerator) and isinstance(other, BatchingGenerator)
    scheduler = one.scheduler
    assert scheduler is other.scheduler and one.prefixes is not other.prefixes
    assert (scheduler.rows, scheduler.waiting) == (4, 4)
    with running(made) as (url, server), ThreadPoolExecutor(8) as clients:

        def ask(body: dict[str, Any], namespace: str | None = None) -> httpx.Response:
            headers = {} if namespace is None else {"X-Namespace": namespace}
            return httpx.post(f"{url}/v1/query", json=body, headers=headers, timeout=120)

        alone = [ask(body).json()["answer"] for body in ASKED]
        stock = Scheduler._decode
        asked = [
            clients.submit(ask, {**body, "stream": number % 2 == 1}, "other" if number > 1 else None)
            for number, body in enumerate(ASKED)
        ]
        for number, answer in enumerate(asked):
            response = answer.result()
            told = events(response.text)[-1][1] if number % 2 else response.json()
            assert told["answer"] == alone[number] != ""
            assert told["timings"]["queue_s"] >= 0
        counted = httpx.get(f"{url}/metrics").text
        assert "compllm_batch_rows 0.0" in counted and "compllm_batch_waiting 0.0" in counted
        prompts = re.search(r"compllm_batch_wait_seconds_count (\S+)", counted)
        assert prompts is not None and float(prompts[1]) == 8
        # Who goes away ends one answer, and not that of another.
        service = server.config.app.state.service
        stays = clients.submit(ask, {"query": QUESTION, "max_tokens": 60})
        body = {"query": QUESTION, "max_tokens": 500, "stream": True}
        with httpx.stream("POST", f"{url}/v1/query", json=body, timeout=60) as response:
            assert any("token" in piece for piece in response.iter_text())
        assert stays.result().json()["new_tokens"] == 60
        deadline = time.monotonic() + 60
        while service.generations._admitted or scheduler._active:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert "compllm_server_cancelled_total 1.0" in httpx.get(f"{url}/metrics").text
        # More than there are places for are refused.
        monkeypatch.setattr(Scheduler, "_decode", lambda self: (time.sleep(0.05), stock(self)))
        many = [clients.submit(ask, {"query": QUESTION, "max_tokens": 20}) for _ in range(8)]
        while service.generations._admitted < 8:
            assert time.monotonic() < deadline + 60
            time.sleep(0.01)
        refused = ask(ASKED[0])
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert {answer.result().status_code for answer in many} == {200}
    assert scheduler._thread is None and scheduler._closed


def test_one_answer_at_a_time_has_no_scheduler(tmp_path: Path) -> None:
    made = registry(tmp_path / "s", trained_deep(toy.llm(layers=4)), settings={"generations": 1})
    assert type(made.get(None).generator) is LocalGenerator
    made.close()
