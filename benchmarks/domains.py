"""What is lost in other kinds of text? The passage's own continuation, predicted after reading the passage.

From each text one passage is taken, and the tokens behind it are scored directly after the passage as text, as
concepts, pruned, and without it: nats per token, perplexity, and the share of what text gains over no passage that is
recovered. That compares kinds of text without questions with those that have them; where there are questions, their
answers are scored too, behind the whole passage in the default prompt. Intervals are by bootstrap over passages (or
questions), differences to text and to pruning are paired.

Which texts are taken, and what of their kind the shipped adapters trained on: benchmarks/domain_texts.py. Kinds that
are done are kept in the JSON and not scored again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import parser, progress, write
from benchmarks.domain_texts import DOMAINS, Piece, pieces, questions_of
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.loading import load_compressor_for
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import DataFileError
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Bodies, Segmented, Setting
from compllm_rag.evaluation.questions import Question
from compllm_rag.evaluation.scoring import ScoringGenerator
from compllm_rag.evaluation.statistics import Record, Statistics, statistics
from compllm_rag.prompt import PromptPlan, QAPrompt, Span


def score(
    compressor: Compressor, found: Sequence[Piece], setting: Setting, segmented: Segmented, batch: int
) -> list[Record]:
    """Likelihood of each continuation behind its passage."""
    prompt, generator = QAPrompt(compressor.llm.tokenizer), ScoringGenerator(compressor.llm)
    bodies = Bodies(compressor, setting, segmented)
    records = []
    for begin in range(0, len(found), batch):
        part = found[begin : begin + batch]
        bodies.prepare(piece.passage for piece in part)
        shown: list[list[Span]] = [[] if setting.mode == "none" else bodies.spans(piece.passage, 0) for piece in part]
        # Without the blank line behind the passage: the LLM goes on reading.
        plans = [PromptPlan(tuple(prompt.prefix([("", spans)])[:-1])) for spans in shown]
        _, prefilled = generator.run(plans, answer=False)
        totals = prefilled.log_likelihoods(compressor.llm.model, [piece.rest for piece in part])
        for piece, plan, total in zip(part, plans, totals, strict=True):
            records.append(_record(piece, plan, -total, segmented, bodies, setting))
    return records


def _record(
    piece: Piece, plan: PromptPlan, loss: float, segmented: Segmented, bodies: Bodies, setting: Setting
) -> Record:
    return Record(
        id=piece.id,
        question="",
        golds=(),
        answer=None,
        em=None,
        f1=None,
        subspan_em=None,
        option=None,
        correct=None,
        nll=loss / len(piece.rest),
        n_tokens=len(piece.rest),
        positions=plan.positions,
        source_tokens=segmented.n_tokens(piece.passage),
        concepts=bodies.size(piece.passage) if setting.rate else None,
    )


def settings_of(rates: Sequence[float]) -> list[Setting]:
    """Text, both compressed ways at each rate, and no passage."""
    compressed = [Setting.of(mode, rate) for rate in rates for mode in ("concepts", "pruned")]
    return [Setting("text"), *compressed, Setting("none")]


def continuations(
    compressor: Compressor, found: Sequence[Piece], rates: Sequence[float], batch: int
) -> list[dict[str, Any]]:
    """All settings over the same passages."""
    records, segmented = {}, Segmented(compressor)
    for setting in settings_of(rates):
        records[setting] = score(compressor, found, setting, segmented, batch)
        progress(f"  {setting}: {sum(r.nll for r in records[setting]) / len(found):.3f} nats a token")
    return compared(records)


def answers(
    compressor: Compressor, asked: Sequence[Question], rates: Sequence[float], batch: int
) -> list[dict[str, Any]]:
    """All settings over the same questions: likelihood of the gold answers, nothing is generated."""
    records, segmented = {}, Segmented(compressor)
    for setting in settings_of(rates):
        asker = Asker(compressor, setting, segmented, GenerationConfig(max_new_tokens=1))
        records[setting] = asker.ask(asked, batch_size=batch, answer=False, progress=lambda _: None)
        progress(f"  answers, {setting}: {sum(r.nll for r in records[setting]) / len(asked):.3f} nats a token")
    return compared(records)


def compared(records: dict[Setting, list[Record]]) -> list[dict[str, Any]]:
    """A row for each setting, against text, pruning at its rate, and no passage."""
    text, none = records[Setting("text")], records[Setting("none")]
    rows = []
    for setting, mine in records.items():
        pruned = records.get(Setting("pruned", setting.rate)) if setting.mode == "concepts" else None
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


def measure(compressor: Compressor, name: str, args: Any) -> dict[str, Any]:
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
    texts = len({piece.id for piece in found})
    progress(f"{name}: {len(found)} passages of {texts} texts")
    made: dict[str, Any] = {
        "title": domain.title,
        "file": domain.file,
        "in_training_mix": domain.training,
        "held_out": domain.held_out,
        "n": len(found),
        "texts": texts,
        "rows": continuations(compressor, found, args.rates, args.batch_size),
        "answers": None,
    }
    asked = questions_of(path, args.questions, compressor, args.longest) if domain.asked and args.questions else []
    if asked:
        rows = answers(compressor, asked, args.rates, args.batch_size)
        made["answers"] = {"n": len(asked), "rows": rows}
    return made


def main() -> None:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--data-dir", type=Path, required=True, help="holds eval/*.jsonl.gz and text/*.jsonl.gz")
    options.add_argument("--domains", nargs="+", choices=list(DOMAINS), default=list(DOMAINS))
    options.add_argument("--limit", type=int, default=60, help="passages of each kind")
    options.add_argument("--context", type=int, default=160, help="source tokens of a passage")
    options.add_argument("--length", type=int, default=40, help="tokens of its continuation")
    options.add_argument("--questions", type=int, default=60, help="of each kind that has any; 0 asks none")
    options.add_argument("--longest", type=int, default=300, help="most source tokens of a passage asked about")
    options.add_argument("--rates", type=float, nargs="+", default=[2.0, 4.0])
    options.add_argument("--batch-size", type=int, default=12)
    args = options.parse_args()
    compressor = load_compressor_for(args.llm)
    names = ("limit", "context", "length", "questions", "longest", "rates")
    same = {"llm": args.llm, "fingerprint": compressor.fingerprint} | {name: getattr(args, name) for name in names}
    done = _done(args.json, same)
    for name in args.domains:
        if name in done:
            progress(f"{name}: done before")
            continue
        done[name] = measure(compressor, name, args)
        if args.json is not None:
            args.json.write_text(json.dumps({**same, "domains": done}), encoding="utf-8")
    write({**same, "domains": {name: done[name] for name in args.domains}}, args.json)


def _done(path: Path | None, same: dict[str, Any]) -> dict[str, Any]:
    """Kinds that a former run with the same settings has scored."""
    if path is None or not path.exists():
        return {}
    try:
        former: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return dict(former.get("domains", {})) if {name: former.get(name) for name in same} == same else {}


if __name__ == "__main__":
    main()
