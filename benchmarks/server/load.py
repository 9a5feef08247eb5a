"""Many users at once on a real server on the loopback address: is anything lost, how long do they wait, is memory flat?

A server process serves a copy of the storage given (or of one made of the sample corpus). Each user asks, streamed or
not, reads lists, and brings documents in, one thing after the other; a refusal (429, 503) is waited out.
At the end every document that was accepted must be there with its concepts.

    compllm-rag bench load --users 50 --seconds 120 --json load.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.cells import number, source, table
from benchmarks.common import Record, parsed, parser, progress, waits, written
from benchmarks.server.process import is_refusal, patience_s, served
from compllm_rag.cli.demo import sample_corpus, sample_questions


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
    options = parser("load", __doc__, "")
    options.add_argument("--storage", type=Path, help="serve a copy of this one; default: one of the sample corpus")
    options.add_argument("--users", type=int, default=50)
    options.add_argument("--seconds", type=float, default=120.0)
    options.add_argument("--max-tokens", type=int, default=16, help="of each answer")
    options.add_argument("--generations", type=int, default=8, help="answers made at a time, and decoded together")
    options.add_argument("--waiting", type=int, default=64, help="answers that may wait")
    args = parsed(options, argv)
    with tempfile.TemporaryDirectory() as folder:
        storage = _storage(args.storage, Path(folder))
        limits = ["--generations", args.generations, "--waiting", args.waiting]
        with served(storage, limits, Path(folder) / "log") as (url, process):
            result = asyncio.run(measure(url, process.pid, args))
        result["lost"] = len(result.pop("missing"))
        result["log_bytes"] = (Path(folder) / "log").stat().st_size
    return written(args, {"generations": args.generations, "waiting": args.waiting, **result})


def _storage(given: Path | None, folder: Path) -> Path:
    made = folder / "storage"
    if given is not None:
        shutil.copytree(given, made)
        return made
    words = ["ingest", sample_corpus() / "articles", "--storage", made]
    subprocess.run([sys.executable, "-m", "compllm_rag.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return made


async def measure(url: str, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    """Let the users at a server.

    Args:
        url: Where it listens.
        pid: Its process, whose memory is looked at.
        args: `users`, `seconds`, `max_tokens`.
    """
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
        "max_tokens": args.max_tokens,
        "answered": answered,
        "answered_per_s": answered / took,
        "latency_s": {kind: waits(seconds) for kind, seconds in sorted(tally.seconds.items())},
        "ttft_s": waits(tally.ttft),
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
    if not is_refusal(response):
        tally.failed[f"{response.status_code}"] += 1
        return
    tally.refused[f"{response.status_code} {response.json()['error']['code']}"] += 1
    await asyncio.sleep(patience_s(response))


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


_KINDS = {
    "query": "question, answered whole",
    "stream": "question, streamed to its end",
    "list": "list of documents",
    "upload": "document brought in",
}


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    spreads = {_KINDS.get(kind, kind): found for kind, found in record["latency_s"].items()}
    spreads["first token of a stream"] = record["ttft_s"]
    rows = [
        [what, str(found["n"]), *(number(found[name], 2) for name in ("p50", "p95", "most"))]
        for what, found in spreads.items()
    ]
    memory = [f"{record['rss_bytes'][name] / 2**20:,.0f}" for name in ("start", "after_a_third", "end", "most")]
    return [
        "## Many users of one server",
        "",
        f"{record['users']} users for {record['seconds']:.0f} s, who ask (eight times in ten; answers of up to "
        f"{record['max_tokens']} tokens), list documents and bring some in; {record['generations']} answers are made "
        f"at a time, {record['waiting']} may wait. Seconds include the wait in the queue; who is refused comes again.",
        "",
        f"{source(record)}.",
        "",
        *table(["what", "answered", "median (s)", "95 % (s)", "most (s)"], rows),
        f"{record['answered']:,} requests were answered, {number(record['answered_per_s'], 2)} a second. "
        f"Refused: {_counted(record['refused'])}. Failed: {_counted(record['failed'])}. Of "
        f"{record['documents_accepted']} documents that were accepted {record['lost']} were lost. The server's memory "
        f"in MiB: {memory[0]} at the start, {memory[1]} after a third of the time, {memory[2]} at the end, {memory[3]} "
        "at most.",
        "",
    ]


def _counted(found: dict[str, int]) -> str:
    return ", ".join(f"{n} ({what})" for what, n in sorted(found.items())) or "none"


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
