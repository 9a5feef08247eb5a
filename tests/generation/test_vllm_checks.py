"""A vLLM server that may have been started anew is checked again; generators for several tenants share one client."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import toy
from compllm_rag.errors import GeneratorMismatchError, GeneratorUnavailableError
from compllm_rag.generation.vllm import VLLMGenerator, checks
from compllm_rag.models.llm import TargetLLM
from tests.generation.test_vllm import client, concepts, text
from tests.vllm_servers import FakeVLLM, Fault, cut_after, hang_up, status, wait_after


@pytest.fixture
def server(llm: TargetLLM) -> Iterator[FakeVLLM]:
    with FakeVLLM(llm) as made:
        yield made


def started_anew(fault: Fault, llm: TargetLLM) -> Fault:
    """A fault after which the server holds another LLM under the same name."""

    def then(handler: Any, events: Any) -> None:
        try:
            fault(handler, events)
        finally:
            handler.server.llm = llm

    return then


def checked(server: FakeVLLM) -> int:
    """Requests of checks so far."""
    return len(server.bodies) - len(server.streamed)


def test_after_a_lost_answer_another_llm_is_found_out(server: FakeVLLM, llm: TargetLLM) -> None:
    generator, plan = client(server), text(llm)
    server.faults = [started_anew(cut_after(2), toy.llm(seed=1))]
    with pytest.raises(GeneratorUnavailableError, match="middle of an answer"):
        list(generator.stream(plan))
    with pytest.raises(GeneratorMismatchError, match="another LLM"):
        generator.stream(plan)
    assert len(server.streamed) == 1
    server.llm = llm  # as it was
    assert generator.generate([plan])[0].token_ids


@pytest.mark.parametrize("fault", [hang_up, cut_after(0), status(502)])
def test_a_try_is_made_again_only_at_the_same_llm(server: FakeVLLM, llm: TargetLLM, fault: Fault) -> None:
    generator = client(server)
    assert generator.generate([concepts(llm)])[0].token_ids and checked(server) == 3
    server.faults = [fault]  # and it is the same afterwards
    assert generator.generate([concepts(llm)])[0].token_ids and checked(server) == 6
    server.faults = [started_anew(fault, toy.llm(seed=1))]
    with pytest.raises(GeneratorMismatchError, match="another LLM"):
        generator.generate([concepts(llm)])
    assert len(server.streamed) == 4


def test_embeddings_are_tried_again_as_well(server: FakeVLLM, llm: TargetLLM) -> None:
    generator = client(server)
    generator.generate([concepts(llm)])
    server.faults = [hang_up]
    server.takes_embeddings = False  # started anew without --enable-prompt-embeds
    assert generator.generate([text(llm)])[0].token_ids
    with pytest.raises(GeneratorMismatchError, match="--enable-prompt-embeds"):
        generator.generate([concepts(llm)])


def test_what_was_silent_for_a_while_is_checked_again(server: FakeVLLM, llm: TargetLLM) -> None:
    patient, wary = client(server), client(server, recheck_s=0.05)
    for generator in (patient, wary):
        generator.generate([text(llm)])
    server.llm = toy.llm(seed=1)
    time.sleep(0.1)
    assert patient.generate([text(llm)])[0].token_ids
    with pytest.raises(GeneratorMismatchError, match="another LLM"):
        wary.generate([text(llm)])


def test_those_who_waited_for_a_check_share_its_failure(llm: TargetLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, begun = [], threading.Event()

    def slow(client: object) -> tuple[str, int]:
        asked.append(time.monotonic())
        begun.set()
        time.sleep(0.3)
        raise GeneratorUnavailableError("the vLLM server does not answer", got="nothing")

    with FakeVLLM(llm) as server:
        generator = client(server)
    monkeypatch.setattr(checks, "served_model", slow)

    def ask(number: int) -> str:
        if number:
            assert begun.wait(10)
        with pytest.raises(GeneratorUnavailableError) as told:
            generator.stream(text(llm))
        return str(told.value)

    with ThreadPoolExecutor(5) as threads:
        assert len({*threads.map(ask, range(5))}) == 1
    assert len(asked) == 1
    ask(0)
    assert len(asked) == 2


def test_tenants_share_all_but_the_prefix_cache(server: FakeVLLM, llm: TargetLLM) -> None:
    first = client(server)
    tenants = [first.apart(), first.apart(), first.apart("ours")]
    for _ in range(2):
        for generator in (first, *tenants):
            assert isinstance(generator, VLLMGenerator) and generator.client is first.client
            generator.generate([text(llm)])
    salts = [body.get("cache_salt") for body in server.streamed]
    assert salts[:4] == salts[4:] and len({*salts}) == 4
    assert salts[0] is None and salts[3] == "ours" and all(len(salt) > 40 for salt in salts[1:3])
    assert checked(server) == 1


@pytest.mark.parametrize("started", [False, True])
def test_more_requests_may_be_allowed_at_a_time(server: FakeVLLM, llm: TargetLLM, started: bool) -> None:
    generator = client(server, concurrency=2)
    if started:
        generator.generate([text(llm)])
    generator.client.allow(1)  # fewer: nothing changes
    generator.client.allow(5)
    server.faults = [wait_after(0)] * 6
    streams = [generator.stream(text(llm)) for _ in range(6)]
    for stream in streams:
        stream.begin()
    deadline = time.monotonic() + 20
    while server.running < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert server.most == 5 and generator.client.settings.concurrency == 5
    for stream in streams:
        stream.end()
    generator.close()
