"""A hundred people edit one document at once: how long until an edit is answerable, and what does it cost?

Every editor is a thread that changes a sentence of a shared text (its own paragraph mostly, one sentence that all
fight for sometimes), at times drawn by the seed, and uploads the document. One upload runs at a time and takes the
newest text, so whoever waited meanwhile finds its edit uploaded already. An edit is answerable when the upload that
holds it returns: text and vectors are committed, and its chunks are read as text until their concepts are made. After
each upload the chunks of the index, put together, are compared with what was uploaded; at the end with the text that
the edits give when they are made one after the other, and with what a retriever gives.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_index.core import Document
from llama_index.core.schema import MetadataMode

from benchmarks.cells import number, source, table
from benchmarks.common import Record, parsed, parser, progress, written
from benchmarks.ingest.edits import synthetic
from compllm_rag.config import DEFAULT_EMBEDDER
from compllm_rag.llamaindex.index import ConceptIndex

ID = "shared"
_HOT = 0.1  # share of edits that go to the one sentence that all fight for
_WAIT_S = 600.0


@dataclass(frozen=True)
class Edit:
    """One change, as the seed has it.

    Attributes:
        editor: Who makes it.
        at_s: When, from the start.
        paragraph: Where.
        sentence: Its place there, as a share of the sentences that are there then.
        kind: `replace`, `insert` or `delete`.
        text: The new sentence; no two are alike.
    """

    editor: int
    at_s: float
    paragraph: int
    sentence: float
    kind: str
    text: str


def schedule(editors: int, edits: int, paragraphs: int, seconds: float, seed: int) -> list[Edit]:
    """The edits of all editors, in order of time."""
    draw = random.Random(seed)
    made = []
    for editor in range(editors):
        for number_ in range(edits):
            hot = draw.random() < _HOT
            kind = "replace" if hot else draw.choices(("replace", "insert", "delete"), (7, 2, 1))[0]
            words = " ".join(draw.choices(("gate", "clock", "barge", "kiln", "mast", "well", "attic", "forge"), k=3))
            text = f"Editor {editor} wrote at turn {number_} that the {words} cost {draw.randint(100, 99_999)} crowns."
            where = 0 if hot else 1 + editor % (paragraphs - 1)
            made.append(Edit(editor, seconds * draw.random(), where, 0.0 if hot else draw.random(), kind, text))
    return sorted(made, key=lambda edit: edit.at_s)


@dataclass
class SharedText:
    """The text that all edit; one change at a time.

    Attributes:
        paragraphs: Sentences of each.
        version: How many edits are in it.
    """

    paragraphs: list[list[str]]
    version: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, text: str) -> SharedText:
        """A text with one paragraph in front for the sentence that all fight for."""
        rest = [[f"{part.rstrip('.')}." for part in block.split(". ")] for block in text.strip().split("\n\n")]
        return cls([["Nobody has written here yet."], *rest])

    def apply(self, edit: Edit) -> int:
        """Make an edit; gives the version that has it."""
        sentences = self.paragraphs[edit.paragraph]
        at = min(int(edit.sentence * len(sentences)), len(sentences) - 1)
        if edit.kind == "insert":
            sentences.insert(at + 1, edit.text)
        elif edit.kind == "delete" and len(sentences) > 2:
            del sentences[at]
        else:
            sentences[at] = edit.text
        self.version += 1
        return self.version

    def __str__(self) -> str:
        return "\n\n".join(" ".join(sentences) for sentences in self.paragraphs) + "\n"


@dataclass(frozen=True)
class Upload:
    """What one upload held and cost.

    Attributes:
        versions: The edits that it was the first to hold.
        answerable: When it was committed.
        seconds: How long that took.
        chunks: Chunks of the document.
        added: Those that were new, and are embedded.
        whole: Whether the index then said what was uploaded.
    """

    versions: range
    answerable: float
    seconds: float
    chunks: int
    added: int
    whole: bool


class Session:
    """A document that many edit and upload: one upload at a time, of the newest text.

    Args:
        index: Where it lies.
        text: What is edited.
    """

    def __init__(self, index: ConceptIndex, text: SharedText) -> None:
        self._index, self._text, self._turn = index, text, threading.Lock()
        self._saved = 0
        self.order: list[Edit] = []
        self.edited: dict[int, float] = {}
        self.uploads: list[Upload] = []

    def edit(self, edit: Edit) -> None:
        """Make an edit and see that it is uploaded."""
        with self._text.lock:
            version = self._text.apply(edit)
            self.order.append(edit)
            self.edited[version] = time.perf_counter()
        with self._turn:
            if self._saved < version:
                self._upload()

    def _upload(self) -> None:
        with self._text.lock:
            text, newest = str(self._text), self._text.version
        begun = time.perf_counter()
        receipt = self._index.upload([Document(id_=ID, text=text)])
        now = time.perf_counter()
        versions = range(self._saved + 1, newest + 1)
        self.uploads.append(
            Upload(versions, now, now - begun, receipt.chunks, receipt.chunks_added, said(self._index, text) == text)
        )
        self._saved = newest


def said(index: ConceptIndex, text: str) -> str:
    """What the chunks of the document say, in the order in which they stand in a text."""
    parts = [node.get_content(MetadataMode.NONE) for node in index.faiss.get_nodes() if node.ref_doc_id == ID]
    return put_together(parts, text)


def put_together(parts: Sequence[str], text: str) -> str:
    """Chunks one behind the other, in the order in which they stand in a text."""
    return "".join(sorted(parts, key=text.find))


def simulate(index: ConceptIndex, text: str, edits: Sequence[Edit]) -> dict[str, Any]:
    """Let the editors work, and measure."""
    session = Session(index, SharedText.of(text))
    index.ingest([Document(id_=ID, text=str(session._text))])
    before, begun, errors = index.metrics.work.segments, time.perf_counter(), list[Exception]()

    def work(own: list[Edit]) -> None:
        try:
            for edit in own:
                time.sleep(max(0.0, begun + edit.at_s - time.perf_counter()))
                session.edit(edit)
        except Exception as error:  # noqa: BLE001 - it is raised below, by the thread that reports
            errors.append(error)

    by_editor: dict[int, list[Edit]] = {}
    for edit in edits:
        by_editor.setdefault(edit.editor, []).append(edit)
    threads = [threading.Thread(target=work, args=(own,), daemon=True) for own in by_editor.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_WAIT_S)
    if errors:
        raise errors[0]
    ended = time.perf_counter()
    drained, done = index.uploads.wait(_WAIT_S), time.perf_counter()
    units = index.metrics.work.segments - before
    return _measured(index, session, text, edits) | {
        "editing_s": ended - begun,
        "concepts_after_s": done - ended,
        "all_concepts_made": drained,
        "units_compressed_per_edit": units / len(edits),
    }


def _measured(index: ConceptIndex, session: Session, text: str, edits: Sequence[Edit]) -> dict[str, Any]:
    again = SharedText.of(text)
    for edit in session.order:
        again.apply(edit)
    final = said(index, str(again))
    live = [sentence for paragraph in again.paragraphs for sentence in paragraph]
    latencies = sorted(up.answerable - session.edited[v] for up in session.uploads for v in up.versions)
    # All chunks come back, the nearest first: a vector that lacks its chunk, or a chunk its vector, would be missed.
    retriever = index.as_retriever(similarity_top_k=index.stats()["chunks"])
    nodes = [found.node.get_content() for found in retriever.retrieve("Which editor wrote last?")]
    retrieved = sum(any(sentence in node for node in nodes) for sentence in live)
    uploads = session.uploads
    return {
        "edits": len(edits),
        "uploads": len(uploads),
        "edits_per_upload_most": max(len(up.versions) for up in uploads),
        "answerable_s": {
            "median": statistics.median(latencies),
            "p95": latencies[int(0.95 * (len(latencies) - 1))],
            "most": latencies[-1],
        },
        "upload_s_median": statistics.median(up.seconds for up in uploads),
        "chunks": uploads[-1].chunks,
        "chunks_embedded_per_edit": sum(up.added for up in uploads) / len(edits),
        "chunks_uploaded_per_edit": sum(up.chunks for up in uploads) / len(edits),
        "uploads_not_whole": sum(not up.whole for up in uploads),
        "edits_answered": len(latencies),
        "sentences_lost": sum(sentence not in final for sentence in live),
        "text_is_as_replayed": final == str(again),
        "last_writer_wins": again.paragraphs[0][0] in final,
        "sentences": len(live),
        "sentences_retrieved": retrieved,
    }


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser("editors", __doc__, "llm limit codec embedder", embedder=DEFAULT_EMBEDDER)
    options.add_argument("--editors", type=int, default=100, help="how many edit at once")
    options.add_argument("--edits", type=int, default=3, help="of each")
    options.add_argument("--paragraphs", type=int, default=40, help="of the document, five sentences each")
    options.add_argument("--seconds", type=float, default=60.0, help="over which the edits are spread")
    options.add_argument("--seed", type=int, default=0, help="of texts, places and times")
    args = parsed(options, argv)
    edits = schedule(args.editors, args.edits, args.paragraphs + 1, args.seconds, args.seed)[: args.limit]
    with (
        tempfile.TemporaryDirectory() as folder,
        ConceptIndex.create(Path(folder) / "s", llm=args.llm, embedder=args.embedder, codec=args.codec) as index,
    ):
        found = simulate(index, synthetic(args.paragraphs, args.seed), edits)
        tokens = index.stats()["source_tokens"]
    progress(f"{found['edits']} edits in {found['uploads']} uploads: {found['answerable_s']['median']:.2f} s each")
    settings = {name: getattr(args, name) for name in ("editors", "paragraphs", "seconds", "seed")}
    return written(args, {"llm": args.llm, "codec": args.codec, "source_tokens": tokens, **settings, **found})


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    waits, rows = record["answerable_s"], []
    rows.append(["edits, in uploads", f"{record['edits']}, {record['uploads']}"])
    rows.append(["edit to answerable, s: median (95th percentile, most)",
                 f"{number(waits['median'], 2)} ({number(waits['p95'], 2)}, {number(waits['most'], 2)})"])  # fmt: skip
    rows.append(["chunks for an edit: uploaded", number(record["chunks_uploaded_per_edit"], 2)])
    rows.append(["of these embedded again", number(record["chunks_embedded_per_edit"], 2)])
    rows.append(["units compressed (those replaced before their turn are not)",
                 number(record["units_compressed_per_edit"], 2)])  # fmt: skip
    rows.append(["all concepts made after the last edit, s", number(record["concepts_after_s"])])
    rows.append(["sentences lost", str(record["sentences_lost"])])
    rows.append(["text as the edits give it", "yes" if record["text_is_as_replayed"] else "NO"])
    rows.append(["sentences that a retriever gives", f"{record['sentences_retrieved']} of {record['sentences']}"])
    return [
        "## Many editors of one document",
        "",
        "### Within one process",
        "",
        f"{record['editors']} editors of one document of {record['source_tokens']:,} tokens, their edits spread over "
        f"{record['seconds']:g} s; one upload at a time, of the newest text.",
        "",
        f"{source(record)}.",
        "",
        *table(["what", "measured"], rows),
    ]
