"""A real uvicorn on the loopback address: streams, clients that go away, full queues, and the end of the server."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, APIStatusError, BadRequestError, NotFoundError, OpenAI

import toy
from compllm_rag import ConceptIndex
from compllm_rag.generation.local import LocalGenerator, LocalStream
from compllm_rag.server.registry import Registry
from tests.processes import errors, started
from tests.server.server_samples import QUESTION, events, registry, running
from toy_embedder import save_sentence_transformer
from trained import trained_deep


class Slow:
    """Lets the generators of a registry go on one token at a time, as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.begun, self.ended = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)
        self.cancelled: Callable[[], bool] = lambda: False
        stock = LocalStream.__iter__

        def pieces(stream: LocalStream) -> Iterator[str]:
            self.begun.release()
            try:
                for piece in stock(stream):
                    yield piece
                    while not self.open.wait(0.02) and not self.cancelled():
                        pass
            finally:
                self.ended.release()

        monkeypatch.setattr(LocalStream, "__iter__", pieces)


@pytest.fixture(scope="module")
def compressor() -> Any:
    return trained_deep(toy.llm(layers=4))


@pytest.fixture
def made(tmp_path: Path, compressor: Any) -> Registry:
    made = registry(tmp_path / "s", compressor, settings={"generations": 1, "waiting": 1, "grace_s": 20})
    index = made.get(None)
    from llama_index.core import Document

    index.ingest([Document(id_="rock.md", text=toy.TEXT, metadata={"title": "Gull Rock"})])
    return made


