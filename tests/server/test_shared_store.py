"""The HTTP server over concepts in Redis, which is away at times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import toy
from compllm_rag.cli.main import app
from compllm_rag.errors import StorageMismatchError
from compllm_rag.server.registry import Registry
from compllm_rag.storage import stores
from compllm_rag.store import RedisStore
from tests.redis_servers import RedisProcess
from tests.server.server_samples import DOCUMENTS, QUESTION, client, registry
from toy_embedder import HashEmbedder, save_sentence_transformer
from trained import trained_deep


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is away is given up soon."""
    make = stores.RedisStore
    monkeypatch.setattr(stores, "RedisStore", lambda *a, **o: make(*a, **{"retry_s": 0.5, **o}))


@pytest.fixture(scope="module")
def compressor() -> Any:
    return trained_deep(toy.llm(layers=4))


def opened(folder: Path, compressor: Any, url: str) -> Registry:
    own = {"compressor": compressor, "embedder": HashEmbedder(), "concept_store": url}
    made = Registry(folder, create={**own, "chunk_size": 60}, **own)
    made.start()
    return made


async def test_all_namespaces_keep_their_concepts_there(
    tmp_path: Path, compressor: Any, redis_server: RedisProcess
) -> None:
    made = opened(tmp_path / "s", compressor, redis_server.url)
    async with client(made) as asking:
        for name in ("default", "acme"):
            head = {"x-namespace": name}
            assert (await asking.post("/v1/documents", json=DOCUMENTS, headers=head)).status_code == 202
            index = made.get(name)
            assert index.uploads.wait(60) and isinstance(index.store, RedisStore) and index.store.stats().records > 0
    assert not (tmp_path / "s" / "concepts").exists()
    made.close()
    again = opened(tmp_path / "s", compressor, redis_server.url)
    async with client(again) as asking:
        body = {"query": QUESTION, "max_tokens": 2}
        head = {"x-namespace": "acme"}
        assert (await asking.post("/v1/query", json=body, headers=head)).json()["citations"][0]["mode"] == "concepts"
        redis_server.kill()
        gone = await asking.post("/v1/query", json=body, headers=head)
        assert (gone.status_code, gone.json()["error"]["code"]) == (503, "store_unavailable")
        assert gone.headers["retry-after"] == "10"
    again.close()


def test_a_storage_of_its_own_concepts_is_not_taken_for_a_shared_one(tmp_path: Path, compressor: Any) -> None:
    registry(tmp_path / "s", compressor).close()
    with pytest.raises(StorageMismatchError, match="keeps its concepts in its own folder"):
        opened(tmp_path / "s", compressor, "redis://127.0.0.1:1/0")


def test_on_the_command_line(tmp_path: Path, toy_folder: Path) -> None:
    embedder = save_sentence_transformer(tmp_path / "embedder", toy.TEXT)
    models = ["--llm", str(toy_folder), "--embedder", str(embedder)]
    words = ["serve", str(tmp_path / "s"), "--port", "0", "--create", *models]
    told = CliRunner().invoke(app, [*words, "--concept-store", "ftp://127.0.0.1"])
    assert told.exit_code == 2 and "kind of concept store is not known" in told.stderr, told.output
