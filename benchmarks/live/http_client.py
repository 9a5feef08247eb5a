"""What an editor's program does at the HTTP server: upload a document, look at it, and ask."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from typing import Any, NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.server.process import is_refusal, patience_s

_COMPRESSED = "compllm_compress_segment_seconds_count"


class Found(NamedTuple):
    """What a question met.

    Attributes:
        passages: Texts of the passages found, one behind the other.
        found_at: When they were there; by `time.perf_counter`.
        ended_at: When the answer read from them had ended.
    """

    passages: str
    found_at: float
    ended_at: float


class Client:
    """Waits where it is refused, and counts that.

    Args:
        http: Of the server.
        top_k: Passages of a question.
        retrieval: How they are found: `vector`, `bm25` or `hybrid`.
        max_tokens: Of an answer.

    Attributes:
        refused: Refusals that were waited out, by status and code.
    """

    def __init__(self, http: httpx.AsyncClient, top_k: int, retrieval: str, max_tokens: int) -> None:
        self._http, self._asking = http, {"top_k": top_k, "retrieval": retrieval, "max_tokens": max_tokens}
        self.refused: Counter[str] = Counter()

    async def put(self, doc_id: str, text: str) -> dict[str, Any]:
        """Bring a document in, or replace it."""
        return await self._call("PUT", f"/v1/documents/{doc_id}", json={"text": text})

    async def chunks(self, doc_id: str) -> list[dict[str, Any]]:
        """The chunks of a document, with their texts."""
        told = await self._call("GET", f"/v1/documents/{doc_id}", params={"text": True})
        return list(told["nodes"])

    async def queue(self) -> dict[str, Any]:
        """What waits for its concepts."""
        return await self._call("GET", "/v1/queue")

    async def compressed(self) -> int:
        """How many units (chunks of deep concepts, segments else) the server has compressed since it started."""
        text = (await self._http.get("/metrics")).raise_for_status().text
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return int(sum(sample.value for sample in samples if sample.name == _COMPRESSED))

    async def ask(self, question: str) -> Found:
        """Ask, and read the answer to its end.

        Raises:
            RuntimeError: There was no answer.
        """
        body = {"query": question, "stream": True, **self._asking}
        while True:
            async with self._http.stream("POST", "/v1/query", json=body) as response:
                if response.status_code == 200:
                    return await _read(response)
                await response.aread()
                wait_s = self._wait_s(response)
            await asyncio.sleep(wait_s)

    async def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        while True:
            response = await self._http.request(method, path, **options)
            if response.is_success:
                return dict(response.json())
            await asyncio.sleep(self._wait_s(response))

    def _wait_s(self, response: httpx.Response) -> float:
        """Seconds to wait after a refusal; every other error ends the benchmark."""
        if not is_refusal(response):
            raise RuntimeError(f"the server answered {response.status_code}: {response.text[:500]}")
        self.refused[f"{response.status_code} {response.json()['error']['code']}"] += 1
        return patience_s(response)


async def _read(response: httpx.Response) -> Found:
    name, passages, found_at = "", "", 0.0
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            told = json.loads(line.removeprefix("data: "))
            if name == "retrieved":
                passages, found_at = "\n".join(node["text"] for node in told["nodes"]), time.perf_counter()
            elif name == "done":
                return Found(passages, found_at, time.perf_counter())
            elif name == "error":
                raise RuntimeError(f"no answer: {told['error']['message']}")
    raise RuntimeError("the stream ended without an answer")
