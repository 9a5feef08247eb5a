"""The HTTP server with a vLLM server behind it, which comes and goes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import toy
from compllm_rag import ConceptIndex
from compllm_rag.compression.compressor import Compressor
from compllm_rag.errors import ConfigurationError
from compllm_rag.generation.vllm import VLLMGenerator
from compllm_rag.prompt import PromptPlan, TextSpan
from compllm_rag.server.registry import Registry
from tests.server.server_samples import DOCUMENTS, QUESTION, client, registry
from tests.vllm_servers import FakeVLLM, status
from toy_embedder import HashEmbedder
from trained import trained_deep


@pytest.fixture
def vllm() -> Iterator[FakeVLLM]:
    with FakeVLLM(toy.llm()) as made:
        yield made


async def test_answers_come_from_it_for_every_namespace(tmp_path: Path, vllm: FakeVLLM) -> None:
    made = registry(tmp_path / "s", Compressor(toy.llm()), generator=f"vllm:{vllm.url}")
    other = made.get("other", create=True)
    assert isinstance(other.generator, VLLMGenerator) and other.generator.client is made.get(None).generator.client
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


async def test_no_tenant_learns_from_the_time_what_another_asked(tmp_path: Path, vllm: FakeVLLM) -> None:
    address, compressor = f"vllm:{vllm.url}", Compressor(toy.llm())
    made = registry(tmp_path / "s", compressor, generator=address)
    salts: dict[str, set[str]] = {"default": set(), "acme": set(), "evil": set()}
    async with client(made) as asking:
        for name in (*salts, *salts):
            head = {"x-namespace": name}
            assert (await asking.post("/v1/documents", json=DOCUMENTS, headers=head)).status_code == 202
            for path, body in (("query", {"query": QUESTION, "mode": "text"}), ("chat", {"message": QUESTION})):
                before = len(vllm.streamed)
                answered = await asking.post(f"/v1/{path}", json=body, headers=head)
                assert answered.status_code == 200, answered.text
                salts[name] |= {body["cache_salt"] for body in vllm.streamed[before:]}
    assert all(len(own) == 1 for own in salts.values()) and len(set.union(*salts.values())) == 3
    made.close()
    again = registry(tmp_path / "s", compressor, generator=address)  # a secret of the process as well
    again.get("acme").generator.generate([PromptPlan((TextSpan((5, 6)),))])
    assert vllm.streamed[-1]["cache_salt"] not in set.union(*salts.values())
    again.close()


def test_as_many_answers_at_a_time_as_the_server_makes(tmp_path: Path, vllm: FakeVLLM) -> None:
    compressor = Compressor(toy.llm())
    for generations, allowed in ((20, 20), (2, 8)):
        settings = {"generations": generations}
        made = registry(tmp_path / str(generations), compressor, generator=f"vllm:{vllm.url}", settings=settings)
        for index in (made.get(None), made.get("other", create=True)):
            assert index.generator.client.settings.concurrency == allowed
        made.close()


def test_narrowing_is_refused_before_the_start(tmp_path: Path, vllm: FakeVLLM) -> None:
    options = {"generator": f"vllm-deep:{vllm.url}", "reading": {"narrowing": "3:0.1"}}
    with pytest.raises(ConfigurationError, match="generator cannot narrow a prompt"):
        registry(tmp_path / "s", trained_deep(toy.llm(layers=4)), **options)


def test_concepts_that_vllm_cannot_read_are_refused_before_the_start(tmp_path: Path, vllm: FakeVLLM) -> None:
    deep, flat = trained_deep(toy.llm(layers=4)), Compressor(toy.llm())
    for generator, compressor, told in (
        (f"vllm:{vllm.url}", deep, r"ordinary vLLM cannot read deep.*--codec input.*vllm-deep:"),
        (f"vllm-deep:{vllm.url}", flat, r"no deep concepts.*give vllm: in place"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            registry(tmp_path / "new", compressor, generator=generator)
        assert not (tmp_path / "new").exists()
    # It is so for one namespace among several, and for one that comes later.
    made = registry(tmp_path / "s", flat, generator=f"vllm:{vllm.url}")
    ConceptIndex.create(tmp_path / "s", namespace="deep", compressor=deep, embedder=HashEmbedder()).close()
    with pytest.raises(ConfigurationError, match="cannot read deep concepts"):
        made.get("deep")
    made.close()
    with pytest.raises(ConfigurationError, match="cannot read deep concepts"):
        registry(tmp_path / "s", flat, generator=f"vllm:{vllm.url}")
    registry(tmp_path / "s", flat).close()


def test_what_is_made_is_what_vllm_reads(tmp_path: Path, toy_folder: Path) -> None:
    own = {"llm": str(toy_folder), "embedder": HashEmbedder(), "codec": None}
    for kind, entry_layer in (("vllm", 0), ("vllm-deep", 1)):
        address = f"{kind}:http://127.0.0.1:1"  # nothing is asked of it
        made = Registry(tmp_path / kind, create=own, generator=address, embedder=HashEmbedder())
        made.start()
        assert made.get(None).manifest.entry_layer == entry_layer
        made.close()
    address = "vllm:http://127.0.0.1:1"
    with pytest.raises(ConfigurationError, match="cannot read deep concepts"):
        Registry(tmp_path / "x", create={**own, "codec": "deep"}, generator=address).start()
    with pytest.raises(ConfigurationError, match="cannot read deep concepts"):
        Registry(tmp_path / "vllm-deep", create=own, generator=address, embedder=HashEmbedder()).start()
    assert not (tmp_path / "x").exists()
