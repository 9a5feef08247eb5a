"""The routes of the HTTP server, asked without a network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

import toy
from compllm_rag.server.registry import Registry
from tests.server.server_samples import DOCUMENTS, QUESTION, client, events, registry
from trained import trained_deep


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return registry(tmp_path_factory.mktemp("server") / "s", trained_deep(toy.llm(layers=4)))


@pytest.fixture
async def asking(made: Registry) -> AsyncIterator[httpx.AsyncClient]:
    async with client(made) as asking:
        await asking.post("/v1/documents", json=DOCUMENTS)
        made.get(None).uploads.wait(60)
        yield asking


async def test_a_document_comes_is_listed_and_goes(asking: httpx.AsyncClient) -> None:
    text = "The ferry leaves at seven. Ada Marsh never took it."
    came = await asking.post("/v1/documents", json={"documents": [{"id": "a/ferry 1.md", "text": text}]})
    assert came.status_code == 202
    body = came.json()
    assert (body["documents"], body["changed"], body["chunks"]) == (["a/ferry 1.md"], 1, 1)
    for _ in range(500):
        job = (await asking.get(f"/v1/jobs/{body['job_id']}")).json()
        if job["state"] == "ready":
            break
        await asyncio.sleep(0.02)
    assert job == {
        "job_id": body["job_id"], "state": "ready", "documents": ["a/ferry 1.md"], "chunks": 1, "chunks_waiting": 0,
        "chunks_failed": 0,
    }  # fmt: skip
    listed = (await asking.get("/v1/documents")).json()
    assert [one["id"] for one in listed["documents"]] == ["a/ferry 1.md", "rock.md"]
    assert listed["documents"][1] == {
        "id": "rock.md", "title": "Gull Rock", "state": "ready", "chunks": listed["documents"][1]["chunks"],
        "chunks_waiting": 0,
    }  # fmt: skip
    assert (listed["total"], listed["next_after"]) == (2, None)
    first = (await asking.get("/v1/documents", params={"limit": 1})).json()
    assert first["next_after"] == "a/ferry 1.md"
    rest = (await asking.get("/v1/documents", params={"limit": 1, "after": first["next_after"]})).json()
    assert ([one["id"] for one in rest["documents"]], rest["next_after"]) == (["rock.md"], None)
    one = (await asking.get("/v1/documents/a/ferry%201.md", params={"text": True})).json()
    assert [node["text"] for node in one["nodes"]] == [text]
    assert one["nodes"][0]["n_concepts"] == one["nodes"][0]["n_tokens"] > 0
    gone = await asking.delete("/v1/documents/a%2Fferry%201.md")
    assert gone.json() == {"id": "a/ferry 1.md", "deleted": True}
    for answer in (await asking.get("/v1/documents/a/ferry 1.md"), await asking.delete("/v1/documents/a/ferry 1.md")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_such_document")


async def test_replacing(asking: httpx.AsyncClient) -> None:
    for text in ("The old ferry.", "The new ferry."):
        came = await asking.put("/v1/documents/x/y", json={"text": text, "title": "Ferry", "metadata": {"year": 2}})
        assert (came.status_code, came.json()["changed"], came.json()["chunks_added"]) == (202, 1, 1)
    again = await asking.put("/v1/documents/x/y", json={"text": text, "title": "Ferry", "metadata": {"year": 2}})
    assert again.json()["changed"] == again.json()["chunks_added"] == 0
    one = (await asking.get("/v1/documents/x/y?text=true")).json()
    assert (one["title"], one["metadata"], [n["text"] for n in one["nodes"]]) == ("Ferry", {"year": 2}, [text])
    await asking.delete("/v1/documents/x/y")


async def test_files(asking: httpx.AsyncClient) -> None:
    given = [
        ("files", ("notes/rock.md", b"# The rock\n\nGulls nest on it.", "text/markdown")),
        ("files", ("photo.heic", b"\x00\x01", "image/heic")),
        ("files", ("rows.jsonl", b'{"id": "r1", "text": "One boat."}\nno json\n', "application/json")),
        ("files", ("empty.txt", b"  \n", "text/plain")),
    ]
    came = await asking.post("/v1/documents", files=given)
    assert came.status_code == 202, came.text
    assert came.json()["documents"] == ["notes/rock.md", "r1"]
    assert [one["name"] for one in came.json()["skipped"]] == ["photo.heic", "rows.jsonl:2", "empty.txt"]
    one = (await asking.get("/v1/documents/notes/rock.md")).json()
    assert one["title"] == "The rock"
    for name in ("notes/rock.md", "r1"):
        assert (await asking.delete(f"/v1/documents/{name}")).status_code == 200
    none = await asking.post("/v1/documents", files=given[1:2])
    assert (none.status_code, none.json()["error"]["code"]) == (400, "empty_document")
    twice = await asking.post("/v1/documents", files=[given[0], given[0]])
    assert twice.status_code == 422
    odd = await asking.post("/v1/documents", files=[("file", ("a.md", b"text", "text/plain"))])
    assert (odd.status_code, odd.json()["error"]["param"]) == (422, "files")


@pytest.mark.parametrize("mode", ["concepts", "text"])
async def test_a_question_whole_and_as_events(asking: httpx.AsyncClient, mode: str) -> None:
    body = {"query": QUESTION, "mode": mode, "top_k": 2, "max_tokens": 6}
    whole = (await asking.post("/v1/query", json=body)).json()
    streamed = await asking.post("/v1/query", json={**body, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    told = events(streamed.text)
    names = [name for name, _ in told]
    assert names == ["retrieved", "plan", *["token"] * names.count("token"), "done"]
    retrieved, plan, done = told[0][1], told[1][1], told[-1][1]
    assert [node["number"] for node in retrieved["nodes"]] == [1, 2]
    assert retrieved["nodes"][0]["document_id"] == "rock.md" and "lighthouse" in retrieved["nodes"][0]["text"]
    assert {node["mode"] for node in plan["nodes"]} == {mode}
    assert "".join(data["text"] for name, data in told if name == "token") == done["answer"] == whole["answer"] != ""
    assert [c["node_id"] for c in done["citations"]] == [n["node_id"] for n in retrieved["nodes"]]
    assert done["positions"] == plan["positions"] and done["kv_bytes"] == plan["kv_bytes"]
    if mode == "text":
        assert (plan["prefill_cost"], plan["kv_bytes"]) == (1.0, plan["text_kv_bytes"])
    else:
        assert plan["prefill_cost"] < 1 and plan["kv_bytes"] < plan["text_kv_bytes"]
        assert {node["prefill_cost"] for node in plan["nodes"]} == {0.5}
    assert 0 < done["ttft_s"] <= done["timings"]["total_s"]
    assert whole["new_tokens"] <= 6
    assert whole["session_id"] is None


async def test_nothing_found(tmp_path: Path) -> None:
    empty = registry(tmp_path / "s", trained_deep(toy.llm(layers=4)))
    async with client(empty) as asking:
        said = await asking.post("/v1/query", json={"query": QUESTION, "stream": True})
        assert [name for name, _ in events(said.text)] == ["retrieved", "done"]
        assert events(said.text)[-1][1]["answer"] == ""
        said = (await asking.post("/v1/chat", json={"message": QUESTION})).json()
        assert (said["citations"], said["positions"]) == ([], 0)
    empty.close()


async def test_options_of_decoding_are_heeded_or_refused(asking: httpx.AsyncClient) -> None:
    async def ask(**options: object) -> httpx.Response:
        return await asking.post("/v1/query", json={"query": QUESTION, "max_tokens": 6, **options})

    drawn = [(await ask(temperature=1.5, seed=seed)).json()["answer"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = (await ask()).json()["answer"]
    assert (await ask(seed=5)).json()["answer"] == greedy
    short = (await ask(stop=greedy[2])).json()
    assert short["answer"] == greedy[: greedy.index(greedy[2])] and short["finish_reason"] == "stop"
    for wrong in (
        {"max_tokens": 100_000}, {"top_p": 0.5}, {"stop": [""]}, {"mode": "vectors"}, {"top_k": 0}, {"query": ""},
        {"embedding": [0.1]}, {"prompt_embeds": "x"}, {"query": "\ud800"}, {"query": "   "},
    ):  # fmt: skip
        refused = await asking.post(
            "/v1/query", content=__import__("json").dumps({"query": QUESTION, **wrong}),
            headers={"content-type": "application/json"},
        )  # fmt: skip
        assert refused.status_code == 422, (wrong, refused.text)
        assert refused.json()["error"]["type"] == "invalid_request_error"


async def test_kept_tokens(asking: httpx.AsyncClient) -> None:
    nodes = (await asking.get("/v1/documents/rock.md?text=true")).json()["nodes"]
    kept = (await asking.get(f"/v1/nodes/{nodes[0]['node_id']}/kept")).json()
    assert "".join(token["text"] for token in kept["tokens"]) == nodes[0]["text"]
    assert (kept["kind"], kept["state"], kept["entry_layer"], kept["rate"]) == ("deep", "ready", 2, 1.0)
    assert sum(token["kept"] for token in kept["tokens"]) == kept["n_concepts"] == nodes[0]["n_concepts"]
    missing = await asking.get("/v1/nodes/nothing/kept")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "no_such_node")


async def test_a_conversation(asking: httpx.AsyncClient) -> None:
    first = (await asking.post("/v1/chat", json={"message": QUESTION, "max_tokens": 4})).json()
    assert (first["turns"], first["question"]) == (0, QUESTION) and first["citations"]
    name = first["session_id"]
    body = {"message": "And who was she?", "session_id": name, "stream": True, "max_tokens": 4}
    second = events((await asking.post("/v1/chat", json=body)).text)
    assert [each for each, _ in second][:2] == ["retrieved", "plan"]
    assert (second[-1][1]["turns"], second[-1][1]["session_id"]) == (1, name)
    assert (await asking.delete(f"/v1/chat/{name}")).json() == {"id": name, "deleted": True}
    for answer in (await asking.post("/v1/chat", json=body), await asking.delete(f"/v1/chat/{name}")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_such_session")


async def test_about(asking: httpx.AsyncClient) -> None:
    info = (await asking.get("/v1/info")).json()
    assert (info["namespace"], info["kind"], info["depth"], info["may_write"]) == ("default", "deep", 4, True)
    assert ".md" in info["file_types"] and info["documents"] == 1
    assert (await asking.get("/health")).json() == (await asking.get("/ready")).json() == {"status": "ok"}
    queue = (await asking.get("/v1/queue")).json()
    assert (queue["documents_waiting"], queue["generations_running"], queue["generations_limit"]) == (0, 0, 32)
    await asking.post("/v1/query", json={"query": QUESTION})
    text = (await asking.get("/metrics")).text
    assert 'compllm_server_requests_total{method="POST",route="/v1/query",status="200"}' in text
    assert 'namespace="default"' in text
    assert len({line for line in text.splitlines() if line.startswith("# TYPE")}) == text.count("# TYPE")
    for path in ("/docs", "/v1/nothing"):
        nothing = await asking.get(path)
        assert nothing.status_code == 404, path


async def test_headers_and_errors(asking: httpx.AsyncClient) -> None:
    answer = await asking.get("/v1/documents")
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    assert answer.headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in answer.headers
    for method, path in (("PATCH", "/v1/queue"), ("GET", "/v1/query"), ("POST", "/"), ("POST", "/health")):
        refused = await asking.request(method, path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (405, "method_not_allowed"), path
    for method, path in (("POST", "/v1/embeddings"), ("GET", "/v1/embeddings"), ("GET", "/index.htm"), ("GET", "/a/b")):
        refused = await asking.request(method, path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "no_such_route"), path
    for path in ("/", "/health", "/ready"):
        assert (await asking.head(path)).status_code == 200, path
    wrong = await asking.post("/v1/documents", content=b"text", headers={"content-type": "text/plain"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (415, "unsupported_media_type")
    for body in (b"{", b'"x"', b"[" * 100_000, b'{"documents": []}', b'{"documents": [{"text": "x", "vector": [1]}]}'):
        wrong = await asking.post("/v1/documents", content=body, headers={"content-type": "application/json"})
        assert wrong.status_code == 422, body[:40]
    secret = await asking.post("/v1/query", json={"query": "secret words", "top_k": "secret"})
    assert "secret" not in secret.text
