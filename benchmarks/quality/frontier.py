"""Where should concepts enter, and how many should there be? Recovered over prefill cost, by entry layer and rate.

Untrained deep concepts at every entry layer L of `--layers` and every rate C of `--rates`, and trained ones where
`--trained` names folders of compressors (each knows its L), on held-out rows of the TRAINING data: L and C are
settings, and evaluation sets are not there to choose settings by. Likelihoods of gold answers alone, nothing is
generated.

Settings that are done are kept beside the JSON (OUT.records.jsonl) and not asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cells import apart, measured, number, table, with_interval
from benchmarks.common import Record, journal_of, parsed, parser, part, progress, written
from compllm_rag.compression.loading import load_compressor, shipped_adapter, untrained_deep
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Segmented, Setting
from compllm_rag.evaluation.questions import Question
from compllm_rag.evaluation.runner import in_seeded_order
from compllm_rag.evaluation.statistics import Record as Asked
from compllm_rag.evaluation.statistics import statistics
from compllm_rag.models.llm import TargetLLM
from compllm_rag.training.material import Material

_COLOURS = ("tab:purple", "tab:blue", "tab:green", "tab:orange", "tab:red", "tab:brown", "tab:pink", "tab:olive")


def held_out_questions(data_dir: Path, segmenter: Any, limit: int, longest: int) -> list[Question]:
    """One question of each held-out group of passages, over the passages it rests on.

    Args:
        data_dir: Holds what is trained on.
        segmenter: Counts tokens.
        limit: Questions at most.
        longest: Most source tokens of a question's passages.
    """
    chosen: list[Question] = []
    for group in in_seeded_order(Material(*Material.files_of(data_dir), segmenter).held_out):
        if len(chosen) == limit:
            break
        shown = tuple(p for p in group.passages if p.supporting) or group.passages[:1]
        if sum(len(segmenter.tokenize(passage.text).ids) for passage in shown) <= longest:
            [question] = in_seeded_order(group.questions, limit=1)
            chosen.append(Question(question.id, shown, question.question, question.answers))
    if not chosen:
        raise ConfigurationError(
            "there is no held-out row",
            got=str(data_dir),
            expected="training questions, of which one group in 40 is held out",
            next_step="name a larger folder, or raise --longest",
        )
    return chosen


def likelihoods(
    compressor: ConceptCompressor, questions: list[Question], setting: Setting, batch_size: int
) -> list[dict[str, Any]]:
    """Records of one setting."""
    asker = Asker(compressor, setting, Segmented(compressor), GenerationConfig(max_new_tokens=1))
    done = asker.ask(questions, batch_size=batch_size, answer=False, progress=lambda _: None)
    return [record.to_dict() for record in done]


def compressors_of(args: Any, llm: TargetLLM) -> list[tuple[str, int, Callable[[], ConceptCompressor]]]:
    """Kind and entry layer of each compressor, and what makes it: one at a time lies in memory.

    Raises:
        ConfigurationError: A trained one is of concepts at the input embeddings.
    """
    made: list[tuple[str, int, Callable[[], ConceptCompressor]]] = [
        ("untrained", layer, partial(untrained_deep, llm, layer)) for layer in args.layers
    ]
    for folder in args.trained:
        layer = load_compressor(folder, llm).config.entry_layer
        if not layer:
            raise ConfigurationError(
                "the frontier is of deep concepts",
                got=f"{folder}, concepts at the input embeddings",
                expected="a folder of `train deep`",
                next_step="leave it out of --trained",
            )
        made.append(("trained", layer, partial(load_compressor, folder, llm)))
    return made


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser("frontier", __doc__, "llm reader dtype rates batch-size", rates=[1.0, 1.5, 2.0, 4.0], batch_size=8)
    options.add_argument("--data-dir", type=Path, required=True, help="holds what is trained on")
    options.add_argument("--layers", type=int, nargs="*", default=[6, 10, 15, 18, 20], help="entry layers, untrained")
    options.add_argument("--trained", type=Path, nargs="*", default=[], help="folders of trained compressors")
    options.add_argument("--limit", type=int, default=96, help="held-out questions, one of each group of passages")
    options.add_argument("--longest", type=int, default=480, help="most source tokens of a question's passages")
    args = parsed(options, argv)
    reader = shipped_adapter(args.llm, "reader") if args.reader == "auto" else args.reader
    own = Path(reader) if reader not in (None, "none") else None
    llm = TargetLLM.from_pretrained(args.llm, reader=own, dtype=args.dtype)
    waiting = compressors_of(args, llm)
    first = waiting[0][2]() if waiting else options.error("there is nothing to measure: name --layers or --trained")
    questions = held_out_questions(args.data_dir, first.spec.segmenter, args.limit, args.longest)
    same = {
        "llm": llm.source,
        "identity": llm.identity,
        "dtype": str(llm.dtype).removeprefix("torch."),
        "depth": llm.depth,
        "n": len(questions),
        "asked": [question.id for question in questions],
    }
    journal = journal_of(args.json, same)

    def ask(compressor: ConceptCompressor, name: str, setting: Setting) -> list[Asked]:
        make = partial(likelihoods, compressor, questions, setting, args.batch_size)
        found = part(journal, f"{name}{setting}", make, fingerprint=compressor.fingerprint if name else None)
        return [Asked.from_dict(record) for record in found]

    text, none = (ask(first, "", Setting(mode)) for mode in ("text", "none"))  # whatever the compressor
    rows = []
    for kind, layer, load in waiting:
        compressor = load()
        for rate in args.rates:
            found = statistics(ask(compressor, f"{kind}, L = {layer}, ", Setting("concepts", rate)), text, none)
            achieved = found.values["achieved_rate"] or rate
            rows.append(
                {
                    "kind": kind,
                    "entry_layer": layer,
                    "rate": rate,
                    "achieved_rate": achieved,
                    "prefill_cost": compressor.spec.prefill_cost(achieved),
                    "nll": found.values["nll"],
                    "recovered": found.values["recovered"],
                    "interval": found.intervals["recovered"],
                }
            )
            progress(f"{kind}, L = {layer}, C = {rate:g}: recovered {rows[-1]['recovered']}")
    bare = statistics(none, text, none).values["nll"]
    fixed = {"nll_text": statistics(text, text, none).values["nll"], "nll_none": bare}
    return written(args, {**same, **fixed, "rows": rows})


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    rows = [
        [
            row["kind"],
            str(row["entry_layer"]),
            number(row["achieved_rate"], 2),
            number(row["prefill_cost"], 2),
            number(row["nll"], 2),
            with_interval(row["recovered"], apart(row["interval"])),
        ]
        for row in sorted(record["rows"], key=lambda row: (row["kind"], -row["prefill_cost"]))
    ]
    return [
        "## Entry layer and rate",
        "",
        f"Deep concepts of {record['llm']} ({record['depth']} layers) on {record['n']} held-out training questions, no "
        "evaluation set: this is where L and C are chosen. NLL of the gold answers is "
        f"{number(record['nll_text'], 2)} nats per token with text and {number(record['nll_none'], 2)} without "
        f"passages. Brackets are bootstrap 95 % intervals over questions. {measured(record)}.",
        "",
        *table(["weights", "L", "C", "prefill cost", "NLL", "recovered"], rows),
        "![Recovered over prefill cost](frontier.png)",
        "",
    ]


def plot(record: Record) -> Any:
    """Recovered over prefill cost, a line for each entry layer; trained ones are drawn through."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    panel = figure.subplots()
    layers = sorted({row["entry_layer"] for row in record["rows"]})
    for kind, style, face in (("untrained", "--", "white"), ("trained", "-", None)):
        for at, layer in enumerate(layers):
            line = [r for r in record["rows"] if (r["kind"], r["entry_layer"]) == (kind, layer)]
            line = sorted((r for r in line if r["recovered"] is not None), key=lambda r: r["prefill_cost"])
            if not line:
                continue
            colour = _COLOURS[at % len(_COLOURS)]
            x, y = [row["prefill_cost"] for row in line], [row["recovered"] for row in line]
            panel.plot(
                x, y, style, marker="o", color=colour, markerfacecolor=face or colour, label=f"L = {layer}, {kind}"
            )
            for row in line:
                place = (row["prefill_cost"], row["recovered"])
                panel.annotate(
                    f"{row['rate']:g}", place, textcoords="offset points", xytext=(4, -9), fontsize="x-small"
                )
    panel.axhline(100, color="0.7", linewidth=0.8)
    panel.set_xlabel("prefill cost of a passage (text = 1); numbers at the points are rates")
    panel.set_ylabel("recovered (%)")
    panel.legend(frameon=False, fontsize="small", loc="lower right")
    return figure
