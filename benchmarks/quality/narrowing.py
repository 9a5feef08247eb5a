"""From which layer on may the LLM do without most concepts? Recovered over prefill cost, narrowed and not.

Deep concepts at each rate of `--rates`, read whole and narrowed in each way of `--narrow` (LAYER:SHARE: from the layer
on only this share of a prompt's concepts, those the question attends to most; with `:chance` behind it any), on
held-out rows of the TRAINING data: layer and share are settings, and evaluation sets are not there to choose settings
by. Each question stands behind one to six passages in random order, as retrieval gives them. Likelihoods of gold
answers alone, nothing is generated.

Settings that are done are kept beside the JSON (OUT.records.jsonl) and not asked again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cells import apart, measured, number, table, with_interval
from benchmarks.common import Record, any_compressor_of, dtype_of, journal_of, parsed, parser, part, progress, written
from benchmarks.quality.frontier import likelihoods
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import Narrowing
from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.bodies import Setting
from compllm_rag.evaluation.questions import Question, SourcePassage
from compllm_rag.evaluation.runner import in_seeded_order
from compllm_rag.evaluation.statistics import Record as Asked
from compllm_rag.evaluation.statistics import statistics
from compllm_rag.training.material import Material

_WAYS = ["20:0.25", "22:0.1", "22:0.25", "24:0", "24:0.1", "24:0.1:chance", "26:0.1"]
_MOST_PASSAGES = 6


def crowded_questions(data_dir: Path, segmenter: Any, limit: int, longest: int) -> list[Question]:
    """One question of each held-out group of passages, among distractors: its own group's, else other held-out ones.

    Args:
        data_dir: Holds what is trained on.
        segmenter: Counts tokens.
        limit: Questions at most.
        longest: Most source tokens of a question's passages.

    Raises:
        ConfigurationError: There is no held-out row that is short enough.
    """
    groups = in_seeded_order(Material(*Material.files_of(data_dir), segmenter).held_out)
    rng, chosen = random.Random(0), list[Question]()
    for group in groups:
        if len(chosen) == limit:
            break
        shown = [p for p in group.passages if p.supporting] or list(group.passages[:1])
        others = [p for p in group.passages if not p.supporting]
        others = others or [rng.choice(rng.choice(groups).passages) for _ in range(_MOST_PASSAGES)]
        others = [p for p in dict.fromkeys(others) if p not in shown]
        rng.shuffle(others)
        spare = max(0, _MOST_PASSAGES - len(shown))
        left = longest - sum(_tokens(segmenter, p) for p in shown)
        if left < 0:
            continue
        for passage in others[: rng.randint(0, spare)]:
            left -= _tokens(segmenter, passage)
            if left < 0:
                break
            shown.append(passage)
        rng.shuffle(shown)
        [question] = in_seeded_order(group.questions, limit=1)
        chosen.append(Question(question.id, tuple(shown), question.question, question.answers))
    if not chosen:
        raise ConfigurationError(
            "there is no held-out row",
            got=str(data_dir),
            expected="training questions, of which one group in 40 is held out",
            next_step="name a larger folder, or raise --longest",
        )
    return chosen


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser(
        "narrowing",
        __doc__,
        "llm reader compressor codec entry-layer dtype rates batch-size",
        rates=[1.0, 1.5, 2.0, 3.0, 4.0],
        batch_size=8,
    )
    options.add_argument("--data-dir", type=Path, required=True, help="holds what is trained on")
    options.add_argument("--narrow", nargs="+", type=Narrowing.parse, default=list(map(Narrowing.parse, _WAYS)))
    options.add_argument("--limit", type=int, default=96, help="held-out questions, one of each group of passages")
    options.add_argument("--longest", type=int, default=700, help="most source tokens of a question's passages")
    args = parsed(options, argv)
    compressor = any_compressor_of(args)
    questions = crowded_questions(args.data_dir, compressor.spec.segmenter, args.limit, args.longest)
    same = {
        "llm": compressor.llm.source,
        "fingerprint": compressor.fingerprint,
        "dtype": dtype_of(compressor),
        "depth": compressor.spec.depth,
        "entry_layer": compressor.config.entry_layer,
        "n": len(questions),
        "passages": sum(len(question.passages) for question in questions) / len(questions),
        "asked": [question.id for question in questions],
    }
    journal = journal_of(args.json, same)

    def ask(setting: Setting) -> list[Asked]:
        make = partial(likelihoods, compressor, questions, setting, args.batch_size)
        return [Asked.from_dict(record) for record in part(journal, str(setting), make)]

    text, none = ask(Setting("text")), ask(Setting("none"))
    rows = [
        _row(compressor, setting, ask(setting), text, none)
        for rate in args.rates
        for setting in (Setting.of("concepts", rate, narrowing=each) for each in (None, *args.narrow))
    ]
    found = statistics(none, text, none).values["nll"], statistics(text, text, none)
    fixed = {"nll_none": found[0], "nll_text": found[1].values["nll"], "positions": found[1].values["positions"]}
    return written(args, {**same, **fixed, "rows": rows})


def _tokens(segmenter: Any, passage: SourcePassage) -> int:
    return len(segmenter.tokenize(passage.text).ids)


def _row(
    compressor: ConceptCompressor, setting: Setting, mine: list[Asked], text: list[Asked], none: list[Asked]
) -> Record:
    found = statistics(mine, text, none)
    achieved = found.values["achieved_rate"] or setting.rate or 1.0
    made = {
        "rate": setting.rate,
        "narrowing": None if setting.narrowing is None else str(setting.narrowing),
        "achieved_rate": achieved,
        "prefill_cost": compressor.spec.prefill_cost(achieved, setting.narrowing),
        "nll": found.values["nll"],
        "recovered": found.values["recovered"],
        "interval": found.intervals["recovered"],
        "to_text": found.paired["nll"],
    }
    progress(f"{setting}: cost {made['prefill_cost']:.2f}, recovered {made['recovered']}")
    return made


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    rows = [
        [
            number(row["achieved_rate"], 2),
            row["narrowing"] or "–",
            number(row["prefill_cost"], 2),
            number(row["nll"], 2),
            with_interval(row["recovered"], apart(row["interval"])),
        ]
        for row in sorted(record["rows"], key=lambda row: -row["prefill_cost"])
    ]
    return [
        "## Narrowing",
        "",
        f"Deep concepts of {record['llm']} (entry layer {record['entry_layer']} of {record['depth']}) on {record['n']} "
        f"held-out training questions behind {number(record['passages'], 1)} passages each in the mean "
        f"({number(record['positions'], 0)} positions as text), no evaluation set: this is where layer and share are "
        "chosen. Narrowed `24:0.1` means: all concepts up to layer 23, from layer 24 on the tenth that the question "
        "attends to most, `24:0` none of them, `24:0.1:chance` any tenth. NLL of the gold answers is "
        f"{number(record['nll_text'], 2)} nats per token with text and {number(record['nll_none'], 2)} without "
        f"passages. Brackets are bootstrap 95 % intervals over questions. {measured(record)}.",
        "",
        *table(["rate", "narrowed", "prefill cost", "NLL", "recovered"], rows),
        "![Recovered over prefill cost, narrowed and not](narrowing.png)",
        "",
    ]


def plot(record: Record) -> Any:
    """Recovered over prefill cost, a line over the rates for each way of narrowing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    panel = figure.subplots()
    ways = list(dict.fromkeys(row["narrowing"] for row in record["rows"]))
    for at, way in enumerate(ways):
        line = [row for row in record["rows"] if row["narrowing"] == way and row["recovered"] is not None]
        line.sort(key=lambda row: row["prefill_cost"])
        style = {"color": "black", "linewidth": 2.0} if way is None else {"color": f"C{at}", "linestyle": "--"}
        x, y = [row["prefill_cost"] for row in line], [row["recovered"] for row in line]
        panel.plot(x, y, marker="o", label="all concepts" if way is None else f"narrowed {way}", **style)
    panel.axhline(100, color="0.7", linewidth=0.8)
    panel.set_xlabel("prefill cost of a passage (text = 1)")
    panel.set_ylabel("recovered (%)")
    panel.legend(frameon=False, fontsize="small", loc="lower right")
    return figure
