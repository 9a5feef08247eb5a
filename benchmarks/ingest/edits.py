"""What does an edit cost, against the first ingest?

In three of the sample's articles, in all of them as one storage, and in a synthetic text, one sentence is inserted,
deleted or changed, and the document is ingested again: segments compressed, chunks embedded, and the time as a share of
the first ingest (models loaded, commit and fsync included). Then a real text's revisions (data/) are ingested one after
the other: the share of segments that needed no compression, beside the share of its text that lies in sentences an
earlier revision had.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
import re
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_index.core import Document
from llama_index.core.base.embeddings.base import BaseEmbedding

from benchmarks.cells import number, table
from benchmarks.common import Record, parsed, parser, progress, texts, timed, trained_like, written
from compllm_rag.compression.compressor import Compressor
from compllm_rag.config import DEFAULT_EMBEDDER
from compllm_rag.llamaindex.embedding import load_embedder
from compllm_rag.llamaindex.index import ConceptIndex

REVISIONS = Path(__file__).parent / "data" / "flask_quickstart.json.gz"
KINDS = ("inserted", "deleted", "changed")
MOST, GOAL_SHARE = 3, 0.02
_SENTENCE_END = re.compile(r"(?:(?<=[a-z)][.!?])|(?<=[a-z][.!?][\"”]))\s+|\n[^\S\n]*\n\s*")


def sentences(text: str) -> list[str]:
    """A text cut behind its sentences; joined they are the text."""
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(ends) if a < b]


def edited(text: str, kind: str, number: int, of: int) -> str:
    """The text with one of its sentences edited, at the `number`-th of `of` places spread over it."""
    parts = sentences(text)
    usable = [i for i in range(1, len(parts) - 1) if len(parts[i]) > 40 and parts[i][0].isupper()] or [len(parts) // 2]
    at = usable[(2 * number + 1) * len(usable) // (2 * of)]
    if kind == "deleted":
        del parts[at]
    elif kind == "inserted":
        parts.insert(at, f"Note {number} was added here by a later hand, and says little. ")
    else:
        words = parts[at].split(" ")
        words[len(words) // 2] = f"allegedly-{number}"
        parts[at] = " ".join(words)
    return "".join(parts)


def synthetic(paragraphs: int, seed: int = 0) -> str:
    """Paragraphs of five sentences of made-up facts, no two alike."""
    draw = random.Random(seed)
    things = ("valve", "ledger", "harbour", "beacon", "turbine", "orchard", "archive", "signal", "ferry", "quarry")
    verbs = ("replaced", "measured", "painted", "abandoned", "repaired", "inspected", "flooded")
    places = ("the north wall", "the old bridge", "the customs house", "the upper lock", "the salt works", "the mill")

    def sentence() -> str:
        year, thing, verb = draw.randint(1700, 1990), draw.choice(things), draw.choice(verbs)
        return f"In {year} the {thing} near {draw.choice(places)} was {verb} for {draw.randint(12, 9800)} crowns."

    return "\n\n".join(" ".join(sentence() for _ in range(5)) for _ in range(paragraphs)) + "\n"


@contextmanager
def storage(compressor: Compressor, embedder: BaseEmbedding) -> Iterator[ConceptIndex]:
    """A new storage on disk."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ConceptIndex.create(Path(folder) / "s", compressor=compressor, embedder=embedder) as index,
    ):
        yield index


def measure_edits(index: ConceptIndex, documents: list[Document], target: int, repeats: int) -> dict[str, Any]:
    """Ingest, then edit one document at several places and in all ways; every edit starts from the first state."""
    first_s = timed(lambda: index.ingest(documents))
    before = index.stats()
    original = documents[target]
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        for place in range(repeats):
            text = edited(original.text, kind, place, repeats)
            index.ingest(documents)
            nodes = {node.node_id for node in index.faiss.get_nodes()}
            again = [*documents[:target], Document(id_=original.id_, text=text), *documents[target + 1 :]]
            work = index.metrics.work.segments
            seconds = timed(lambda again=again: index.ingest(again))  # type: ignore[misc]
            made = {node.node_id for node in index.faiss.get_nodes()} - nodes
            compressed = index.metrics.work.segments - work
            rows.append({"kind": kind, "segments": compressed, "chunks": len(made), "seconds": seconds})
    shares = [row["seconds"] / first_s for row in rows]
    return {
        "source_tokens": before["source_tokens"],
        "segments": before["segments"],
        "chunks": before["chunks"],
        "first_ingest_s": first_s,
        "edits": rows,
        "most_segments": max(row["segments"] for row in rows),
        "most_chunks": max(row["chunks"] for row in rows),
        "share_of_first": {"median": statistics.median(shares), "min": min(shares), "max": max(shares)},
        "within": {
            "segments": all(row["segments"] <= MOST for row in rows),
            "chunks": all(row["chunks"] <= MOST for row in rows),
            "time": statistics.median(shares) <= GOAL_SHARE,
        },
    }


