"""A hundred people edit one document of an HTTP server: how long until a question finds an edit?

The edits are those of `editors`, by the same seed; the document lies in a server process, of which nothing is known
but what it answers. Who shares a text uploads it (`PUT /v1/documents/{id}`) once at a time, the newest text each time.
Then each editor looks at the document: the edit is *answerable* when its chunks hold the sentence that they wrote,
and no longer the one that the edit took out. Some ask for it as well (`POST /v1/query`, a stream): the passages found
must say the same at once, for text and vectors are committed together. Not all ask, since so many answers a minute are
more than an LLM on a few cores gives. An edit whose sentence somebody replaced meanwhile is not waited for. Passages
are found by words, so that the ranking of like sentences is no matter.

After each upload the chunks of the document, put together, are compared with what was uploaded; at the end with the
text that the edits give when they are made one after the other. Last, some write the whole document at the same time
without waiting for each other: what then is there must be one of their texts, and the next upload must win.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import Record, parsed, parser, progress, waits, written
from benchmarks.ingest.edits import synthetic
from benchmarks.live.editors import ID, Edit, SharedText, Upload, put_together, schedule
from benchmarks.live.http_client import Client
from benchmarks.server.process import cpu_s, served
from compllm_rag.config import DEFAULT_EMBEDDER

_TRIES = 5
_PAUSE_S = 0.2
_WAIT_S = 600.0


@dataclass
class Outcome:
    """What became of the edits.

    Attributes:
        accepted: Seconds from each edit to the 202 of the upload that holds it.
        answerable: To the moment at which the chunks of the document agreed with it.
        found: To the moment at which the passages of a question did, of those who asked.
        answered: To the end of the answer to that.
        superseded: Edits whose sentence was replaced before somebody looked.
        again: Looks and questions that did not meet at once what they must.
        missed: Edits that were not met, however often.
        stale: Looks and questions that met what an edit had taken out.
    """

    accepted: list[float] = field(default_factory=list)
    answerable: list[float] = field(default_factory=list)
    found: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    superseded: int = 0
    again: int = 0
    missed: int = 0
    stale: int = 0


class Session:
    """A document that many edit: one upload at a time, of the newest text, and a question for each edit.

    Args:
        client: Of the server.
        text: What is edited.
        asking: One edit of so many is asked for.
    """

    def __init__(self, client: Client, text: SharedText, asking: int) -> None:
        self._client, self._text, self._turn, self._saved = client, text, asyncio.Lock(), 0
        self._asking = asking
        self._edited: dict[int, float] = {}
        self.order: list[Edit] = []
        self.uploads: list[Upload] = []
        self.outcome = Outcome()

    async def edit(self, edit: Edit) -> None:
        """Make an edit, see that it is uploaded, and ask for it."""
        before = list(self._text.paragraphs[edit.paragraph])
        version = self._text.apply(edit)
        made = self._edited[version] = time.perf_counter()
        self.order.append(edit)
        asks = version % self._asking == 0
        after = self._text.paragraphs[edit.paragraph]
        wrote = edit.text if edit.text in after else None
        gone = next((sentence for sentence in before if sentence not in after), None)
        async with self._turn:
            if self._saved < version:
                await self._upload()
        if await self._agrees(self._looked, wrote, gone, made, self.outcome.answerable) and asks:
            await self._agrees(self._asked, wrote, gone, made, self.outcome.found)

    async def _upload(self) -> None:
        text, newest, begun = str(self._text), self._text.version, time.perf_counter()
        told = await self._client.put(ID, text)
        now = time.perf_counter()
        versions = range(self._saved + 1, newest + 1)
        self.outcome.accepted += [now - self._edited[version] for version in versions]
        whole = put_together(await _texts(self._client), text) == text
        self.uploads.append(Upload(versions, now, now - begun, told["chunks"], told["chunks_added"], whole))
        self._saved = newest

    async def _agrees(
        self,
        look: Callable[[str, float], Awaitable[tuple[str, float]]],
        wrote: str | None,
        gone: str | None,
        made: float,
        seconds: list[float],
    ) -> bool:
        """Look until what is met agrees with an edit; tells whether it did, or the edit was replaced.

        A sentence never comes back once it is out of the text, so what stands in the text after a look stood in every
        upload since the edit.

        Args:
            look: Gives what is met for a sentence, and when.
            wrote: The sentence that the edit brought.
            gone: The one that it took out.
            made: When.
            seconds: Takes how long it was until they agreed.
        """
        outcome = self.outcome
        for _ in range(_TRIES):
            met, at = await look(wrote or gone or "", made)
            stale = gone is not None and gone in met
            outcome.stale += stale
            if not stale and (wrote is None or wrote in met):
                seconds.append(at - made)
                return True
            if not stale and wrote is not None and wrote not in str(self._text):
                outcome.superseded += 1
                return False
            outcome.again += 1
            await asyncio.sleep(_PAUSE_S)
        outcome.missed += 1
        return False

    async def _looked(self, sentence: str, made: float) -> tuple[str, float]:
        texts = await _texts(self._client)
        return "\n".join(texts), time.perf_counter()

    async def _asked(self, sentence: str, made: float) -> tuple[str, float]:
        found = await self._client.ask(sentence)
        self.outcome.answered.append(found.ended_at - made)
        return found.passages, found.found_at


async def simulate(
    client: Client, text: str, edits: Sequence[Edit], *, asking: int, racers: int, cpu: Callable[[], float]
) -> dict[str, Any]:
    """Let the editors work at a server, and measure.

    Args:
        client: Of the server, which has no such document yet.
        text: Of the document at first.
        edits: See `schedule`.
        asking: One edit of so many is asked for.
        racers: How many write the whole document at the same time in the end.
        cpu: Seconds of CPU that the server has taken.
    """
    session = Session(client, SharedText.of(text), asking)
    await client.put(ID, str(SharedText.of(text)))
    await _concepts(client)
    before = await client.compressed()
    begun, done, spent_s = time.perf_counter(), [0], cpu()

    async def work(own: list[Edit]) -> None:
        for edit in own:
            await asyncio.sleep(max(0.0, begun + edit.at_s - time.perf_counter()))
            await session.edit(edit)
            done[0] += 1
            if done[0] % 10 == 0:
                progress(f"{done[0]} of {len(edits)} edits, {time.perf_counter() - begun:.0f} s")

    by_editor: dict[int, list[Edit]] = {}
    for edit in edits:
        by_editor.setdefault(edit.editor, []).append(edit)
    await asyncio.gather(*(work(own) for own in by_editor.values()))
    ended = time.perf_counter()
    failed, waited = await _concepts(client)
    units, spent_s = await client.compressed() - before, cpu() - spent_s
    again = SharedText.of(text)
    for edit in session.order:
        again.apply(edit)
    return {
        **_measured(session, edits),
        **await _checked(client, again),
        "editing_s": ended - begun,
        "concepts_after_s": waited,
        "units_compressed_per_edit": units / len(edits),
        "server_cpu_s_per_edit": spent_s / len(edits),
        "chunks_without_concepts": failed,
        "at_the_same_time": await _race(client, again, racers),
        "refused": dict(client.refused),
    }


def _measured(session: Session, edits: Sequence[Edit]) -> dict[str, Any]:
    uploads, outcome = session.uploads, session.outcome
    return {
        "edits": len(edits),
        "uploads": len(uploads),
        "edits_per_upload_most": max(len(up.versions) for up in uploads),
        "accepted_s": waits(outcome.accepted),
        "answerable_s": waits(outcome.answerable),
        "found_s": waits(outcome.found),
        "answered_s": waits(outcome.answered),
        "edits_replaced_before_a_look": outcome.superseded,
        "edits_not_met": outcome.missed,
        "looks_again": outcome.again,
        "looks_stale": outcome.stale,
        "upload_s_median": statistics.median(up.seconds for up in uploads),
        "chunks_uploaded_per_edit": sum(up.chunks for up in uploads) / len(edits),
        "chunks_embedded_per_edit": sum(up.added for up in uploads) / len(edits),
        "uploads_not_whole": sum(not up.whole for up in uploads),
    }


async def _checked(client: Client, again: SharedText) -> dict[str, Any]:
    """What the server says of the document in the end, beside what the edits give one after the other."""
    chunks = await client.chunks(ID)
    final = put_together([chunk["text"] for chunk in chunks], str(again))
    live = [sentence for paragraph in again.paragraphs for sentence in paragraph]
    last = again.paragraphs[0][0]
    return {
        "source_tokens": sum(chunk["n_tokens"] for chunk in chunks),
        "chunks": len(chunks),
        "sentences": len(live),
        "sentences_lost": sum(sentence not in final for sentence in live),
        "text_is_as_replayed": final == str(again),
        "last_writer_wins": last in final and last in (await client.ask(last)).passages,
    }


async def _race(client: Client, text: SharedText, writers: int) -> dict[str, Any]:
    """Some write the whole document at the same time, each a text of their own; then one writes after them."""
    _, *rest = str(text).split("\n\n")
    theirs = ["\n\n".join([f"Writer {n} waits for nobody.", *rest]) for n in range(writers + 1)]
    begun = time.perf_counter()
    await asyncio.gather(*(client.put(ID, each) for each in theirs[1:]))
    took, parts = time.perf_counter() - begun, await _texts(client)
    await client.put(ID, theirs[0])
    return {
        "writers": writers,
        "seconds": took,
        "whole": any(put_together(parts, each) == each for each in theirs[1:]),
        "next_upload_wins": put_together(await _texts(client), theirs[0]) == theirs[0],
    }


async def _texts(client: Client) -> list[str]:
    return [chunk["text"] for chunk in await client.chunks(ID)]


async def _concepts(client: Client) -> tuple[int, float]:
    """Wait until all concepts are made; the chunks that have none all the same, and how long it took."""
    begun = time.perf_counter()
    while (queue := await client.queue())["chunks_waiting"]:
        await asyncio.sleep(_PAUSE_S)
    return queue["chunks_failed"], time.perf_counter() - begun


async def _run(url: str, pid: int, args: argparse.Namespace, edits: Sequence[Edit]) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=None), timeout=_WAIT_S) as http:
        client = Client(http, args.top_k, args.retrieval, args.max_tokens)
        text = synthetic(args.paragraphs, args.seed)
        return await simulate(client, text, edits, asking=args.asking, racers=args.racers, cpu=lambda: cpu_s(pid))


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser("editors_http", __doc__, "llm limit codec embedder", embedder=DEFAULT_EMBEDDER)
    options.add_argument("--editors", type=int, default=100, help="how many edit at once")
    options.add_argument("--edits", type=int, default=1, help="of each")
    options.add_argument("--paragraphs", type=int, default=40, help="of the document, five sentences each")
    options.add_argument("--seconds", type=float, default=60.0, help="over which the edits are spread")
    options.add_argument("--seed", type=int, default=0, help="of texts, places and times")
    options.add_argument("--top-k", type=int, default=2, help="passages of a question")
    options.add_argument("--retrieval", choices=("vector", "bm25", "hybrid"), default="bm25", help="how they are found")
    options.add_argument("--asking", type=int, default=10, help="one edit of so many is asked for")
    options.add_argument("--max-tokens", type=int, default=8, help="of an answer")
    options.add_argument("--racers", type=int, default=4, help="who write the whole document at once in the end")
    args = parsed(options, argv)
    edits = schedule(args.editors, args.edits, args.paragraphs + 1, args.seconds, args.seed)[: args.limit]
    made = ["--create", "--llm", args.llm, "--embedder", args.embedder, "--codec", args.codec, "--waiting", 1000]
    with (
        tempfile.TemporaryDirectory() as folder,
        served(Path(folder) / "s", made, Path(folder) / "log") as (url, process),
    ):
        found = asyncio.run(_run(url, process.pid, args, edits))
    named = ("llm", "codec", "editors", "paragraphs", "seconds", "seed", "top_k", "retrieval", "asking", "max_tokens")
    return written(args, {**{name: getattr(args, name) for name in named}, **found})
