"""What would deep concepts be worth in an engine that runs every position through every layer, such as vLLM?

Our own generator runs a passage's concepts through the layers from the entry layer L on alone. An engine with one list
of positions for all layers needs a token for each concept below L. Read here by our own generator, on the same
questions: text, nothing, deep concepts as they are, the tokens that were kept as text (pruned), deep concepts without
gaps between their positions (a request cannot state gaps), and these with their tokens as placeholders below L, where
the prompt's own tokens see them, or where a mask hides them. In front of L the stored states take the placeholders'
place, and the reading half runs over all.

*Prefill cost* is what a source token costs, text = 1: (D - L) / (D C) as they are, 1 / C with placeholders or pruned.

Settings that are done are kept beside the JSON (OUT.records.jsonl) and not asked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cells import apart, difference, measured, number, table, with_interval
from benchmarks.common import (
    Record,
    Tenths,
    any_compressor_of,
    dtype_of,
    journal_of,
    parsed,
    parser,
    part,
    progress,
    written,
)
from benchmarks.quality.placeholder_reading import PlaceholderGenerator, Way, WayBodies
from benchmarks.quality.quality import SETS
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Bodies, Segmented, Setting
from compllm_rag.evaluation.journal import Journal
from compllm_rag.evaluation.questions import Question, read_questions
from compllm_rag.evaluation.runner import in_seeded_order
from compllm_rag.evaluation.statistics import Record as Asked
from compllm_rag.evaluation.statistics import differences, statistics
from compllm_rag.models.halves import Halves

_ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Read:
    """A way to read passages at a rate.

    Attributes:
        title: For people.
        way: What is measured.
        every_layer: Whether a passage runs the layers below the entry layer, too.
        from_rate: Below this rate it is the same as another.
    """

    title: str
    way: Way
    every_layer: bool
    from_rate: float = 1.0


DEEP = Read("deep concepts", "gaps", every_layer=False)
READS = (
    DEEP,
    Read("without gaps", "no gaps", every_layer=False, from_rate=1.01),  # where nothing is dropped there are none
    # What is masked below the entry layer and replaced there leaves nothing behind: the same measurement, at its cost.
    Read("placeholders, masked", "no gaps", every_layer=True),
    Read("placeholders, seen", "seen", every_layer=True),
    Read("pruned", "pruned", every_layer=True, from_rate=1.01),
)


class Asking:
    """Asks the same questions in one way after the other.

    Args:
        compressor: Of deep concepts.
        halves: Its own, merged.
        questions: That fit the window.
        batch_size: Questions of a batch.
        answer: Generate answers too.
    """

    def __init__(
        self,
        compressor: ConceptCompressor,
        halves: Halves,
        questions: list[Question],
        batch_size: int,
        *,
        answer: bool,
    ) -> None:
        self._compressor, self._halves = compressor, halves
        self._questions, self._batch_size, self._answer = questions, batch_size, answer
        self._segmented, self._config = Segmented(compressor), GenerationConfig(max_new_tokens=_ANSWER_TOKENS)
        self._made: dict[float, Bodies] = {}  # concepts by rate, for all ways alike

    def __call__(self, name: str, setting: Setting, way: Way | None = None) -> list[dict[str, Any]]:
        """Records of one way; `name` is for the progress."""
        seen = PlaceholderGenerator(self._compressor, self._config, self._halves, seen=True)
        asker = Asker(
            self._compressor,
            setting,
            self._segmented,
            self._config,
            None if way is None else WayBodies(self._concepts(setting), way, self._segmented),
            halves=self._halves,
            generator=seen if way == "seen" else None,
        )
        show, n = Tenths(), len(self._questions)
        done = asker.ask(
            self._questions,
            batch_size=self._batch_size,
            answer=self._answer,
            progress=lambda asked: show(name, asked / n),
        )
        return [record.to_dict() for record in done]

    def _concepts(self, setting: Setting) -> Bodies:
        if setting.rate not in self._made:
            self._made = {setting.rate or 1.0: Bodies(self._compressor, setting, self._segmented)}
        return self._made[setting.rate or 1.0]


def questions_of(name: str, data_dir: Path, compressor: ConceptCompressor, limit: int | None) -> list[Question]:
    """Questions of a set over their passages, of HotpotQA the gold ones, in a seeded order.

    Raises:
        ConfigurationError: None of them fits the window.
        DataFileError: See `read_questions`.
    """
    chosen = SETS[name]
    room = Asker(compressor, Setting("text"), Segmented(compressor), GenerationConfig(max_new_tokens=_ANSWER_TOKENS))
    out = []
    for question in in_seeded_order(read_questions(data_dir / "eval" / chosen.file).questions, limit=limit):
        gold = tuple(passage for passage in question.passages if passage.supporting)
        shown = replace(question, passages=gold) if chosen.passages == "gold" else question
        if shown.passages and room.room(shown) <= room.window:
            out.append(shown)
    if not out:
        raise ConfigurationError(
            "no question left to ask",
            got=f"{chosen.file}, {limit or 'all'} questions, none of which fits {room.window} positions",
            expected="at least one that fits",
            next_step="raise --limit, or use an LLM with a longer window",
        )
    return out


def row_of(
    read: str, rate: float | None, cost: float, mine: list[Asked], text: list[Asked], none: list[Asked]
) -> Record:
    """A line of the table."""
    found = statistics(mine, text, none)
    return {
        "read": read,
        "rate": rate,
        "achieved_rate": found.values["achieved_rate"],
        "prefill_cost": cost,
        **{name: found.values[name] for name in ("nll", "recovered", "f1")},
        "intervals": {name: found.intervals[name] for name in ("recovered", "f1")},
    }


def measure(compressor: ConceptCompressor, halves: Halves, name: str, args: Any, journal: Journal) -> Record:
    """One set of questions."""
    questions = questions_of(name, args.data_dir, compressor, args.limit)
    asking = Asking(compressor, halves, questions, args.batch_size, answer=args.answers)

    def ask(title: str, setting: Setting, way: Way | None = None) -> list[Asked]:
        label = f"{name}: {title}" + (f" at rate {setting.rate:g}" if setting.rate else "")
        found = part(journal, f"{name}, {way or title}, {setting}", partial(asking, label, setting, way))
        return [Asked.from_dict(record) for record in found]

    text, none = (ask(mode, Setting.of(mode)) for mode in ("text", "none"))
    rows = [row_of("text", None, 1.0, text, text, none)]
    for rate in args.rates:
        deep = ask(DEEP.title, Setting("concepts", rate), DEEP.way)
        known = {DEEP.way: deep} | ({"no gaps": deep} if rate == 1 else {})
        for read in READS:
            if rate < read.from_rate:
                continue
            if read.way not in known:
                known[read.way] = ask(read.title, Setting("concepts", rate), read.way)
            mine = known[read.way]
            row = row_of(read.title, rate, 0.0, mine, text, none)
            achieved = row["achieved_rate"] or rate
            row["prefill_cost"] = 1 / achieved if read.every_layer else compressor.spec.prefill_cost(achieved)
            row["to_deep"] = None if mine is deep else differences(mine, deep, text, none)
            rows.append(row)
            progress(f"{name}, {read.title} at rate {rate:g}: recovered {row['recovered']}, F1 {row['f1']}")
    rows.append(row_of("nothing", None, 0.0, none, text, none))
    return {"n": len(questions), "rows": rows}


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser(
        "placeholders",
        __doc__,
        "llm limit rates reader compressor entry-layer dtype batch-size",
        limit=100,
        rates=[1.0, 1.5, 2.0, 4.0],
        codec="deep",
    )
    options.add_argument("--data-dir", type=Path, required=True, help="holds eval/*.jsonl.gz")
    options.add_argument("--sets", nargs="+", choices=["squad", "hotpotqa"], default=["squad", "hotpotqa"])
    options.add_argument("--no-answers", dest="answers", action="store_false", help="likelihoods alone, no F1")
    args = parsed(options, argv)
    compressor = any_compressor_of(args)
    if compressor.halves is None:
        raise ConfigurationError(
            "placeholders are of deep concepts",
            got="concepts at the input embeddings",
            expected="a folder of `train deep`",
            next_step="name another --compressor",
        )
    same = {
        "llm": compressor.llm.source,
        "fingerprint": compressor.fingerprint,
        "dtype": dtype_of(compressor),
        "limit": args.limit,
        "batch_size": args.batch_size,
        "answers": args.answers,
    }
    journal = journal_of(args.json, same)
    shape = {"depth": compressor.spec.depth, "entry_layer": compressor.config.entry_layer, "rates": args.rates}
    halves = compressor.halves.merged()
    sets = {name: measure(compressor, halves, name, args, journal) for name in args.sets}
    return written(args, {**same, **shape, "sets": sets})


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    depth, layer = record["depth"], record["entry_layer"]
    lines = [
        "## Placeholders",
        "",
        "What deep concepts would be worth in an engine that runs every position of a prompt through every layer, as "
        "vLLM does, read by our own generator: the tokens that were kept run the layers below the entry layer "
        f"(L = {layer} of {depth}) as placeholders, stored states take their place in front of it, and positions have "
        "no gaps. *Seen*: the prompt's own tokens see them below L; *masked*: they do not, and what is masked and "
        f"then replaced leaves nothing behind but its cost. Δ is to deep concepts as they are. {measured(record)}.",
        "",
    ]
    for name, found in record["sets"].items():
        rows = []
        for row in found["rows"]:
            cells = [
                row["read"],
                number(row["achieved_rate"], 2),
                number(row["prefill_cost"], 2),
                number(row["nll"], 2),
            ]
            cells.append(with_interval(row["recovered"], apart(row["intervals"]["recovered"])))
            cells.append(difference((row.get("to_deep") or {}).get("recovered"), ends=0))
            f1 = [with_interval(row["f1"], apart(row["intervals"]["f1"]))] if record["answers"] else []
            rows.append([*cells, *f1])
        head = [
            "read",
            "rate",
            "prefill cost",
            "NLL",
            "recovered",
            "Δ recovered",
            *(["F1"] if record["answers"] else []),
        ]
        lines += [f"### {SETS[name].title}, {found['n']} questions", "", *table(head, rows)]
    return lines
