"""The generator over HTTP against a server that misbehaves: what is tried again, what ends, what is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import toy
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import (
    ConfigurationError,
    GeneratorMismatchError,
    GeneratorRefusedError,
    GeneratorUnavailableError,
    InvalidConceptsError,
    NotTransferableError,
    PromptTooLongError,
)
from compllm_rag.generation.address import check_address, generator_at
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.generation.vllm import VLLMGenerator, VLLMSettings
from compllm_rag.generation.vllm.engine import EngineStream
from compllm_rag.generation.vllm.settings import KEY_VARIABLE
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import ConceptSpan, PromptPlan, TextSpan
from tests.vllm_servers import FakeVLLM, cut_after, either, hang_up, says, status, token, wait_after, whole

LIMIT = 12


@pytest.fixture
def server(llm: TargetLLM) -> Iterator[FakeVLLM]:
    with FakeVLLM(llm) as made:
        yield made


def client(server: FakeVLLM, llm: TargetLLM | None = None, **settings: Any) -> VLLMGenerator:
    quick = {"retries": 3, "longest_wait_s": 0.02, "timeout_s": 20.0}
    config = GenerationConfig(max_new_tokens=LIMIT)
    return VLLMGenerator(server.url, llm or server.llm, config, settings=VLLMSettings(**{**quick, **settings}))


def text(llm: TargetLLM, words: str = toy.TEXT[:100]) -> PromptPlan:
    return PromptPlan((TextSpan(tuple(llm.tokenizer(words, add_special_tokens=False)["input_ids"])),))


def concepts(llm: TargetLLM) -> PromptPlan:
    first = torch.nn.functional.normalize(torch.arange(96.0).reshape(3, 32).sin(), dim=1)
    return PromptPlan((*text(llm).spans, ConceptSpan(first, 0), TextSpan((80, 90))))


@pytest.mark.parametrize("make", [text, concepts])
def test_answers_equal_the_local_ones(server: FakeVLLM, llm: TargetLLM, make: Any) -> None:
    plan, generator = make(llm), client(server)
    there, here = generator.stream(plan), LocalGenerator(llm, generator.config).stream(plan)
    assert list(there) == list(here) and len(here.result.token_ids) > 2
    assert there.result.token_ids == here.result.token_ids and there.result.text == here.result.text
    assert there.result.finish_reason == here.result.finish_reason
    assert there.result.prompt_positions == plan.positions and there.result.reused_positions == 5
    assert there.result.prefill_s > 0 and there.result.layout_s > 0
    [body] = server.streamed
    # A prompt goes as ids or as embeddings, never as both; nothing is left to the model's own settings.
    assert ("prompt" in body) == (make is text) and ("prompt_embeds" in body) == (make is concepts)
    assert {
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 0.0,
    }.items() <= body.items()


def test_a_batch_comes_back_in_its_order_and_is_bounded(server: FakeVLLM, llm: TargetLLM) -> None:
    plans = [text(llm, toy.TEXT[at : at + 40]) for at in range(0, 200, 20)] + [concepts(llm)]
    server.pause_s = 0.01
    made = client(server, concurrency=3).generate(plans)
    assert [one.token_ids for one in made] == [
        one.token_ids for one in LocalGenerator(llm).generate(plans, GenerationConfig(max_new_tokens=LIMIT))
    ]
    assert server.most == 3


def test_a_stop_text_ends_the_answer_at_the_server_too(server: FakeVLLM, llm: TargetLLM) -> None:
    plan = text(llm)
    whole_text = LocalGenerator(llm).stream(plan, GenerationConfig(max_new_tokens=LIMIT))
    stop = "".join(whole_text)[4:6]
    config = GenerationConfig(max_new_tokens=900, stop=(stop,))
    server.pause_s = 0.02
    generator = client(server)
    here = LocalGenerator(llm).stream(plan, config)
    there = generator.stream(plan, config)
    assert "".join(there) == "".join(here) and stop not in there.result.text
    assert (there.result.finish_reason, there.result.token_ids) == ("stop", here.result.token_ids)
    assert server.gone.wait(20)


@pytest.mark.parametrize("fault", [status(503), status(429, Retry_After="0"), hang_up, cut_after(0)])
def test_what_fails_before_the_first_token_is_tried_again(server: FakeVLLM, llm: TargetLLM, fault: Any) -> None:
    server.faults = [fault, fault, whole]
    stream = client(server).stream(text(llm))
    assert "".join(stream) and len(server.streamed) == 3
    assert stream.result.finish_reason in ("stop", "length")


def test_tries_come_to_an_end(server: FakeVLLM, llm: TargetLLM) -> None:
    server.faults = [status(503)] * 9
    with pytest.raises(GeneratorUnavailableError, match=r"status 503.*4 times"):
        list(client(server).stream(text(llm)))
    assert len(server.streamed) == 4


def test_the_wait_that_a_server_asks_for_is_bounded(server: FakeVLLM, llm: TargetLLM) -> None:
    server.faults = [status(429, Retry_After="3600")]
    begun = time.monotonic()
    assert "".join(client(server).stream(text(llm))) and time.monotonic() - begun < 15


@pytest.mark.parametrize("fault", [cut_after(2), says(token(5), token(6))])
def test_nothing_is_tried_again_after_the_first_token(server: FakeVLLM, llm: TargetLLM, fault: Any) -> None:
    server.faults = [fault]
    stream = client(server).stream(text(llm))
    with pytest.raises(GeneratorUnavailableError, match="middle of an answer"):
        list(stream)
    assert len(server.streamed) == 1 and len(stream.result.token_ids) == 2
    assert stream.result.finish_reason == "cancelled"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (status(400, "no such thing"), "no such thing"),
        (status(404, "gone"), "another model"),
        (says({"error": {"message": "engine died"}}), "engine died"),
        (says("{"), "makes no sense"),
        (says({"choices": [{"text": "a"}]}), "makes no sense"),
        (says(token(5, "abort")), "abort"),
        (says(token(5), "[DONE]"), "no end"),
        (says("x" * (3 << 20)), "makes no sense"),
    ],
)  # fmt: skip
def test_nonsense_and_refusals_are_errors_at_once(server: FakeVLLM, llm: TargetLLM, fault: Any, told: str) -> None:
    server.faults = [fault]
    with pytest.raises(GeneratorRefusedError, match=told):
        list(client(server).stream(text(llm)))
    assert len(server.streamed) == 1


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_cancelled_answer_ends_at_the_server(server: FakeVLLM, llm: TargetLLM, tokens: int) -> None:
    server.faults = [wait_after(tokens)]
    cancel = threading.Event()
    stream = client(server).stream(text(llm), cancel=cancel)
    threading.Timer(0.3, cancel.set).start()
    list(stream)
    assert server.gone.wait(20)
    assert stream.result.finish_reason == "cancelled" and len(stream.result.token_ids) == tokens


def test_a_stream_that_is_left_ends_at_the_server(server: FakeVLLM, llm: TargetLLM) -> None:
    server.faults = [wait_after(3)]
    stream = client(server).stream(text(llm))
    pieces = iter(stream)
    next(pieces)
    pieces.close()
    assert server.gone.wait(20) and stream.result.finish_reason == "cancelled"


def test_one_that_fails_ends_the_batch(server: FakeVLLM, llm: TargetLLM) -> None:
    server.faults = [status(400, "no"), wait_after(1), wait_after(1)]
    with pytest.raises(GeneratorRefusedError, match="no"):
        client(server, concurrency=3).generate([text(llm)] * 3)
    assert server.gone.wait(20)


def test_one_that_breaks_after_some_tokens_ends_the_batch_too(server: FakeVLLM, llm: TargetLLM) -> None:
    """The first of them is waited for while the last one's tokens, then its failure, lie there untaken."""
    plans = [text(llm), text(llm, toy.TEXT[50:120])]
    server.faults = [either(list(plans[1].spans[0].ids), cut_after(2), wait_after(1))] * 2
    with pytest.raises(GeneratorUnavailableError, match="middle of an answer"):
        client(server, concurrency=2).generate(plans)
    assert server.gone.wait(20)


