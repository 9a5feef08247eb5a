"""Does keeping numbers, dates and names first help? Deep concepts with and without pins, beside random places.

The shipped probes, and with `--data` the questions of a file, are read as text, as concepts with more and more kinds of
pinned words (compllm_rag/compression/pins.py), as concepts at random places, and without passages: F1 by kind of probe,
and what is recovered. At rate 1 nothing is dropped, so that there is nothing to pin.

Settings that are done are kept beside the JSON (OUT.records.jsonl) and not asked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cells import apart, measured, number, table, with_interval
from benchmarks.common import Record, any_compressor_of, dtype_of, journal_of, parsed, parser, part, progress, written
from compllm_rag.compression.loading import pinned
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig, Pin
from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Segmented, Setting
from compllm_rag.evaluation.probes import probe_file
from compllm_rag.evaluation.questions import Question, read_questions, read_rows
from compllm_rag.evaluation.runner import in_seeded_order
from compllm_rag.evaluation.statistics import Record as Asked
from compllm_rag.evaluation.statistics import statistics

VARIANTS: dict[str, tuple[Pin, ...]] = {
    "no pins": (),
    "digits": ("digits",),
    "digits, dates": ("dates", "digits"),
    "digits, dates, names": ("dates", "digits", "names"),
}
_ANSWER_TOKENS = 24


def records(
    compressor: ConceptCompressor, questions: list[Question], setting: Setting, batch_size: int
) -> list[dict[str, Any]]:
    """Answers and likelihoods of one setting."""
    asker = Asker(compressor, setting, Segmented(compressor), GenerationConfig(max_new_tokens=_ANSWER_TOKENS))
    done = asker.ask(questions, batch_size=batch_size, answer=True, progress=lambda _: None)
    return [record.to_dict() for record in done]


def row_of(mine: list[Asked], text: list[Asked], none: list[Asked], kinds: dict[str, str]) -> dict[str, Any]:
    """Means, intervals, and F1 by kind of question."""
    found = statistics(mine, text, none)
    groups: dict[str, list[float]] = {}
    for record in mine:
        if record.id in kinds:
            groups.setdefault(kinds[record.id], []).append(record.f1 or 0.0)
    return {
        "achieved_rate": found.values["achieved_rate"],
        **{name: found.values[name] for name in ("f1", "nll", "recovered")},
        "intervals": {name: found.intervals[name] for name in ("f1", "recovered")},
        "kinds": {kind: sum(f1s) / len(f1s) for kind, f1s in sorted(groups.items())},
    }


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser(
        "pins", __doc__, "llm limit rates reader compressor codec entry-layer dtype batch-size", rates=[2.0, 4.0]
    )
    options.add_argument("--data", type=Path, help="file of questions, besides the probes")
    args = parsed(options, argv)
    plain = any_compressor_of(args)
    if min(args.rates) <= 1:
        raise ConfigurationError("nothing is dropped at rate 1", got=args.rates, expected="--rates above 1")
    compressors = {name: pinned(plain, pins) if pins else plain for name, pins in VARIANTS.items()}
    sets = {"probes": probe_file(), **({args.data.name: args.data} if args.data else {})}
    same = {"llm": plain.llm.source, "fingerprint": plain.fingerprint, "dtype": dtype_of(plain)}
    same |= {"limit": args.limit}
    journal, made = journal_of(args.json, same), {}
    for title, path in sets.items():
        questions = in_seeded_order(read_questions(path).questions, limit=args.limit)
        kinds = {str(row.get("id")): str(row["kind"]) for _, row in read_rows(path) if "kind" in row}

        def ask(name: str, setting: Setting, title: str = title, questions: list[Question] = questions) -> list[Asked]:
            compressor = compressors[name]
            make = partial(records, compressor, questions, setting, args.batch_size)
            found = part(journal, f"{title}, {name}, {setting}", make, fingerprint=compressor.fingerprint)
            return [Asked.from_dict(record) for record in found]

        text, none = (ask("no pins", Setting(mode)) for mode in ("text", "none"))
        rows = [{"read": "text", "rate": None, **row_of(text, text, none, kinds)}]
        for rate in args.rates:
            ways = [(name, name, Setting("concepts", rate)) for name in VARIANTS]
            for read, name, setting in [*ways, ("random places", "no pins", Setting("random", rate))]:
                rows.append({"read": read, "rate": rate, **row_of(ask(name, setting), text, none, kinds)})
                progress(f"{title}, {read} at rate {rate:g}: F1 {rows[-1]['f1']}, recovered {rows[-1]['recovered']}")
        rows.append({"read": "nothing", "rate": None, **row_of(none, text, none, kinds)})
        made[title] = {"n": len(questions), "rows": rows}
    return written(args, {**same, "rates": args.rates, "sets": made})


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    lines = [
        "## Pins",
        "",
        "Tokens of words with digits, of dates and of names are kept before all others, as far as half of what is kept "
        f"goes. {measured(record)}.",
        "",
    ]
    for title, found in record["sets"].items():
        kinds = list(found["rows"][0]["kinds"])
        rows = []
        for row in found["rows"]:
            cells = [row["read"], number(row["achieved_rate"], 2), number(row["nll"], 2)]
            cells.append(with_interval(row["recovered"], apart(row["intervals"]["recovered"])))
            cells.append(with_interval(row["f1"], apart(row["intervals"]["f1"])))
            rows.append([*cells, *(number(row["kinds"].get(kind), 0) for kind in kinds)])
        head = ["kept first", "rate", "NLL", "recovered", "F1", *kinds]
        lines += [f"### {title}, {found['n']} questions", "", *table(head, rows)]
    return lines
