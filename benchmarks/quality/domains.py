"""What is lost in other kinds of text? The passage's own continuation, predicted after reading the passage.

From each text one passage is taken, and the tokens behind it are scored directly after the passage as text, as
concepts, pruned, and without it: nats per token, perplexity, and the share of what text gains over no passage that is
recovered. That compares kinds of text without questions with those that have them; where there are questions, their
answers are scored too, behind the whole passage in the default prompt. Intervals are by bootstrap over passages (or
questions), differences to text and to pruning are paired.

Which texts are taken, and what of their kind the shipped adapters trained on: domain_texts.py. Kinds that are done are
kept beside the JSON (OUT.records.jsonl) and not scored again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import dtype_of, journal_of, parsed, parser, part, progress, written
from benchmarks.quality.domain_texts import DOMAINS, Piece, pieces, questions_of
from compllm_rag.compression.loading import load_compressor_for
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import DataFileError
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Bodies, Segmented, Setting
from compllm_rag.evaluation.scoring import ScoringGenerator
from compllm_rag.evaluation.statistics import Record, Statistics, statistics
from compllm_rag.prompt import PromptPlan, QAPrompt, Span

_UNASKED: dict[str, Any] = dict.fromkeys(("answer", "em", "f1", "subspan_em", "option", "correct"))


def score(
    compressor: ConceptCompressor, found: Sequence[Piece], setting: Setting, segmented: Segmented, batch: int
) -> list[Record]:
    """Likelihood of each continuation behind its passage."""
    prompt, generator = QAPrompt(compressor.llm.tokenizer), ScoringGenerator(compressor.llm, halves=compressor.halves)
    bodies = Bodies(compressor, setting, segmented)
    records = []
    for begin in range(0, len(found), batch):
        part = found[begin : begin + batch]
        bodies.prepare(piece.passage for piece in part)
        shown: list[list[Span]] = [[] if setting.mode == "none" else bodies.spans(piece.passage, 0) for piece in part]
        # Without the blank line behind the passage: the LLM goes on reading.
        plans = [PromptPlan(tuple(prompt.prefix([("", spans)])[:-1])) for spans in shown]
        _, prefilled = generator.run(plans, answer=False)
        totals = prefilled.log_likelihoods([piece.rest for piece in part])
        for piece, plan, total in zip(part, plans, totals, strict=True):
            tokens, concepts = segmented.n_tokens(piece.passage), bodies.size(piece.passage) if setting.rate else None
            scored: dict[str, Any] = {
                "nll": -total / len(piece.rest),
                "n_tokens": len(piece.rest),
                "positions": plan.positions,
            }
            records.append(Record(piece.id, "", (), **_UNASKED, **scored, source_tokens=tokens, concepts=concepts))
    return records


def compared(ask: Callable[[Setting], list[Record]], rates: Sequence[float], label: str = "") -> list[dict[str, Any]]:
    """A row for text, both compressed ways at each rate and no passage, against text and against pruning at its rate.

    Args:
        ask: The records of a setting, over the same passages or questions for all.
        rates: Source tokens per concept.
        label: In front of the setting in lines of progress.
    """
    settings = [Setting.of(mode, rate) for rate in rates for mode in ("concepts", "pruned")]
    records = {}
    for setting in (Setting("text"), *settings, Setting("none")):
        records[setting] = ask(setting)
        nll = sum(record.nll for record in records[setting]) / len(records[setting])
        progress(f"  {label}{setting}: {nll:.3f} nats a token")
    text, none = records[Setting("text")], records[Setting("none")]
    rows = []
    for setting, mine in records.items():
        pruned = records[Setting("pruned", setting.rate)] if setting.mode == "concepts" else None
        to_pruned = statistics(mine, pruned, none).paired["nll"] if pruned else None
        rows.append(_row(setting, statistics(mine, text, none)) | {"to_pruned": to_pruned})
    return rows


def _row(setting: Setting, found: Statistics) -> dict[str, Any]:
    nll, ends = found.values["nll"], found.intervals["nll"]
    if nll is None or ends is None:
        raise RuntimeError("records without likelihoods")
    return {
        "mode": setting.mode,
        "rate": setting.rate,
        "nll": nll,
        "nll_interval": ends,
        "perplexity": math.exp(nll),
        "perplexity_interval": [math.exp(end) for end in ends],
        "recovered": found.values["recovered"],
        "recovered_interval": found.intervals["recovered"],
        "to_text": found.paired["nll"],
        "positions": found.values["positions"],
        "achieved_rate": found.values["achieved_rate"],
    }


def measure(compressor: ConceptCompressor, name: str, args: Any) -> dict[str, Any]:
    """One kind of text."""
    domain = DOMAINS[name]
    path = args.data_dir / domain.file
    found = pieces(compressor, path, args.limit, args.context, args.length)
    if not found:
        raise DataFileError(
            "no text is long enough",
            got=str(path),
            expected=f"{args.context // 2 + args.length} tokens",
            next_step="lower --context or --length, or leave this kind out with --domains",
        )
    texts, segmented = len({piece.id for piece in found}), Segmented(compressor)
    progress(f"{name}: {len(found)} passages of {texts} texts")
    made: dict[str, Any] = {
        "title": domain.title,
        "file": domain.file,
        "in_training_mix": domain.training,
        "held_out": domain.held_out,
        "n": len(found),
        "texts": texts,
        "rows": compared(lambda setting: score(compressor, found, setting, segmented, args.batch_size), args.rates),
        "answers": None,
    }
    asked = questions_of(path, args.questions, compressor, args.longest) if domain.asked and args.questions else []

    def answers(setting: Setting) -> list[Record]:
        asker = Asker(compressor, setting, segmented, GenerationConfig(max_new_tokens=1))
        return asker.ask(asked, batch_size=args.batch_size, answer=False, progress=lambda _: None)

    if asked:  # likelihood of the gold answers, nothing is generated
        made["answers"] = {"n": len(asked), "rows": compared(answers, args.rates, "answers, ")}
    return made


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it."""
    options = parser("domains", __doc__, "llm rates codec dtype batch-size", batch_size=12)
    options.add_argument("--data-dir", type=Path, required=True, help="holds eval/*.jsonl.gz and text/*.jsonl.gz")
    options.add_argument("--domains", nargs="+", choices=list(DOMAINS), default=list(DOMAINS))
    options.add_argument("--limit", type=int, default=60, help="passages of each kind")
    options.add_argument("--context", type=int, default=160, help="source tokens of a passage")
    options.add_argument("--length", type=int, default=40, help="tokens of its continuation")
    options.add_argument("--questions", type=int, default=60, help="of each kind that has any; 0 asks none")
    options.add_argument("--longest", type=int, default=300, help="most source tokens of a passage asked about")
    args = parsed(options, argv)
    compressor = load_compressor_for(args.llm, codec=args.codec, dtype=args.dtype)
    names = ("limit", "context", "length", "questions", "longest", "rates")
    same = {"llm": args.llm, "fingerprint": compressor.fingerprint, "dtype": dtype_of(compressor)}
    same |= {name: getattr(args, name) for name in names}
    journal = journal_of(args.json, same)
    done = {name: part(journal, name, partial(measure, compressor, name, args)) for name in args.domains}
    return written(args, {**same, "domains": done})