def test_settings_of_the_environment_that_cannot_be_used_are_said_each_time(
    server: FakeVLLM, llm: TargetLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = client(server)
    with monkeypatch.context() as patched:
        patched.setenv("ALL_PROXY", "nothing://x:1")
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="no connection to a vLLM server.*ALL_PROXY"):
                generator.generate([text(llm)])
    assert generator.generate([text(llm)])[0].token_ids


def test_a_key_that_can_be_none_is_refused_and_not_shown(
    server: FakeVLLM, llm: TargetLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-1\n")  # a secret from a file
    assert VLLMSettings.from_environment().api_key.get_secret_value() == "sk-1"
    for wrong in ("sk-\nsecret", "sk-sécret", "sk-\tsecret"):
        monkeypatch.setenv(KEY_VARIABLE, wrong)
        with pytest.raises(ConfigurationError, match=KEY_VARIABLE) as caught:
            VLLMGenerator(server.url, llm)
        assert "cret" not in str(caught.value)
        with pytest.raises(ValidationError) as refused:
            VLLMSettings(api_key=wrong)
        assert "cret" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://", "127.0.0.1:8000", "ftp://x", "http://[::1"])
def test_what_is_no_address_is_refused(llm: TargetLLM, url: str) -> None:
    with pytest.raises(ConfigurationError, match="no address of a server"):
        VLLMGenerator(url, llm)


def test_a_schema_that_is_no_json_is_refused(server: FakeVLLM, llm: TargetLLM) -> None:
    with pytest.raises(ConfigurationError, match="schema of the answer"):
        client(server).generate([text(llm)], GenerationConfig(json_schema="{"))


@pytest.mark.parametrize("told", ["error", "abort", "stop", "length"])
def test_the_engine_of_this_process_says_when_it_gave_up(llm: TargetLLM, told: str) -> None:
    engine = SimpleNamespace(tokenizer=llm.tokenizer, stop_ids=[], run=lambda plans, config: [(0, [5], told, 0)])
    stream = EngineStream(engine, [text(llm)], GenerationConfig(), None)
    if told in ("error", "abort"):
        with pytest.raises(GeneratorRefusedError, match=f"gave up.*{told}"):
            list(stream)
        assert stream.result.finish_reason == "cancelled"
    else:
        list(stream)
        assert stream.result.finish_reason == told


def test_silence_is_bounded(server: FakeVLLM, llm: TargetLLM) -> None:
    generator = client(server, timeout_s=0.4)
    generator.generate([text(llm)])  # checked by now
    for n, told in ((0, "too long"), (1, "middle of an answer")):
        server.faults = [wait_after(n)]
        with pytest.raises(GeneratorUnavailableError, match=told):
            list(generator.stream(text(llm)))
    assert len(server.streamed) == 3


def test_no_server_is_said_with_what_to_do(llm: TargetLLM) -> None:
    with FakeVLLM(llm) as server:
        generator = client(server, retries=1)
    with pytest.raises(GeneratorUnavailableError, match=r"2 times.*vllm serve MODEL --enable"):
        generator.generate([text(llm)])


def test_the_server_must_run_the_same_llm(server: FakeVLLM) -> None:
    other = client(server, toy.llm(seed=1))
    with pytest.raises(GeneratorMismatchError, match="another LLM.*models export"):
        other.generate([text(other.llm)])
    assert not server.streamed


def test_its_model_is_found_by_name(server: FakeVLLM, llm: TargetLLM) -> None:
    server.served = {"a": 64, "b": 1024}
    with pytest.raises(GeneratorMismatchError, match="several models.*a, b"):
        _ = client(server).window
    with pytest.raises(GeneratorMismatchError, match="another model.*a, b.*expected c"):
        client(server, model="c").generate([text(llm)])
    assert client(server, model="a").window == 64
    client(server, model="b").generate([text(llm)])
    assert server.streamed[0]["model"] == "b"


def test_a_server_without_embeddings_still_reads_text(server: FakeVLLM, llm: TargetLLM) -> None:
    server.takes_embeddings = False
    generator = client(server)
    assert generator.generate([text(llm)])[0].token_ids
    with pytest.raises(GeneratorMismatchError, match="--enable-prompt-embeds"):
        generator.generate([concepts(llm)])
    server.takes_embeddings = True  # it was started anew: asked again, since nothing was found good
    assert generator.generate([concepts(llm)])[0].token_ids


def test_it_is_checked_once(server: FakeVLLM, llm: TargetLLM) -> None:
    generator = client(server)
    generator.generate([concepts(llm), text(llm)])
    generator.generate([concepts(llm)])
    assert len(server.bodies) - len(server.streamed) == 3


def test_what_does_not_fit_is_refused_before_it_is_sent(server: FakeVLLM, llm: TargetLLM) -> None:
    server.served = {"toy": 40}
    with pytest.raises(PromptTooLongError, match="max-model-len"):
        client(server).stream(text(llm, toy.TEXT))
    server.served = {"toy": 1024}
    with pytest.raises(PromptTooLongError, match="max_payload_bytes"):
        client(server, max_payload_bytes=5000).stream(concepts(llm))
    wide = PromptPlan((ConceptSpan(torch.zeros(2, 16), 0), TextSpan((5,))))
    with pytest.raises(InvalidConceptsError, match="width 16"):
        client(server).generate([wide])
    assert not server.streamed


def test_deep_concepts_are_refused_with_a_way_out(server: FakeVLLM, llm: TargetLLM) -> None:
    deep = ConceptSpan(torch.zeros(2, 32), 0, places=torch.tensor([0, 1]), n_tokens=2)
    with pytest.raises(ConfigurationError, match="--codec input"):
        client(server).stream(PromptPlan((deep, TextSpan((5,)))))
    assert not server.bodies


def test_settings_are_sent_or_refused(server: FakeVLLM, llm: TargetLLM) -> None:
    generator = client(server, cache_salt="ours", api_key="secret")
    config = GenerationConfig(max_new_tokens=3, temperature=0.5, top_p=0.9, top_k=7, seed=11, json_schema='{"a": 1}')
    list(generator.stream(text(llm), config))
    sent = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 11, "cache_salt": "ours", "max_tokens": 3}
    assert sent.items() <= server.streamed[0].items()
    assert server.streamed[0]["structured_outputs"] == {"json": {"a": 1}}
    assert server.keys == ["Bearer secret"] and "secret" not in repr(generator.client.settings)
    with pytest.raises(ConfigurationError, match="repetition"):
        generator.stream(text(llm), GenerationConfig(repetition_penalty=1.2))


def test_after_close_it_goes_on_anew_and_it_is_not_carried_away(server: FakeVLLM, llm: TargetLLM) -> None:
    generator = client(server)
    first = generator.generate([text(llm)])
    generator.close()
    assert generator.generate([text(llm)])[0].token_ids == first[0].token_ids
    with pytest.raises(NotTransferableError):
        generator.__reduce_ex__(2)


def test_an_address_names_it(server: FakeVLLM, llm: TargetLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    server.served = {"a": 1024, "b": 1024}
    monkeypatch.setenv("COMPLLM_VLLM_API_KEY", "from outside")
    made = generator_at(f"vllm:{server.url}/#b", llm, GenerationConfig(max_new_tokens=2))
    assert made.generate([text(llm)])[0].token_ids and server.streamed[0]["model"] == "b"
    assert server.keys == ["Bearer from outside"]
    for wrong in ("vllm", "vllm:", "vllm:127.0.0.1:8001", "http://127.0.0.1:8001", "tgi:http://a", "vllm:http://a:b"):
        with pytest.raises(ConfigurationError, match="no such generator"):
            check_address(wrong)
    with pytest.raises(ConfigurationError, match="COMPLLM_VLLM_API_KEY"):
        check_address("vllm:http://me:word@host")
