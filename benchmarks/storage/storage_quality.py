"""What do answers lose when concepts are stored in fewer bits?

The questions of a file are asked with passages as text, as concepts in fp16, int8 and int4, and without passages, all
the same questions. Differences to fp16 are paired; their intervals are bootstrap 95 % intervals over questions. What
is done is kept beside the result (OUT.records.jsonl), so it can be interrupted and run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cells import difference, measured, number, table
from benchmarks.common import Record, Tenths, any_compressor_of, dtype_of, journal_of, parsed, parser, written
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.evaluation.journal import Journal
from compllm_rag.evaluation.questions import read_questions
from compllm_rag.evaluation.results import EvalConfig, EvalResult
from compllm_rag.evaluation.runner import evaluate_many
from compllm_rag.store.encodings import ENCODINGS, deep_encoding, encoding_named

_RESAMPLES = 1000
_GAINS = ["recovered", "to fp16", "F1", "to fp16"]


def differences(one: EvalResult, fp16: EvalResult, text: EvalResult, none: EvalResult, seed: int = 0) -> dict[str, Any]:
    """Recovered and F1 of one encoding less those of fp16, in points, each with its interval."""
    tokens = np.array([record.n_tokens for record in fp16.records], dtype=np.float64)
    mine, other, best, worst = (
        np.array([record.nll for record in result.records]) * tokens for result in (one, fp16, text, none)
    )
    drawn = np.random.default_rng(seed).integers(0, len(tokens), size=(_RESAMPLES, len(tokens)))
    made: dict[str, Any] = {"recovered": None, "f1": None}
    if fp16.recovered is not None:
        gains, losses = (worst - best)[drawn].sum(1), (other - mine)[drawn].sum(1)
        made["recovered"] = _with(100 * float((other - mine).sum() / (worst - best).sum()), 100 * losses / gains)
    pairs = [(a.f1, b.f1) for a, b in zip(one.records, fp16.records, strict=True)]
    change = np.array([a - b for a, b in pairs if a is not None and b is not None])
    if len(change) == len(pairs):
        made["f1"] = _with(float(change.mean()), change[drawn].mean(1))
    return made


def _with(value: float, drawn: np.ndarray) -> dict[str, Any]:
    return {"difference": value, "interval": np.percentile(drawn, [2.5, 97.5]).tolist()}


def concept_bytes(compressor: ConceptCompressor, name: str) -> int:
    """Bytes of one concept's record in an encoding, without the key and the index."""
    written_as = deep_encoding(name) if compressor.config.deep else name
    return encoding_named(written_as).nbytes(1, compressor.spec.width)


def measure(
    compressor: ConceptCompressor, path: Path, rates: Sequence[float], config: EvalConfig, journal: Journal
) -> dict[str, Any]:
    """All encodings at all rates, on the same questions."""
    settings: list[Any] = [("text", None), ("none", None)]
    settings += [("concepts", rate, name) for rate in rates for name in ENCODINGS]
    found = evaluate_many(
        compressor, read_questions(path), settings, config=config, data=path.name, progress=Tenths(), journal=journal
    )
    text, none, rows = found[0], found[1], []
    for (_, rate, name), result in zip(settings[2:], found[2:], strict=True):
        fp16 = next(r for s, r in zip(settings, found, strict=True) if s == ("concepts", rate, "fp16"))
        row = {"rate": rate, "encoding": name, "to_fp16": differences(result, fp16, text, none)}
        row["bytes_per_token"] = concept_bytes(compressor, name) / (result.achieved_rate or rate)
        rows.append(row | result.to_dict())
    return {"text": text.to_dict(), "none": none.to_dict(), "results": rows}


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser(
        "storage_quality",
        __doc__,
        "llm limit rates reader compressor codec entry-layer dtype batch-size",
        rates=[1.0, 2.0],
    )
    options.add_argument("--data", type=Path, required=True, help="file of questions")
    options.add_argument("--no-answers", action="store_true", help="likelihoods alone")
    args = parsed(options, argv)
    compressor = any_compressor_of(args)
    config = EvalConfig(limit=args.limit, batch_size=args.batch_size, generate=not args.no_answers)
    same = {
        "llm": args.llm,
        "fingerprint": compressor.fingerprint,
        "dtype": dtype_of(compressor),
        "trained": compressor.config.trained,
        "entry_layer": compressor.config.entry_layer,
        "data": args.data.name,
    }
    return written(args, same | measure(compressor, args.data, args.rates, config, journal_of(args.json, same)))


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    text, none, rows = record["text"], record["none"], []
    sized = all("bytes_per_token" in row for row in record["results"])
    for row in record["results"]:
        cells = [f"{row['rate']:g}", row["encoding"]]
        cells += [number(row["bytes_per_token"], 0)] if sized else []
        cells.append(f"{row['nll']:.4f}")
        for name in ("recovered", "f1"):
            cells += [number(row[name]), difference(row["to_fp16"][name] if row["encoding"] != "fp16" else None, 2)]
        rows.append(cells)
    kind, deep = "trained", record.get("entry_layer", 0)
    if not record["trained"]:
        kind = "untrained" if deep else "untrained, its concepts are the embeddings of anchors"
    return [
        "## What fewer bits cost deep concepts" if deep else "## What fewer bits cost",
        "",
        f"{measured(record)}: {text['n']} questions of {record['data']}, {record['llm']} with its reader and "
        f"compressor ({kind}). NLL is {text['nll']:.3f} nats per token with text and {none['nll']:.3f} without "
        "passages. Differences to fp16, in points, are paired; brackets are bootstrap 95 % intervals over questions.",
        "",
        *table(["rate", "encoding", *(["bytes / token"] if sized else []), "NLL", *_GAINS], rows),
    ]
