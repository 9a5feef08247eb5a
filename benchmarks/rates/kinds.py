"""What policies choose by kind of text, and what they expect to lose by it; no LLM reads anything.

Kinds are the plain texts of the data folder, the package's own source code, logs and tables made by rule (no file of
them ships), and the passages of the fidelity probes. Texts are cut into chunks as ingestion cuts them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compllm_rag
from benchmarks.rates.rows import ARTICLE, ARTICLES_BANDS
from compllm_rag.compression.rate_policies.choosing import RateChooser, best_losses, chooser_of
from compllm_rag.compression.rate_policies.guard import ExactGuard, LossGuard
from compllm_rag.compression.rate_policies.measures import TextMeasures
from compllm_rag.compression.segmentation import chunk_texts
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import IngestConfig, RateOptions
from compllm_rag.evaluation.bodies import Segmented
from compllm_rag.evaluation.probes import probe_file
from compllm_rag.evaluation.questions import read_rows
from compllm_rag.evaluation.runner import in_seeded_order

_TITLES = {
    "novels": "novels",
    "pubmed_abstracts": "biomedical abstracts (PubMed)",
    "python_docs": "code documentation (Python)",
    "wikipedia_2wiki": "encyclopedia (Wikipedia)",
}
_CHARACTERS = 20_000  # of a text that are cut into chunks: there are more texts, and novels are long
_MADE, _LINES = 12, 60  # texts made by rule of each kind, and lines of each


def texts_by_kind(data_dir: Path, probes: Sequence[str]) -> dict[str, list[str]]:
    """Texts by the title of their kind.

    Args:
        data_dir: Its `text/*.jsonl.gz` are a kind each; there may be none.
        probes: Kinds of fidelity probes.
    """
    found = {}
    for path in sorted((data_dir / "text").glob("*.jsonl*")):
        name = path.name.split(".")[0]
        found[_TITLES.get(name, name)] = [str(row.get("text") or "") for _, row in read_rows(path)]
    package = Path(compllm_rag.__file__).parent
    # Benchmarks lie within an installed package, and beside it in a checkout.
    code = [path for path in sorted(package.rglob("*.py")) if "_bench" not in path.relative_to(package).parts]
    found["source code (this package)"] = [path.read_text(encoding="utf-8") for path in code]
    found["logs, made by rule"] = [log(seed) for seed in range(_MADE)]
    found["tables, made by rule"] = [number_table(seed) for seed in range(_MADE)]
    rows = [row for _, row in read_rows(probe_file())]
    for kind in probes:
        found[f"probes: {kind}"] = [str(row["context"]) for row in rows if row["kind"] == kind]
    return found


def log(seed: int) -> str:
    """Lines as a server logs them: when, who, what, which request, how long."""
    rng = random.Random(seed)
    second, lines = rng.randrange(40_000), []
    for _ in range(_LINES):
        second += rng.randrange(1, 90)
        when = (
            f"2024-03-{second // 86_400 + 1:02d}T{second // 3600 % 24:02d}:{second // 60 % 60:02d}:{second % 60:02d}Z"
        )
        level, what = rng.choice([
            ("INFO", "request served"), ("INFO", "cache refreshed"), ("WARN", "retry after timeout"),
            ("ERROR", "connection refused by upstream"),
        ])  # fmt: skip
        lines.append(
            f"{when} {level} [worker-{rng.randrange(8)}] {what} id={rng.getrandbits(32):08x} "
            f"status={rng.choice([200, 204, 404, 503])} took={rng.randrange(1, 4000)}ms"
        )
    return "\n".join(lines)


def number_table(seed: int) -> str:
    """Rows of a CSV file: a place, a year, and what was counted there."""
    rng = random.Random(seed)
    lines = ["place,year,people,households,area_km2,share"]
    for _ in range(_LINES):
        place = rng.choice(["North Quay", "Millbrook", "Harrow Lane", "Stonegate", "Eastmoor"])
        people = rng.randrange(200, 90_000)
        lines.append(
            f"{place},{rng.randrange(1950, 2024)},{people},{people * 10 // rng.randrange(21, 34)},"
            f"{rng.uniform(1, 90):.2f},{rng.random():.4f}"
        )
    return "\n".join(lines)


def chunks(compressor: ConceptCompressor, texts: Sequence[str], limit: int, chunk_size: int) -> list[str]:
    """The first chunks of a seeded order, as many of each text as it takes to have `limit`."""
    texts = [text for text in texts if text.strip()]
    each = math.ceil(limit / max(1, len(texts)))
    found: list[str] = []
    for text in in_seeded_order(texts):
        if len(found) >= limit:
            break
        cut = [chunk for chunk, _, _ in chunk_texts(compressor.spec.segmenter.tokenize(text[:_CHARACTERS]), chunk_size)]
        found += in_seeded_order([chunk for chunk in cut if chunk.strip()], limit=each)
    return found[:limit]


def policies(compressor: ConceptCompressor, measures: TextMeasures) -> dict[str, RateChooser]:
    """Those that look at a text alone, by the labels that they have among the rows."""
    configs = {
        "information": IngestConfig(rate="information"),
        ARTICLES_BANDS: IngestConfig(rate="information", rate_options=RateOptions(bands=ARTICLE)),
    }
    if compressor.losses is not None:
        configs[f"learned {RateOptions().most_loss:g}"] = IngestConfig(rate="learned")
    longest = compressor.config.longest_unit
    return {label: chooser_of(config, measures, longest) for label, config in configs.items()}


def measured(compressor: ConceptCompressor, data_dir: Path, probes: Sequence[str], limit: int) -> dict[str, Any]:
    """What is chosen for chunks of each kind.

    Args:
        compressor: Its losses predict, if it has learned any; else the share of information that is dropped does.
        data_dir: See `texts_by_kind`.
        probes: See `texts_by_kind`.
        limit: Chunks of each kind.

    Returns:
        `loss`, the unit of predicted losses; `chunk_size`; and by kind `n` chunks, the share `left_as_text` by guard
        exact, and by policy `achieved_rate` and `predicted_loss` (over tokens, without a guard), and the share
        `left_as_text` by guard loss, None without learned losses.
    """
    measures, size = TextMeasures(lambda: compressor), IngestConfig().chunk_size
    learned = compressor.losses is not None
    exact, loss = ExactGuard(measures), LossGuard(best_losses(measures))
    segmented, choosers = Segmented(compressor), policies(compressor, measures)
    made: dict[str, Any] = {}
    for title, texts in texts_by_kind(data_dir, probes).items():
        found = [segmented(chunk) for chunk in chunks(compressor, texts, limit, size)]
        if not found:
            continue
        sizes = [sum(map(len, units)) for units in found]
        rows = {}
        for label, chooser in choosers.items():
            counts = [list(chooser.choose(units).n_concepts[0]) for units in found]
            # A share of information that is all kept may come out a rounding below 0.
            lost = [max(0.0, loss.expected(units, ks)) for units, ks in zip(found, counts, strict=True)]
            rows[label] = {
                "achieved_rate": sum(sizes) / sum(map(sum, counts)),
                "predicted_loss": sum(each * n for each, n in zip(lost, sizes, strict=True)) / sum(sizes),
                "left_as_text": _share([each > loss.limit for each in lost]) if learned else None,
            }
        guarded = _share([exact.expected(units, []) > exact.limit for units in found])
        made[title] = {"n": len(found), "left_as_text": guarded, "policies": rows}
    return {"loss": "nats per token" if learned else "share of information", "chunk_size": size, "kinds": made}


def _share(which: Sequence[bool]) -> float:
    return sum(which) / len(which)
