"""Keys, namespaces, origins, rates and sizes: who is let in, and what stays out of the log."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

import toy
from compllm_rag.errors import ConfigurationError, UnsupportedFormatError
from compllm_rag.server import gate
from compllm_rag.server.app import create_app
from compllm_rag.server.gate import accepted_hosts
from compllm_rag.server.keys import KeyFile
from compllm_rag.server.limits import RateLimit
from compllm_rag.server.registry import Registry
from compllm_rag.server.serving import checked_keys, is_loopback
from tests.server.server_samples import DOCUMENTS, QUESTION, client, registry
from trained import trained_deep


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return registry(tmp_path_factory.mktemp("gate") / "s", trained_deep(toy.llm(layers=4)))


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_file_of_keys_holds_digests(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    alice, bob = keys.add("alice", "acme"), keys.add("bob", rights="read")
    text = keys.path.read_text()
    assert alice not in text and bob not in text and len(alice) > 40
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    found = KeyFile(keys.path).find(alice)
    assert found is not None and (found.name, found.namespace, found.rights) == ("alice", "acme", "write")
    assert keys.find(alice[:-1]) is None and keys.find("") is None and keys.find("x" * 10_000) is None
    with pytest.raises(ConfigurationError, match="there is a key of this name"):
        keys.add("alice")
    with pytest.raises(ConfigurationError, match="namespace"):
        keys.add("carol", "")
    other = KeyFile(keys.path)
    other.remove("alice")
    assert keys.find(alice) is None  # without being told
    with pytest.raises(ConfigurationError, match=r"no key of this name.*expected 'bob'"):
        keys.remove("alice")
    keys.path.write_text('{"keys": "all"}')
    with pytest.raises(UnsupportedFormatError, match="no file of API keys"):
        KeyFile(keys.path)


def test_who_may_listen_where(tmp_path: Path) -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org")] == [False] * 4
    assert checked_keys(None, "127.0.0.1") is None
    with pytest.raises(ConfigurationError, match="loopback address only.*--api-keys FILE"):
        checked_keys(None, "0.0.0.0")
    with pytest.raises(ConfigurationError, match="holds no API keys"):
        checked_keys(tmp_path / "keys.json", "127.0.0.1")
    KeyFile(tmp_path / "keys.json").add("alice")
    assert checked_keys(tmp_path / "keys.json", "0.0.0.0") is not None


async def test_each_key_has_its_namespace_and_rights(made: Registry, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    names = {"alice": ("acme", "write"), "eve": ("evil", "write"), "bob": ("acme", "read"), "watch": ("x", "metrics")}
    sent = {who: {"authorization": f"Bearer {keys.add(who, *given)}"} for who, given in names.items()}
    async with client(made, keys=keys) as asking:
        for path in ("/v1/documents", "/v1/models", "/metrics", "/v1/nothing"):
            assert code(await asking.get(path)) == (401, "missing_key")
            assert code(await asking.get(path, headers={"authorization": "Bearer crag-x"})) == (401, "unknown_key")
            assert (await asking.get(path)).headers["www-authenticate"] == "Bearer"
        assert (await asking.get("/health")).status_code == (await asking.get("/ready")).status_code == 200
        assert code(await asking.get("/v1/documents", headers=sent["eve"])) == (404, "no_such_namespace")
        assert (await asking.post("/v1/documents", json=DOCUMENTS, headers=sent["alice"])).status_code == 202
        for who, n in (("alice", 1), ("bob", 1)):
            assert (await asking.get("/v1/documents", headers=sent[who])).json()["total"] == n
        assert (await asking.post("/v1/documents", json=DOCUMENTS, headers=sent["eve"])).status_code == 202
        await asking.delete("/v1/documents/rock.md", headers=sent["eve"])
        assert (await asking.get("/v1/documents", headers=sent["eve"])).json()["total"] == 0
        assert (await asking.get("/v1/documents/rock.md", headers=sent["bob"])).status_code == 200
        said = await asking.post("/v1/query", json={"query": QUESTION, "max_tokens": 2}, headers=sent["bob"])
        assert said.json()["citations"]
        for method, path, body in (
            ("POST", "/v1/documents", DOCUMENTS), ("PUT", "/v1/documents/x", {"text": "x"}),
            ("DELETE", "/v1/documents/rock.md", None),
        ):  # fmt: skip
            refused = await asking.request(method, path, json=body, headers=sent["bob"])
            assert code(refused) == (403, "not_allowed")
        other = await asking.get("/v1/documents", headers={**sent["eve"], "x-namespace": "acme"})
        assert code(other) == (403, "not_allowed")
        chat = await asking.post("/v1/chat", json={"message": QUESTION, "max_tokens": 2}, headers=sent["alice"])
        body = {"message": "More?", "session_id": chat.json()["session_id"]}
        assert code(await asking.post("/v1/chat", json=body, headers=sent["eve"])) == (404, "no_such_session")
        for who in ("alice", "bob"):
            assert code(await asking.get("/metrics", headers=sent[who])) == (403, "not_allowed")
        assert code(await asking.get("/v1/documents", headers=sent["watch"])) == (403, "not_allowed")
        assert 'namespace="acme"' in (await asking.get("/metrics", headers=sent["watch"])).text
        keys.remove("alice")
        assert code(await asking.get("/v1/documents", headers=sent["alice"])) == (401, "unknown_key")


def test_namespaces_share_their_models(made: Registry) -> None:
    one, two = made.get("one", create=True), made.get("two", create=True)
    assert one is not two and one.storage_dir != two.storage_dir and made.get("one") is one
    assert one.generator.llm is two.generator.llm is made.get(None).generator.llm
    assert one.generator.halves is two.generator.halves and one.embedder is two.embedder
    assert one.compressor is two.compressor
    assert one.generator.prefixes is not two.generator.prefixes  # what remembers is nobody else's
    assert made.get("default") is made.get(None)
    one.upload([])
    again = Registry(made.storage, made.settings, read_only=True, **made._options)
    again.start()
    assert again.get("two").manifest == two.manifest
    again.close()


async def test_a_file_of_keys_that_cannot_be_read_is_a_fault(
    made: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    sent = {"authorization": f"Bearer {keys.add('alice')}"}
    sound = keys.path.read_bytes()
    with caplog.at_level(logging.INFO, logger="compllm_rag"):
        async with client(made, keys=keys) as asking:
            keys.path.write_text('{"keys": "xyzzy-secret"}')
            for _ in range(3):
                broken = await asking.get("/v1/documents", headers=sent)
                assert code(broken) == (500, "internal") and "no-store" in broken.headers["cache-control"]
                assert "xyzzy" not in broken.text and str(tmp_path) not in broken.text
            assert (await asking.get("/health")).status_code == 200
            keys.path.write_bytes(sound)
            assert (await asking.get("/v1/models", headers=sent)).status_code == 200
            monkeypatch.setattr(KeyFile, "keys", property(lambda self: self.path.joinpath("x").read_text()))
            for _ in range(2):
                assert code(await asking.get("/v1/models", headers=sent)) == (500, "internal")
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert [line.split(" in ")[0] for line in told] == ["UnsupportedFormatError", "NotADirectoryError"]
    assert not any(secret in caplog.text for secret in ("xyzzy", str(tmp_path), "Traceback"))


async def test_a_namespace_without_keys_is_named_in_a_header(made: Registry) -> None:
    async with client(made) as asking:
        name = {"x-namespace": "Größe".encode()}
        assert (await asking.post("/v1/documents", json={"documents": []}, headers=name)).status_code == 422
        for method in ("GET", "DELETE"):  # neither of them, nor what was refused, makes it
            gone = await asking.request(method, "/v1/documents/rock.md", headers=name)
            assert code(gone) == (404, "no_such_namespace")
        assert (await asking.post("/v1/documents", json=DOCUMENTS, headers=name)).status_code == 202
        assert (await asking.get("/v1/info", headers=name)).json()["namespace"] == "Größe"
        assert (await asking.get("/v1/documents", headers=name)).json()["total"] == 1
        assert code(await asking.get("/v1/documents", headers={"x-namespace": b"\xff"})) == (400, "bad_request")
        assert code(await asking.get("/v1/documents", headers={"x-namespace": ""})) == (422, "invalid_request")


async def test_pages_of_others_are_kept_out(made: Registry) -> None:
    async with client(made) as asking:
        for origin in ("https://evil.example", "null", "http://127.0.0.1:9999", "http://[", "http://[::1"):
            assert code(await asking.post("/v1/query", json={}, headers={"origin": origin})) == (403, "other_origin")
        own = await asking.get("/v1/info", headers={"origin": "http://127.0.0.1:8000"})
        assert own.status_code == 200 and "access-control-allow-origin" not in own.headers
        for host in ("evil.example", "127.0.0.1.evil.example", ""):
            assert code(await asking.get("/v1/info", headers={"host": host})) == (400, "unknown_host")
        for host in ("localhost:8000", "[::1]:8000", "127.0.0.1"):
            assert (await asking.get("/v1/info", headers={"host": host})).status_code == 200
    async with client(made, allowed_hosts=["rag.example.org"]) as asking:
        assert (await asking.get("/v1/info", headers={"host": "rag.example.org"})).status_code == 200
    assert accepted_hosts("0.0.0.0", (), keys=True) == frozenset()
    assert "evil" not in accepted_hosts("0.0.0.0", ["rag.example.org"], keys=True)


async def test_too_large_too_slow_too_often(made: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = made.settings.model_copy(update={"max_upload_mb": 1, "requests_per_minute": 60})
    async with client(made, settings=few) as asking:
        text = "word " * 300_000
        large = {"documents": [{"text": text}]}
        assert code(await asking.post("/v1/documents", json=large)) == (413, "too_large")

        async def unannounced():
            for _ in range(40):
                yield b" " * 100_000

        told = {"content-type": "application/json"}
        assert code(await asking.post("/v1/documents", content=unannounced(), headers=told)) == (413, "too_large")
        assert code(await asking.post("/v1/query", content=unannounced(), headers=told)) == (413, "too_large")
        assert (await asking.get("/v1/documents")).status_code == 200

        async def slow():
            yield b"{"
            await asyncio.sleep(5)

        import asyncio

        monkeypatch.setattr(gate, "_BODY_S", 0.05)
        assert code(await asking.post("/v1/query", content=slow(), headers=told)) == (408, "too_slow")
        codes = [(await asking.get("/v1/models")).status_code for _ in range(12)]
        assert codes.count(200) in range(3, 8) and codes[-1] == 429
        refused = await asking.get("/v1/models")
        assert code(refused) == (429, "rate_limited") and int(refused.headers["retry-after"]) >= 1
        assert (await asking.get("/health")).status_code == 200


def test_a_bucket_fills_again() -> None:
    now = [0.0]
    limit = RateLimit(60, burst=2, clock=lambda: now[0])
    assert [limit.take("a") is None for _ in range(3)] == [True, True, False]
    assert limit.take("a") == pytest.approx(1.0) and limit.take("b") is None
    now[0] = 1.0
    assert limit.take("a") is None and limit.take("a") is not None


async def test_a_full_queue_of_documents(made: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    index = made.get(None)
    monkeypatch.setattr(index.uploads, "_max", 1)
    async with client(made) as asking:
        many = {"documents": [{"id": f"m{i}", "text": f"Boat {i} leaves."} for i in range(5)]}
        refused = await asking.post("/v1/documents", json=many)
        assert code(refused) == (429, "upload_queue_full") and int(refused.headers["retry-after"]) >= 1
        assert code(await asking.get("/v1/documents/m0")) == (404, "no_such_document")


async def test_logs_and_faults_tell_no_words(made: Registry, caplog: pytest.LogCaptureFixture) -> None:
    secret = "xyzzy-secret"
    with caplog.at_level(logging.DEBUG, logger="compllm_rag"):
        async with client(made) as asking:
            await asking.put(f"/v1/documents/{secret}", json={"text": f"The {secret} is a word.", "title": secret})
            await asking.post("/v1/query", json={"query": secret, "max_tokens": 2})
            await asking.post("/v1/chat", json={"message": secret, "max_tokens": 2})
            await asking.post("/v1/query", json={"query": secret, "top_k": secret})
            index = made.get(None)
            fail = lambda *args, **options: (_ for _ in ()).throw(RuntimeError(secret))  # noqa: E731
            index.faiss.__dict__["document_nodes"] = fail
            try:
                broken = await asking.get(f"/v1/documents/{secret}")
            finally:
                del index.faiss.__dict__["document_nodes"]
    assert code(broken) == (500, "internal") and secret not in broken.text
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "RuntimeError in" in told and "PUT /v1/documents/{document_id:path} 202" in told
    assert secret not in told, [line for line in told.splitlines() if secret in line]


def test_keys_on_the_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from compllm_rag.cli.main import app

    file = str(tmp_path / "keys.json")

    def run(*words: str, status: int = 0) -> str:
        result = CliRunner().invoke(app, ["keys", *words, "--api-keys", file])
        assert result.exit_code == status, result.output
        return result.stdout if status == 0 else result.stderr

    key = run("add", "alice", "--namespace", "acme").strip()
    found = KeyFile(Path(file)).find(key)
    assert found is not None and found.namespace == "acme"
    made = json.loads(run("add", "m", "--rights", "metrics", "--json"))
    assert KeyFile(Path(file)).find(made["key"]).rights == "metrics"
    assert "alice  write  acme" in run("list") and "m  metrics  all namespaces" in run("list")
    assert [one["name"] for one in json.loads(run("list", "--json"))] == ["alice", "m"] and key not in run("list")
    assert "unknown rights" in run("add", "x", "--rights", "all", status=2)
    assert "removed alice" in run("remove", "alice") and KeyFile(Path(file)).find(key) is None
    serve = CliRunner().invoke(app, ["serve", str(tmp_path), "--host", "0.0.0.0"])
    assert serve.exit_code == 2 and "loopback address only" in serve.stderr
    serve = CliRunner().invoke(app, ["serve", str(tmp_path / "none"), "--port", "0"])
    assert serve.exit_code == 2 and "there is no storage here" in serve.stderr and "--create" in serve.stderr
    assert os.path.exists(file)


@pytest.mark.parametrize("prefix", ["/rag", "/rag/"])
async def test_keys_are_asked_for_behind_a_prefix(made: Registry, tmp_path: Path, prefix: str) -> None:
    """Servers and mounts leave a prefix in the path; routes are matched without it, and so must the guard."""
    keys = KeyFile(tmp_path / "keys.json")
    sent = {"authorization": f"Bearer {keys.add('alice')}"}
    app = create_app(made, keys=keys)
    mounted = Starlette(routes=[Mount("/rag", app)])
    behind = httpx.ASGITransport(app=app, root_path=prefix), httpx.ASGITransport(app=mounted)
    for transport in behind:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as asking:
            for path in ("/v1/documents", "/metrics", "/v1/models"):
                refused = await asking.get(f"/rag{path}")
                assert refused.status_code in (401, 404), path
                if transport is behind[1] or prefix == "/rag":
                    assert code(refused) == (401, "missing_key")
                    # Counters are of all namespaces, and so for keys of their own.
                    assert (await asking.get(f"/rag{path}", headers=sent)).status_code == (200 if "v1" in path else 403)
            assert (await asking.get("/rag/health")).status_code in (200, 404)
            page = await asking.get("/rag/")
            assert page.status_code in (200, 404)


@pytest.mark.parametrize(
    ("path", "root", "within"),
    [
        ("/v1/query", "", "/v1/query"), ("/rag/v1/query", "/rag", "/v1/query"), ("/rag", "/rag", "/"),
        ("/rag/metrics", "/rag/", "/metrics"), ("/ragged/v1", "/rag", "/ragged/v1"), ("/v1/x", "/rag", "/v1/x"),
    ],
)  # fmt: skip
def test_the_path_within_a_prefix(path: str, root: str, within: str) -> None:
    assert gate.path_of({"path": path, "root_path": root}) == within


async def test_a_client_that_stops_sending_is_no_fault(made: Registry, caplog: pytest.LogCaptureFixture) -> None:
    """Aborted uploads are counted as 499, and no error is logged."""
    app, sent = create_app(made), list[dict]()
    parts = iter([{"type": "http.request", "body": b'{"model":', "more_body": True}, {"type": "http.disconnect"}])
    scope = {
        "type": "http", "method": "POST", "path": "/v1/documents", "raw_path": b"/v1/documents", "query_string": b"",
        "headers": [(b"host", b"127.0.0.1:8000"), (b"content-type", b"application/json")], "http_version": "1.1",
        "client": ("127.0.0.1", 9), "server": ("127.0.0.1", 8000), "scheme": "http", "root_path": "",
    }  # fmt: skip

    async def receive() -> dict:
        return next(parts)

    async def send(message: dict) -> None:
        sent.append(message)

    with caplog.at_level(logging.INFO):
        await app(scope, receive, send)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert " 499 " in caplog.text and " 500 " not in caplog.text
