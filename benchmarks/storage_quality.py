"""What do answers lose when concepts are stored in fewer bits?

The questions of a file are asked with passages as text, as concepts in fp16, int8 and int4, and without passages, all
the same questions. Differences to fp16 are paired; their intervals are bootstrap 95 % intervals over questions. What
is done is kept beside the result (OUT.records.jsonl), so it can be interrupted and run again.
`python -m benchmarks.report` puts them into docs/storage.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import parser, progress, write
from compllm_rag.compression.loading import load_compressor_for
from compllm_rag.evaluation.journal import Journal
from compllm_rag.evaluation.questions import read_questions
from compllm_rag.evaluation.results import EvalConfig, EvalResult
from compllm_rag.evaluation.runner import evaluate_many
from compllm_rag.store.encodings import ENCODINGS

_RESAMPLES = 1000


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


def measure(
    compressor: Any, path: Path, rates: Sequence[float], config: EvalConfig, journal: Journal
) -> dict[str, Any]:
    """All encodings at all rates, on the same questions."""
    settings: list[Any] = [("text", None), ("none", None)]
    settings += [("concepts", rate, name) for rate in rates for name in ENCODINGS]
    last: list[str] = []

    def show(message: str, share: float | None) -> None:
        if [message] != last:
            last[:] = [message]
            progress(message)

    found = evaluate_many(
        compressor, read_questions(path), settings, config=config, data=path.name, progress=show, journal=journal
    )
    text, none, rows = found[0], found[1], []
    for (_, rate, name), result in zip(settings[2:], found[2:], strict=True):
        fp16 = next(r for s, r in zip(settings, found, strict=True) if s == ("concepts", rate, "fp16"))
        row = {"rate": rate, "encoding": name, "to_fp16": differences(result, fp16, text, none)}
        rows.append(row | result.to_dict())
    return {"text": text.to_dict(), "none": none.to_dict(), "results": rows}


def main() -> None:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="file of questions")
    options.add_argument("--limit", type=int, help="questions, the first of a seeded order")
    options.add_argument("--rates", type=float, nargs="+", default=[2.0])
    options.add_argument("--reader", default="auto", help="folder of a reader, auto or none")
    options.add_argument("--compressor", default="auto", help="folder of a compressor, auto or none")
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--no-answers", action="store_true", help="likelihoods alone")
    args = options.parse_args()
    compressor = load_compressor_for(
        args.llm,
        reader=None if args.reader == "none" else args.reader,
        compressor=None if args.compressor == "none" else args.compressor,
    )
    config = EvalConfig(limit=args.limit, batch_size=args.batch_size, generate=not args.no_answers)
    record = {
        "llm": args.llm,
        "fingerprint": compressor.fingerprint,
        "trained": bool(compressor.head.weight.any()),
        "data": args.data.name,
    }
    journal = Journal(args.json.with_suffix(".records.jsonl") if args.json else None)
    write(record | measure(compressor, args.data, args.rates, config, journal), args.json)


if __name__ == "__main__":
    main()
