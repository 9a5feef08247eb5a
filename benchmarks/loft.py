"""Does retrieval with concepts answer a large corpus as retrieval with text does? RAG sets of LOFT.

The corpus is ingested into a storage, the top k documents of each question are retrieved from it, and the question is
answered with them as text, as concepts, and without any. Recall of the gold documents stands beside. `--in-context`
puts the whole corpus into the prompt instead (corpus in context), which wants an LLM with a long window and a GPU.

What is done is kept in the JSON after every k, and not done again for the same settings.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core import Document

from benchmarks.common import parser, progress, write
from benchmarks.loft_data import LoftSet, Query, load
from benchmarks.loft_metrics import multi_value, single_value
from compllm_rag import ConceptIndex
from compllm_rag.compressor import Compressor
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import CompLLMError
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Segmented, Setting
from compllm_rag.evaluation.results import EvalConfig, EvalResult
from compllm_rag.evaluation.runner import evaluate_many, in_seeded_order
from compllm_rag.evaluation.statistics import Record
from compllm_rag.questions import Question

RECALL_AT = (1, 2, 5, 10)
DEFAULT_DATA = "eval/loft_nq_128k"
_RESAMPLES = 1000
_KEPT = ("n", "em", "f1", "subspan_em", "nll", "recovered", "positions", "achieved_rate", "intervals", "paired")


def open_storage(loft: LoftSet, folder: Path, llm: str, embedder: str | None) -> ConceptIndex:
    """The storage of a corpus; documents that are in it already are left as they are."""
    options: dict[str, Any] = {"llm": llm} | ({"embedder": embedder} if embedder else {})
    index = ConceptIndex.create(folder, **options)
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
    return [loft.ask(query, [loft.documents[name] for name in ranked[query.id][:k]]) for query in queries]


def scores(loft: LoftSet, queries: dict[str, Query], records: Iterable[Record], seed: int = 0) -> dict[str, Any]:
    """LOFT's metrics over the records of a setting, each with its bootstrap 95 % interval over questions."""
    score = multi_value if loft.multi_value else single_value
    rows = [score(record.answer or "", queries[record.id].answers) for record in records]
    drawn = np.random.default_rng(seed).integers(0, len(rows), size=(_RESAMPLES, len(rows)))
    made = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
        made[name] = {"value": float(values.mean()), "interval": [float(low), float(high)]}
    return made


def tenths() -> Callable[[str, float | None], None]:
    """Progress in tenths, each shown once."""
    last: list[Any] = [None]

    def show(message: str, share: float | None) -> None:
        now = (message.split(",")[0], int(10 * (share or 0)))
        if now != last[0]:
            last[0] = now
            progress(f"{message}, {10 * now[1]} %")

    return show


def in_context(loft: LoftSet, compressor: Compressor, queries: list[Query], settings: list[Any], config: Any) -> Any:
    """All documents in one prompt, in the order of the file; or why that cannot be."""
    everything, segmented = list(loft.documents.values()), Segmented(compressor)
    generation = GenerationConfig(max_new_tokens=config.max_new_tokens)
    made = []
    for mode, rate in settings:
        asker = Asker(compressor, Setting.of(mode, rate), segmented, generation)
        needed, window = max(asker.room(loft.ask(query, everything)) for query in queries), asker.window
        row = {"mode": mode, "rate": rate, "positions": needed, "window": window}
        if needed > window:
            made.append(row | {"left_out": f"the prompt takes {needed} positions, the LLM reads {window}"})
            continue
        # Not `evaluate_many`: it leaves out what does not fit as text, and reads the text again for every setting.
        asked = [loft.ask(query, everything) for query in queries]
        records = asker.ask(asked, batch_size=1, answer=True, progress=lambda _: None)
        made.append(row | {"loft": scores(loft, {q.id: q for q in queries}, records)})
    return made


def _values(result: EvalResult) -> dict[str, Any]:
    return {name: value for name, value in result.to_dict().items() if name in _KEPT}


def main() -> None:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--data-dir", type=Path, help=f"holds {DEFAULT_DATA}")
    options.add_argument("--loft", type=Path, help="folder rag/SET/SIZE in LOFT's layout, in place of --data-dir")
    options.add_argument("--split", default="dev")
    options.add_argument("--embedder", help="retrieval embedder; default: the embedded one")
    options.add_argument("--storage", type=Path, help="keep the storage there (default: a temporary folder)")
    options.add_argument("--ks", type=int, nargs="+", default=[1, 5], help="documents read")
    options.add_argument("--rates", type=float, nargs="+", default=[2.0, 4.0])
    options.add_argument("--limit", type=int, help="ask only N questions, in seeded order")
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--max-new-tokens", type=int, default=24)
    options.add_argument("--in-context", action="store_true", help="the whole corpus in the prompt, no retrieval")
    args = options.parse_args()
    if args.loft is None and args.data_dir is None:
        options.error("--data-dir or --loft is needed")
    loft = load(args.loft or args.data_dir / DEFAULT_DATA, args.split)
    queries = in_seeded_order(loft.queries, limit=args.limit)
    config = EvalConfig(batch_size=args.batch_size, max_new_tokens=args.max_new_tokens)
    settings: list[tuple[str, float | None]] = [("text", None), *(("concepts", rate) for rate in args.rates)]
    with tempfile.TemporaryDirectory() as scratch:
        index = open_storage(loft, args.storage or Path(scratch) / "storage", args.llm, args.embedder)
        compressor = index.compressor
        base = {
            "set": loft.name,
            "note": loft.note,
            "documents": len(loft.documents),
            "n": len(queries),
            "llm": compressor.llm.source,
            "fingerprint": compressor.fingerprint,
            "embedder": index.manifest.embedder,
        }
        if args.in_context:
            rows = in_context(loft, compressor, queries, settings, config)
            write({**base, "in_context": rows}, args.json)
            return
        ranked = ranking(index, queries, max([*RECALL_AT, *args.ks]))
        index.close()
    same = {**base, "rates": args.rates, "max_new_tokens": args.max_new_tokens}
    done = _done(args.json, same)
    for k in args.ks:
        if str(k) not in done:
            done[str(k)] = _one(loft, compressor, queries, passages(loft, queries, ranked, k), settings, config)
        found = {str(k): done[str(k)] for k in args.ks if str(k) in done}
        record = {**same, "recall": recall(queries, ranked), "top": found}
        if args.json is not None and k != args.ks[-1]:
            args.json.write_text(json.dumps(record), encoding="utf-8")
    write(record, args.json)


def _done(path: Path | None, same: dict[str, Any]) -> dict[str, Any]:
    """What a former run with the same settings has finished."""
    if path is None or not path.exists():
        return {}
    try:
        former: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return dict(former.get("top", {})) if {name: former.get(name) for name in same} == same else {}


def _one(
    loft: LoftSet,
    compressor: Compressor,
    queries: list[Query],
    asked: list[Question],
    settings: list[tuple[str, float | None]],
    config: EvalConfig,
) -> list[dict[str, Any]]:
    """All settings over the same documents, and no documents."""
    try:
        results = evaluate_many(compressor, asked, [*settings, ("none", None)], config=config, progress=tenths())
    except CompLLMError as error:
        return [{"left_out": str(error)}]
    known = {query.id: query for query in queries}
    return [
        {
            "mode": r.mode,
            "rate": r.rate,
            **_values(r),
            "loft": scores(loft, known, r.records),
            "skipped": len(r.skipped),
        }
        for r in results
    ]


if __name__ == "__main__":
    main()
