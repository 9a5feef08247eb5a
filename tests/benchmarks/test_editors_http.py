"""The simulation of many editors through a server on a toy model, and that it would notice a server that forgets."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import toy
from benchmarks.ingest.edits import synthetic
from benchmarks.live.editors import SharedText, schedule
from benchmarks.live.editors_http import simulate
from benchmarks.live.editors_http_page import tables
from benchmarks.live.http_client import Client, Found
from loft_corpus import run
from toy_embedder import save_sentence_transformer


def test_the_benchmark(tmp_path: Path, toy_folder: Path) -> None:
    embedder = save_sentence_transformer(tmp_path / "embedder", toy.TEXT)
    words = ["--llm", toy_folder, "--embedder", embedder, "--editors", 15, "--edits", 2, "--seconds", 0.5]
    words += ["--paragraphs", 12, "--limit", 24, "--racers", 3, "--max-tokens", 3, "--asking", 4]
    record, _ = run("editors_http", tmp_path / "o.json", *words)
    assert record["edits"] == record["accepted_s"]["n"] == 24
    assert 0 < record["found_s"]["n"] <= record["answered_s"]["n"] <= 6
    assert record["answerable_s"]["n"] + record["edits_replaced_before_a_look"] >= 24
    for name in (
        "uploads_not_whole",
        "sentences_lost",
        "edits_not_met",
        "looks_stale",
        "looks_again",
        "chunks_without_concepts",
    ):
        assert record[name] == 0, name
    assert record["text_is_as_replayed"] and record["last_writer_wins"]
    assert record["at_the_same_time"]["whole"] and record["at_the_same_time"]["next_upload_wins"]
    assert 1 <= record["uploads"] <= 24 and record["source_tokens"] > 500
    assert 0 < record["chunks_embedded_per_edit"] <= record["chunks_uploaded_per_edit"]
    assert record["units_compressed_per_edit"] > 0 < record["server_cpu_s_per_edit"]
    for name in ("accepted_s", "answerable_s", "found_s", "answered_s"):
        assert 0 < record[name]["p50"] <= record[name]["p95"] <= record[name]["most"]
    assert str(tmp_path) not in str({**record, "command": "", "llm": ""})  # the options name what was given
    lines = tables(record)
    assert lines[:3] == ["## Many editors of one document", "", "### Through the HTTP server"]
    assert f"| sentences lost | 0 of {record['sentences']} |" in lines


class Forgetful:
    """In place of `Client`: questions find the first text for ever, readers the upload before the last."""

    def __init__(self) -> None:
        self.refused: dict[str, int] = {}
        self._texts: list[str] = []

    async def put(self, doc_id: str, text: str) -> dict[str, Any]:
        self._texts.append(text)
        return {"chunks": 1, "chunks_added": 1}

    async def chunks(self, doc_id: str) -> list[dict[str, Any]]:
        return [{"text": self._texts[-2:][0], "n_tokens": 1}]

    async def queue(self) -> dict[str, int]:
        return {"chunks_waiting": 0, "chunks_failed": 0}

    async def compressed(self) -> int:
        return 0

    async def ask(self, question: str) -> Found:
        await asyncio.sleep(0)
        return Found(self._texts[0], time.perf_counter(), time.perf_counter())


def test_a_server_that_forgets_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.live.editors_http._PAUSE_S", 0.0)
    edits = schedule(6, 2, 6, 0.2, seed=4)
    found = asyncio.run(simulate(Forgetful(), synthetic(5), edits, asking=2, racers=2, cpu=lambda: 1.0))  # type: ignore[arg-type]
    assert found["uploads_not_whole"] > 0 and found["sentences_lost"] > 0
    assert not found["text_is_as_replayed"] and not found["at_the_same_time"]["next_upload_wins"]
    assert found["edits_not_met"] > 0 and found["looks_stale"] > 0 and found["looks_again"] > 0
    again = SharedText.of(synthetic(5))
    for edit in edits:
        again.apply(edit)
    assert found["sentences"] == sum(map(len, again.paragraphs))


def test_a_refusal_is_waited_out_and_an_error_is_told() -> None:
    answers = [
        httpx.Response(503, json={"error": {"code": "overloaded"}}, headers={"Retry-After": "0"}),
        httpx.Response(202, json={"chunks": 1}),
        httpx.Response(500, text="something broke"),
        httpx.Response(200, text='event: error\ndata: {"error": {"message": "no room"}}\n\n'),
        httpx.Response(200, text='event: retrieved\ndata: {"nodes": []}\n\n'),
    ]
    transport = httpx.MockTransport(lambda request: answers.pop(0))

    async def talk() -> None:
        async with httpx.AsyncClient(base_url="http://127.0.0.1", transport=transport) as http:
            client = Client(http, 2, "vector", 2)
            assert await client.put("a", "text") == {"chunks": 1}
            assert client.refused == {"503 overloaded": 1}
            with pytest.raises(RuntimeError, match="answered 500: something broke"):
                await client.put("a", "text")
            with pytest.raises(RuntimeError, match="no answer: no room"):
                await client.ask("Who?")
            with pytest.raises(RuntimeError, match="without an answer"):
                await client.ask("Who?")

    asyncio.run(talk())
