"""Does retrieval with concepts answer a large corpus as retrieval with text does? RAG sets of LOFT.

The corpus is ingested into a storage, the top k documents of each question are retrieved from it, and the question is
answered with them as text, as concepts, and without any. Recall of the gold documents stands beside. `--in-context`
puts the whole corpus into the prompt instead (corpus in context), which wants an LLM with a long window and a GPU; for
an LLM that cannot read it the JSON says so.

What is done is kept beside the JSON after every k or setting (OUT.records.jsonl), and not done again.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core import Document

from benchmarks.common import Record, Tenths, journal_of, parsed, parser, part, progress, written
from benchmarks.loft.data import LoftSet, Query, load
from benchmarks.loft.in_context import CONTEXT_TOKENS, corpus_in_context, read_by
from benchmarks.loft.metrics import scores
from benchmarks.loft.prompts import ALL_OF_THEM
from compllm_rag import ConceptIndex
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.errors import CompLLMError
from compllm_rag.evaluation.questions import Question
from compllm_rag.evaluation.results import EvalConfig, EvalResult
from compllm_rag.evaluation.runner import evaluate_many, in_seeded_order

RECALL_AT = (1, 2, 5, 10)
DEFAULT_DATA = "eval/loft_nq_128k"
# Tokens of an answer: one value, or a list.
VALUE_TOKENS, LIST_TOKENS = 24, 96
_KEPT = ("n", "em", "f1", "subspan_em", "nll", "recovered", "positions", "achieved_rate", "intervals", "paired")


def open_storage(loft: LoftSet, folder: Path, args: Namespace) -> ConceptIndex:
    """The storage of a corpus; documents that are in it already are left as they are."""
    options: dict[str, Any] = {"embedder": args.embedder} if args.embedder else {}
    index = ConceptIndex.create(folder, llm=args.llm, codec=args.codec, dtype=args.dtype, **options)
    documents = [
        Document(text=passage.text, id_=name, metadata={"title": passage.title})
        for name, passage in loft.documents.items()
    ]
    progress(f"{len(documents)} documents into the storage; what is there already is skipped")
    index.ingest(documents, progress=lambda report: progress(f"{report.documents} documents, {report.chunks} chunks"))
    return index


def ranking(index: ConceptIndex, queries: Iterable[Query], n: int) -> dict[str, list[str]]:
    """The first n documents of each query, best chunk first."""
    retriever = index.as_retriever(similarity_top_k=3 * n)
    found: dict[str, list[str]] = {}
    for query in queries:
        names = [str(node.node.ref_doc_id) for node in retriever.retrieve(query.question)]
        found[query.id] = list(dict.fromkeys(names))[:n]
    return found


def recall(queries: Iterable[Query], ranked: dict[str, list[str]]) -> dict[str, float]:
    """Percent of queries whose gold documents are all among the first k; queries without gold do not count."""
    known = [query for query in queries if query.gold]
    return {
        str(k): 100 * float(np.mean([set(q.gold) <= set(ranked[q.id][:k]) for q in known])) for k in RECALL_AT if known
    }


def passages(loft: LoftSet, queries: Iterable[Query], ranked: dict[str, list[str]], k: int) -> list[Question]:
    """Questions over their first k documents."""
    request = ALL_OF_THEM if loft.multi_value else ""
    return [loft.ask(query, [loft.documents[name] for name in ranked[query.id][:k]], request) for query in queries]


def _values(result: EvalResult) -> dict[str, Any]:
    return {name: value for name, value in result.to_dict().items() if name in _KEPT}


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser("loft", __doc__, "llm data-dir limit rates codec dtype embedder batch-size")
    options.add_argument("--loft", type=Path, help="folder rag/SET/SIZE in LOFT's layout, in place of --data-dir")
    options.add_argument("--split", default="dev")
    options.add_argument("--storage", type=Path, help="keep the storage there (default: a temporary folder)")
    options.add_argument("--ks", type=int, nargs="+", default=[1, 5], help="documents read")
    options.add_argument(
        "--max-new-tokens",
        type=int,
        help=f"default: {VALUE_TOKENS}, {LIST_TOKENS} where lists are asked for, {CONTEXT_TOKENS} with --in-context",
    )
    options.add_argument("--in-context", action="store_true", help="the whole corpus in the prompt, no retrieval")
    args = parsed(options, argv)
    if args.loft is None and args.data_dir is None:
        options.error("--data-dir or --loft is needed")
    folder = args.loft or args.data_dir / DEFAULT_DATA
    loft = load(folder, args.split)
    queries = in_seeded_order(loft.queries, limit=args.limit)
    settings: list[tuple[str, float | None]] = [("text", None), *(("concepts", rate) for rate in args.rates)]
    base = {"set": loft.name, "note": loft.note, "documents": len(loft.documents), "n": len(queries)}
    if not loft.note:
        base["split"] = args.split
    if args.in_context:
        return written(args, corpus_in_context(args, loft, queries, settings, base, folder))
    return written(args, _retrieved(args, loft, queries, settings, base))


def _retrieved(
    args: Namespace, loft: LoftSet, queries: list[Query], settings: list[Any], base: dict[str, Any]
) -> dict[str, Any]:
    """Recall, and answers over the first k documents."""
    longest = args.max_new_tokens or (LIST_TOKENS if loft.multi_value else VALUE_TOKENS)
    config = EvalConfig(batch_size=args.batch_size, max_new_tokens=longest)
    with tempfile.TemporaryDirectory() as scratch:
        index = open_storage(loft, args.storage or Path(scratch) / "storage", args)
        compressor, embedder = index.compressor, index.manifest.embedder
        ranked = ranking(index, queries, max([*RECALL_AT, *args.ks]))
        index.close()
    same = {**base, **read_by(compressor), "embedder": embedder, "rates": args.rates, "max_new_tokens": longest}
    journal = journal_of(args.json, same)

    def one(k: int) -> list[dict[str, Any]]:
        return _one(loft, compressor, queries, passages(loft, queries, ranked, k), settings, config)

    top = {str(k): part(journal, f"top {k}", partial(one, k)) for k in args.ks}
    return {**same, "recall": recall(queries, ranked), "top": top}


def _one(
    loft: LoftSet,
    compressor: ConceptCompressor,
    queries: list[Query],
    asked: list[Question],
    settings: list[tuple[str, float | None]],
    config: EvalConfig,
) -> list[dict[str, Any]]:
    """All settings over the same documents, and no documents."""
    try:
        results = evaluate_many(compressor, asked, [*settings, ("none", None)], config=config, progress=Tenths())
    except CompLLMError as error:
        return [{"left_out": str(error)}]
    known = {query.id: query for query in queries}
    return [
        {"mode": r.mode, "rate": r.rate, **_values(r)}
        | {"loft": scores(loft, known, r.records), "skipped": len(r.skipped)}
        for r in results
    ]
