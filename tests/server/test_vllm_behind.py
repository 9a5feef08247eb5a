"""The HTTP server with a vLLM server behind it, which comes and goes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.errors import ConfigurationError
from compllm_rag.generation.vllm import VLLMGenerator
from tests.server.server_samples import DOCUMENTS, QUESTION, client, registry
from tests.vllm_servers import FakeVLLM, status
from trained import trained_deep


@pytest.fixture
def vllm() -> Iterator[FakeVLLM]:
    with FakeVLLM(toy.llm()) as made:
        yield made


async def test_answers_come_from_it_for_every_namespace(tmp_path: Path, vllm: FakeVLLM) -> None:
    made = registry(tmp_path / "s", Compressor(toy.llm()), generator=f"vllm:{vllm.url}")
    other = made.get("other", create=True)
    assert isinstance(other.generator, VLLMGenerator) and other.generator is made.get(None).generator
    async with client(made) as asking:
        await asking.post("/v1/documents", json=DOCUMENTS)
        made.get(None).uploads.wait(60)
        for mode in ("concepts", "text"):
            answered = await asking.post("/v1/query", json={"query": QUESTION, "mode": mode, "stream": False})
            assert answered.status_code == 200, answered.text
            assert ("prompt_embeds" in vllm.streamed[-1]) == (mode == "concepts")
        made.get(None).generator.client.settings = made.get(None).generator.client.settings.model_copy(
            update={"retries": 0}
        )
        vllm.faults = [status(503)]
        refused = await asking.post("/v1/query", json={"query": QUESTION, "stream": False})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "generator_unavailable")
        assert refused.headers["retry-after"] == "5"
        again = await asking.post("/v1/query", json={"query": QUESTION, "stream": False})
        assert again.status_code == 200
    made.close()


@pytest.mark.parametrize("kind", ["vllm", "vllm-deep"])
def test_what_vllm_cannot_do_is_refused_before_the_start(tmp_path: Path, vllm: FakeVLLM, kind: str) -> None:
    reading = {"narrowing": "3:0.1"}
    with pytest.raises(ConfigurationError, match="generator cannot narrow a prompt"):
        registry(tmp_path / "s", trained_deep(toy.llm(layers=4)), generator=f"{kind}:{vllm.url}", reading=reading)
