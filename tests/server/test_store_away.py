"""A server whose concepts lie in a Redis that goes away and comes back: clients are told to come again."""

from __future__ import annotations

from pathlib import Path

import pytest

from compllm_rag import Compressor
from compllm_rag.errors import StoreFullError
from compllm_rag.storage import stores
from tests.faults.fault_samples import create
from tests.redis_servers import RedisProcess
from tests.server.server_samples import DOCUMENTS, QUESTION, client, events, registry


async def test_questions_and_uploads_are_told_to_come_again(
    tmp_path: Path, compressor: Compressor, redis_server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = stores.RedisStore
    monkeypatch.setattr(stores, "RedisStore", lambda *a, **o: make(*a, **{"retry_s": 0.2, **o}))
    create(tmp_path / "s", compressor, concept_store=redis_server.url).close()
    made = registry(tmp_path / "s", compressor)
    try:
        async with client(made) as http:
            assert (await http.post("/v1/documents", json=DOCUMENTS)).status_code == 202
            assert made.get(None).uploads.wait(60)
            assert (await http.get("/v1/queue")).json()["held_up"] is None
            made.get(None).uploads._held_up = StoreFullError("the concept store is full")
            assert (await http.get("/v1/queue")).json()["held_up"] == "storage_full"
            made.get(None).uploads._held_up = None
            redis_server.kill()
            more = {"documents": [{"id": "new.md", "text": "The ferry leaves at seven in the morning."}]}
            for path, body in (("/v1/query", {"query": QUESTION}), ("/v1/documents", more)):
                refused = await http.post(path, json=body)
                error = refused.json()["error"]
                assert (refused.status_code, error["code"]) == (503, "store_unavailable"), path
                assert error["type"] == "overloaded_error" and "Next step" in error["message"]
                assert int(refused.headers["Retry-After"]) > 1
            streamed = await http.post("/v1/query", json={"query": QUESTION, "stream": True})
            name, data = events(streamed.text)[-1]
            assert (name, data["error"]["code"]) == ("error", "store_unavailable")
            assert (await http.post("/v1/query", json={"query": QUESTION, "mode": "text"})).status_code == 200
            redis_server.start()
            assert (await http.post("/v1/query", json={"query": QUESTION})).json()["mode"] == "concepts"
            assert (await http.post("/v1/documents", json=more)).status_code == 202
    finally:
        made.close()