def revisions(path: Path) -> list[tuple[str, str]]:
    """Names and texts of a shipped history; each text is checked against its digest."""
    held = json.loads(gzip.decompress(path.read_bytes()))
    made = []
    for revision in held["revisions"]:
        text = "".join(held["lines"][i] for i in revision["lines"])
        if hashlib.sha256(text.encode()).hexdigest() != revision["sha256"]:
            raise ValueError(f"{path} is damaged: revision {revision['version']} fails its SHA-256")
        made.append((revision["version"], text))
    return made


def replay(index: ConceptIndex, history: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Ingest revision after revision under one id."""
    known, rows = set[str](), []
    for name, text in history:
        cut = sentences(text)
        same = sum(len(sentence) for sentence in cut if sentence in known)
        known.update(cut)
        nodes = {node.node_id for node in index.faiss.get_nodes()}
        begun = index.metrics.work.segments
        seconds = timed(lambda text=text: index.ingest([Document(id_="page", text=text)]))  # type: ignore[misc]
        compressed, segments = index.metrics.work.segments - begun, index.stats()["segments"]
        now = {node.node_id for node in index.faiss.get_nodes()}
        rows.append(
            {
                "revision": name,
                "segments": segments,
                "segments_compressed": compressed,
                "share_reused": 1 - compressed / segments,
                "share_of_text_known": same / len(text),
                "chunks": len(now),
                "share_of_chunks_kept": len(now & nodes) / len(now),
                "seconds": seconds,
            }
        )
        progress(f"revision {name}: {compressed} of {segments} segments compressed, {seconds:.2f} s")
    return rows


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser("edits", __doc__, "llm repeats texts embedder", embedder=DEFAULT_EMBEDDER)
    options.add_argument("--synthetic", type=int, default=100, help="paragraphs of the synthetic text")
    options.add_argument("--revisions", type=int, help="replay only the first N revisions")
    args = parsed(options, argv)
    compressor, embedder = trained_like(args.llm), load_embedder(args.embedder)[0]
    articles = [Document(id_=f"article-{i}", text=text) for i, text in enumerate(texts(args.texts))]
    chosen = [articles[i * len(articles) // 3] for i in range(3)]
    cases = {document.id_: ([document], 0) for document in chosen}
    cases["synthetic"] = ([Document(id_="synthetic", text=synthetic(args.synthetic))], 0)
    cases["all articles"] = (articles, len(articles) // 2)
    with storage(compressor, embedder) as index:  # what happens once in a process is no part of the first ingest
        index.ingest([Document(id_="warm", text=articles[0].text[:2000])])
    result: dict[str, Any] = {"llm": args.llm, "repeats": args.repeats, "texts": {}}
    for name, (documents, target) in cases.items():
        with storage(compressor, embedder) as index:
            row = result["texts"][name] = measure_edits(index, documents, target, args.repeats)
        progress(
            f"{name}: at most {row['most_segments']} segments and {row['most_chunks']} chunks, "
            f"{100 * row['share_of_first']['median']:.1f} % of {row['first_ingest_s']:.1f} s"
        )
    with storage(compressor, embedder) as index:
        result["revisions"] = replay(index, revisions(REVISIONS)[: args.revisions])
    return written(args, result)


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    rows = []
    for name, row in record["texts"].items():
        share = row["share_of_first"]
        spread = f"{100 * share['median']:.1f} % ({100 * share['min']:.1f} to {100 * share['max']:.1f})"
        cells = [name, f"{row['source_tokens']:,}", f"{number(row['first_ingest_s'])} s"]
        rows.append([*cells, str(row["most_segments"]), str(row["most_chunks"]), spread])
    head = ["text", "tokens", "first ingest", "segments again, most", "chunks again, most", "time of the first"]
    later = [100 * row["share_reused"] for row in record["revisions"][1:]]
    reused = (
        f"Revisions of a real text, {len(later)} after the first: {statistics.fmean(later or [0]):.0f} % of segments"
    )
    lines = ["## One sentence changed", "", *table(head, rows)]
    return [*lines, f"{reused} reused.", "", "![Share of segments reused per revision](revisions.png)", ""]


def plot(record: Record) -> Any:
    """What was reused of each revision but the first."""
    from matplotlib.figure import Figure

    later = record["revisions"][1:]
    figure = Figure(figsize=(9, 4), layout="tight")
    axes = figure.subplots()
    places = range(len(later))
    axes.bar(places, [100 * row["share_reused"] for row in later], color="#4c78a8", label="segments reused")
    known = [100 * row["share_of_text_known"] for row in later]
    axes.plot(places, known, "k_", markersize=16, label="text in sentences seen before")
    axes.set_xticks(list(places), [row["revision"] for row in later], rotation=45)
    axes.set(ylim=(0, 100), xlabel="Flask release whose docs/quickstart.rst is ingested", ylabel="percent")
    axes.legend(loc="lower right")
    return figure