def ask(url: str, **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/query", json={"query": QUESTION, "max_tokens": 8, **options}, timeout=60)


def until(true: Callable[[], bool], limit: float = 30) -> None:
    deadline = time.monotonic() + limit
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stream_comes_piece_by_piece(made: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    with running(made) as (url, _):
        body = {"query": QUESTION, "stream": True, "max_tokens": 6}
        with httpx.stream("POST", f"{url}/v1/query", json=body, timeout=60) as response:
            told = ""
            for piece in response.iter_text():
                told += piece
                if "event: token" in told and not slow.open.is_set():
                    assert "event: done" not in told  # the rest is not even made
                    slow.open.set()
        assert [name for name, _ in events(told)][-1] == "done"


def test_who_goes_away_ends_the_generation(made: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    with running(made) as (url, server):
        service = server.config.app.state.service
        running_now = service.generations._futures
        slow.cancelled = lambda: any(ticket.cancel.is_set() for ticket in list(running_now.values()))
        body = {"query": QUESTION, "max_tokens": 500}
        with httpx.stream("POST", f"{url}/v1/query", json={**body, "stream": True}, timeout=60) as response:
            pieces = response.iter_text()  # kept: when it is forgotten, the connection is closed
            assert "retrieved" in next(pieces)
            assert slow.begun.acquire(timeout=30)
        assert slow.ended.acquire(timeout=30)
        until(lambda: service.generations.running == 0)
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/query", json=body, timeout=httpx.Timeout(30, read=1.0))
        assert slow.ended.acquire(timeout=30)
        until(lambda: service.generations.running == service.generations._admitted == 0)
        assert "compllm_server_cancelled_total 2.0" in httpx.get(f"{url}/metrics").text
        slow.open.set()
        assert ask(url).status_code == 200


def test_who_goes_away_ends_the_question_that_is_made_of_a_message(
    made: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    slow.open.set()
    with running(made) as (url, server):
        service = server.config.app.state.service
        chat = httpx.post(f"{url}/v1/chat", json={"message": QUESTION, "max_tokens": 4}, timeout=60).json()
        assert slow.begun.acquire(timeout=30) and slow.ended.acquire(timeout=30)
        slow.open.clear()
        running_now = service.generations._futures
        slow.cancelled = lambda: any(ticket.cancel.is_set() for ticket in list(running_now.values()))
        body = {"message": "And who was she?", "session_id": chat["session_id"], "max_tokens": 500}
        with httpx.stream("POST", f"{url}/v1/chat", json={**body, "stream": True}, timeout=60):
            assert slow.begun.acquire(timeout=30)
        assert slow.ended.acquire(timeout=30)
        until(lambda: service.generations.running == service.generations._admitted == 0)
        assert not slow.begun.acquire(timeout=0.1)  # it was the condensing, and no answer came after it
        assert "compllm_server_cancelled_total 1.0" in httpx.get(f"{url}/metrics").text
        slow.open.set()
        again = httpx.post(f"{url}/v1/chat", json={**body, "max_tokens": 4}, timeout=60)
        assert again.status_code == 200 and again.json()["turns"] == 1


def test_a_full_queue_and_one_that_gives_up_waiting(made: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    with running(made) as (url, server), ThreadPoolExecutor(4) as clients:
        generations = server.config.app.state.service.generations
        first = clients.submit(ask, url)
        assert slow.begun.acquire(timeout=30)
        second = clients.submit(ask, url, stream=True)
        until(lambda: generations.waiting == 1)
        refused = ask(url)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        queue = httpx.get(f"{url}/v1/queue").json()
        assert (queue["generations_running"], queue["generations_waiting"]) == (1, 1)
        slow.open.set()
        assert first.result(60).json()["answer"] == events(second.result(60).text)[-1][1]["answer"]
        slow.open.clear()
        third = clients.submit(ask, url)
        assert slow.begun.acquire(timeout=30) and slow.begun.acquire(timeout=30)
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/query", json={"query": QUESTION}, timeout=httpx.Timeout(30, read=0.3))
        until(lambda: generations.waiting == 0 or generations._admitted == 2)
        slow.open.set()
        assert third.result(60).status_code == 200
        until(lambda: generations._admitted == 0)
        assert ask(url).status_code == 200


def test_one_turn_at_a_time(made: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    slow.open.set()
    with running(made) as (url, _), ThreadPoolExecutor(2) as clients:

        def say(**options: Any) -> httpx.Response:
            return httpx.post(f"{url}/v1/chat", json={"message": QUESTION, "max_tokens": 4, **options}, timeout=60)

        name = say().json()["session_id"]
        slow.open.clear()
        while slow.begun.acquire(blocking=False):
            pass
        first = clients.submit(say, session_id=name)
        assert slow.begun.acquire(timeout=30)
        refused = say(session_id=name)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "session_busy")
        slow.open.set()
        assert first.result(60).json()["turns"] == 1
        assert say(session_id=name).json()["turns"] == 2


def test_at_the_end_what_runs_is_finished_and_what_waits_is_refused(
    made: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    with running(made) as (url, server), ThreadPoolExecutor(3) as clients:
        service = server.config.app.state.service
        first = clients.submit(ask, url, stream=True)
        assert slow.begun.acquire(timeout=30)
        second = clients.submit(ask, url)
        until(lambda: service.generations.waiting == 1)
        server.should_exit = True
        refused = second.result(60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        slow.open.set()
        assert events(first.result(60).text)[-1][0] == "done"


def test_an_error_within_a_stream_is_an_event(made: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: LocalGenerator, *args: Any, **options: Any) -> Any:
        raise RuntimeError("xyzzy")

    monkeypatch.setattr(LocalGenerator, "stream", broken)
    with running(made) as (url, _):
        told = events(ask(url, stream=True).text)
        assert [name for name, _ in told] == ["retrieved", "plan", "error"]
        assert told[-1][1]["error"]["code"] == "internal" and "xyzzy" not in str(told)
        assert ask(url).status_code == 500
        with pytest.raises(APIError, match="the server could not do this"):
            list(complete(openai(url), stream=True))


def openai(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60)


def complete(client: OpenAI, **options: Any) -> Any:
    given = {"model": "compllm-rag", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, **options}
    return client.chat.completions.create(**given)


def test_the_client_of_openai(made: Registry) -> None:
    with running(made) as (url, _):
        client = openai(url)
        assert [model.id for model in client.models.list()] == ["compllm-rag", "compllm-rag-text"]
        assert client.models.retrieve("compllm-rag").owned_by == "compllm-rag"
        whole = complete(client)
        own = ask(url).json()
        assert whole.choices[0].message.content == own["answer"] != ""
        assert whole.choices[0].finish_reason in ("stop", "length") and whole.object == "chat.completion"
        assert whole.usage.prompt_tokens == own["positions"] and whole.usage.completion_tokens == own["new_tokens"]
        assert whole.usage.total_tokens == own["positions"] + own["new_tokens"]
        assert whole.compllm["citations"][0]["document_id"] == "rock.md"
        chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == own["answer"]
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.completion_tokens > 0
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        text = complete(client, model="compllm-rag-text")
        assert text.compllm["prefill_cost"] == 1.0 > whole.compllm["prefill_cost"]
        with client.chat.completions.with_streaming_response.create(
            model="compllm-rag", messages=[{"role": "user", "content": QUESTION}], stream=True, max_tokens=2
        ) as raw:
            assert list(raw.iter_lines())[-2:][0] == "data: [DONE]"


def test_openai_conversations_and_options(made: Registry) -> None:
    with running(made) as (url, _):
        client = openai(url)
        before = [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "Ada Marsh."},
        ]
        later = complete(client, messages=[*before, {"role": "user", "content": [{"type": "text", "text": "When?"}]}])
        assert later.usage.prompt_tokens > complete(client).usage.prompt_tokens
        greedy = complete(client).choices[0].message.content
        assert complete(client, temperature=0, seed=3, n=1, presence_penalty=0).choices[0].message.content == greedy
        drawn = [complete(client, temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert complete(client, stop=greedy[2]).choices[0].message.content == greedy[: greedy.index(greedy[2])]
        assert complete(client, max_completion_tokens=2, max_tokens=None).usage.completion_tokens <= 2
        for wrong, param in (
            ({"n": 2}, "n"), ({"logprobs": True}, "logprobs"), ({"presence_penalty": 0.5}, "presence_penalty"),
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"), ({"user": "me"}, "user"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"extra_body": {"prompt_embeds": "x"}}, "prompt_embeds"), ({"extra_body": {"n": True}}, "n"),
        ):  # fmt: skip
            with pytest.raises(BadRequestError) as raised:
                complete(client, **wrong)
            assert (raised.value.code, raised.value.param) == ("unsupported_parameter", param)
            assert raised.value.type == "invalid_request_error" and "Next step" in raised.value.message
        image = [{"type": "image_url", "image_url": {"url": "http://x"}}]
        for messages in ([], before, [{"role": "tool", "content": "x"}], [{"role": "user", "content": image}]):
            with pytest.raises(BadRequestError):
                complete(client, messages=messages)
        with pytest.raises(NotFoundError) as missing:
            complete(client, model="gpt-9")
        assert missing.value.code == "model_not_found"
        with pytest.raises(APIStatusError) as long:
            complete(client, max_tokens=100_000)
        assert long.value.status_code == 422
        with pytest.raises(BadRequestError):
            complete(client, stream_options={"include_usage": True})


def test_a_process_that_is_told_to_end_loses_nothing(toy_folder: Path, tmp_path: Path) -> None:
    """`compllm-rag serve`, ended by SIGTERM while uploads wait: all that was answered with 202 is there afterwards."""
    embedder = save_sentence_transformer(tmp_path / "embedder", toy.TEXT)
    folder = tmp_path / "s"
    words = ["serve", folder, "--create", "--llm", toy_folder, "--embedder", embedder, "--port", "0", "--offline"]
    command = [sys.executable, "-m", "compllm_rag.cli", *map(str, words)]
    with started(command, 380) as process:
        until(lambda: "listening on" in errors(process) or process.poll() is not None, 300)
        url = re.search(r"listening on (http://\S+)", errors(process))[1]
        accepted = []
        for number in range(40):
            body = {"documents": [{"id": f"d{number}", "text": f"{toy.TEXT} Boat {number}."}]}
            answer = httpx.post(f"{url}/v1/documents", json=body, timeout=60)
            assert answer.status_code == 202, answer.text
            accepted += answer.json()["documents"]
        assert httpx.get(f"{url}/v1/queue").json()["generations_limit"] == 32
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
        told = errors(process)
    assert "Traceback" not in told and "Boat" not in told and "d39" not in told
    with ConceptIndex.load(folder) as index:
        assert sorted(accepted) == sorted(index.ref_doc_info)
        assert index.uploads.wait(60) and len(index.pending) == 0
        assert index.verify().sound
