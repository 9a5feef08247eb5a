"""Many users at once on a real server on the loopback address: is anything lost, how long do they wait, is memory flat?

A server process serves a copy of the storage given (or of one made of the sample corpus). Each user asks, streamed or
not, reads lists, and brings documents in, one thing after the other; a refusal (429, 503) is waited out.
At the end every document that was accepted must be there with its concepts.

    python -m benchmarks.server.load --users 50 --seconds 120 --json load.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import Record, parsed, progress, written
from compllm_rag.cli.demo import sample_corpus, sample_questions

_START_S = 300.0
_LONGEST_WAIT_S = 5.0  # however long a refusal says: the test must go on


@dataclass
class Tally:
    """What all users met.

    Attributes:
        seconds: Of answered requests, by kind.
        ttft: Seconds from the request to the first token of a stream, the wait in the queue included.
        refused: By status and code.
        failed: What else went wrong, by kind.
        accepted: Ids of documents that were answered with 202.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    ttft: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    accepted: set[str] = field(default_factory=set)


def main(argv: Sequence[str] | None = None) -> Record:
    """Run the benchmark; returns its record."""
    options = argparse.ArgumentParser(
        "python -m benchmarks.server.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=Path, help="write the result there")
    options.add_argument("--storage", type=Path, help="serve a copy of this one; default: one of the sample corpus")
    options.add_argument("--users", type=int, default=50)
    options.add_argument("--seconds", type=float, default=120.0)
    options.add_argument("--max-tokens", type=int, default=16, help="of each answer")
    options.add_argument("--generations", type=int, default=8, help="answers made at a time, and decoded together")
    options.add_argument("--waiting", type=int, default=64, help="answers that may wait")
    args = parsed(options, argv)
    with tempfile.TemporaryDirectory() as folder:
        storage = _storage(args.storage, Path(folder))
        with _server(storage, args, Path(folder) / "log") as (url, process):
            result = asyncio.run(_run(url, process.pid, args))
        result["lost"] = len(result.pop("missing"))
        result["log_bytes"] = (Path(folder) / "log").stat().st_size
    return written(args, result)


def _storage(given: Path | None, folder: Path) -> Path:
    made = folder / "storage"
    if given is not None:
        shutil.copytree(given, made)
        return made
    words = ["ingest", sample_corpus() / "articles", "--storage", made]
    subprocess.run([sys.executable, "-m", "compllm_rag.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return made


@contextlib.contextmanager
def _server(storage: Path, args: argparse.Namespace, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server process and its address; ended as an operator would, by SIGTERM."""
    words = [
        "serve", storage, "--port", "0", "--generations", args.generations, "--waiting", args.waiting,
        "--requests-per-minute", 1_000_000,
    ]  # fmt: skip
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-m", "compllm_rag.cli", *map(str, words)], stderr=file)
    try:
        deadline = time.monotonic() + _START_S
        while not (found := re.search(r"listening on (http://\S+)", log.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield found[1], process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _run(url: str, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=args.users + 4)
    tally, memory = Tally(), list[int]()
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=300) as client:
        await _ask(client, Tally(), random.Random(0), args.max_tokens)  # caches and threads are there afterwards
        begun = time.monotonic()
        ends = begun + args.seconds
        watch = asyncio.create_task(_watch(pid, memory))
        await asyncio.gather(*(_user(number, client, tally, ends, args.max_tokens) for number in range(args.users)))
        took = time.monotonic() - begun
        watch.cancel()
        progress("waiting for concepts")
        while (await client.get("/v1/queue")).json()["chunks_waiting"]:
            await asyncio.sleep(0.2)
        missing = [name for name in sorted(tally.accepted) if not await _is_ready(client, name)]
        memory.append(_resident(pid))
    answered = sum(map(len, tally.seconds.values()))
    third = max(1, len(memory) // 3)
    return {
        "users": args.users,
        "seconds": took,
        "answered": answered,
        "answered_per_s": answered / took,
        "latency_s": {kind: _spread(seconds) for kind, seconds in sorted(tally.seconds.items())},
        "ttft_s": _spread(tally.ttft),
        "refused": dict(tally.refused),
        "failed": dict(tally.failed),
        "documents_accepted": len(tally.accepted),
        "missing": missing,
        "rss_bytes": {
            "start": memory[0],
            "after_a_third": memory[third - 1],
            "end": memory[-1],
            "most": max(memory),
        },
    }


async def _user(number: int, client: httpx.AsyncClient, tally: Tally, ends: float, max_tokens: int) -> None:
    chance = random.Random(number)
    while time.monotonic() < ends:
        doing = chance.random()
        try:
            if doing < 0.8:
                await _ask(client, tally, chance, max_tokens)
            elif doing < 0.9:
                await _call(client, tally, "list", "GET", "/v1/documents")
            else:
                name = f"user-{number}-{chance.randrange(4)}"
                text = f"User {number} wrote note {chance.random()}. The ferry was late. Nobody minded."
                if await _call(client, tally, "upload", "PUT", f"/v1/documents/{name}", json={"text": text}):
                    tally.accepted.add(name)
        except httpx.HTTPError as error:
            tally.failed[type(error).__name__] += 1
        await asyncio.sleep(chance.random() * 0.5)


async def _ask(client: httpx.AsyncClient, tally: Tally, chance: random.Random, max_tokens: int) -> None:
    body = {
        "query": chance.choice(sample_questions())["question"],
        "mode": chance.choice(("concepts", "text")),
        "max_tokens": max_tokens,
    }
    if chance.random() < 0.5:
        await _call(client, tally, "query", "POST", "/v1/query", json=body)
        return
    begun, first, ended = time.perf_counter(), None, False
    async with client.stream("POST", "/v1/query", json={**body, "stream": True}) as response:
        if response.status_code != 200:
            await response.aread()
            await _refused(response, tally)
            return
        async for line in response.aiter_lines():
            if line == "event: token" and first is None:
                first = time.perf_counter() - begun
            ended = ended or line == "event: done"
    if not ended:
        tally.failed["stream without an end"] += 1
        return
    tally.seconds.setdefault("stream", []).append(time.perf_counter() - begun)
    if first is not None:
        tally.ttft.append(first)


async def _call(
    client: httpx.AsyncClient, tally: Tally, kind: str, method: str, path: str, json: dict[str, Any] | None = None
) -> bool:
    begun = time.perf_counter()
    response = await client.request(method, path, json=json)
    if response.status_code >= 400:
        await _refused(response, tally)
        return False
    tally.seconds.setdefault(kind, []).append(time.perf_counter() - begun)
    return True


async def _refused(response: httpx.Response, tally: Tally) -> None:
    if response.status_code not in (429, 503):
        tally.failed[f"{response.status_code}"] += 1
        return
    tally.refused[f"{response.status_code} {response.json()['error']['code']}"] += 1
    await asyncio.sleep(min(float(response.headers["retry-after"]), _LONGEST_WAIT_S))


async def _is_ready(client: httpx.AsyncClient, name: str) -> bool:
    found = await client.get(f"/v1/documents/{name}")
    return found.status_code == 200 and found.json()["state"] == "ready"


async def _watch(pid: int, memory: list[int]) -> None:
    while True:
        memory.append(_resident(pid))
        await asyncio.sleep(1.0)


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def _spread(seconds: Sequence[float]) -> dict[str, float | int | None]:
    ordered = sorted(seconds)
    if not ordered:
        return {"n": 0, "p50": None, "p95": None, "most": None}
    at = {
        name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in (("p50", 0.5), ("p95", 0.95))
    }
    return {"n": len(ordered), **at, "most": ordered[-1]}


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
