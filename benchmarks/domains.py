"""What is lost in other kinds of text? The passage's own continuation, predicted after reading the passage.

From each text one passage is taken, and the tokens behind it are scored directly after the passage as text, as
concepts, pruned, and without it: nats per token, perplexity, and the share of what text gains over no passage that is
recovered. No question is asked, so kinds of text without questions can be compared with those that have them.

Kinds that are done are kept in the JSON and not scored again.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import parser, progress, write
from compllm_rag.compressor import Compressor
from compllm_rag.evaluation.bodies import Bodies, Segmented, Setting
from compllm_rag.evaluation.scoring import ScoringGenerator
from compllm_rag.evaluation.statistics import Record, Statistics, statistics
from compllm_rag.loading import load_compressor_for
from compllm_rag.prompt import PromptPlan, Span, TextSpan
from compllm_rag.questions import QAPrompt, read_rows
from compllm_rag.training.material import is_held_out

REQUEST = "Repeat the passage word for word."  # decides only the system turn in front of the passage


_MOST_OF_ONE = 8


@dataclass(frozen=True)
class Domain:
    """A kind of text: its file, and whether it is a file of training texts, of which those held out are taken."""

    file: str
    title: str
    trained_on: bool


DOMAINS = {
    "squad": Domain("eval/squad_dev.jsonl.gz", "encyclopedia (SQuAD dev)", False),
    "stories": Domain("eval/fairytaleqa_val.jsonl.gz", "stories (FairytaleQA validation)", False),
    "biomedical": Domain("text/pubmed_abstracts.jsonl.gz", "biomedical abstracts (PubMed)", True),
    "code": Domain("text/python_docs.jsonl.gz", "code documentation (Python)", True),
}


@dataclass(frozen=True)
class Piece:
    """A passage and the token ids behind it."""

    id: str
    passage: str
    rest: tuple[int, ...]


def pieces(
    compressor: Compressor, path: Path, n: int, context: int, length: int, *, held_out: bool = False, seed: int = 0
) -> list[Piece]:
    """A passage from each of n texts, in seeded order, or where texts are held out several of each.

    Args:
        compressor: Its segmenter cuts the texts; a passage is whole segments.
        path: Rows with a `text` or a `context`.
        n: Passages wanted; fewer where the file has fewer texts that are long enough.
        context: Most source tokens of a passage; texts that give less than half of it are left out.
        length: Tokens of the continuation.
        held_out: Only texts that the trainer keeps out of training, and as many passages from each as are needed.
        seed: Of the order and of where in its text a passage begins.
    """
    rng = random.Random(seed)
    rows = [
        (str(row.get("id", number)), str(row.get("text") or row.get("context") or ""))
        for number, row in read_rows(path)
    ]
    if held_out:
        rows = [(name, text) for name, text in rows if is_held_out(f"{path.name}/{name}")]
    rng.shuffle(rows)
    made: list[Piece] = []
    # Of few texts several passages each; a short text has but one.
    rounds = [(name, text, again) for again in range(_MOST_OF_ONE if held_out else 1) for name, text in rows]
    for name, text, again in rounds:
        if len(made) == n:
            break
        if again and len(text) < 20 * (context + length):
            continue
        # About 4 characters a token: somewhere in a long text, at the beginning of a short one.
        span = 6 * (context + length)
        begin = rng.randrange(len(text) - span) if len(text) > span else 0
        begin = text.find("\n", begin) + 1 if begin else 0
        piece = text[begin : begin + span].strip()
        if not piece:
            continue
        segments = compressor.segmenter.split(piece)
        kept, used = 0, 0
        while kept < len(segments) and used + len(segments[kept]) <= context:
            used += len(segments[kept])
            kept += 1
        rest = tuple(token for segment in segments[kept:] for token in segment)[:length]
        passage = compressor.llm.tokenizer.decode([token for segment in segments[:kept] for token in segment])
        if used >= context // 2 and len(rest) == length:
            made.append(Piece(name, passage, rest))
    return made


def score(
    compressor: Compressor, found: Sequence[Piece], setting: Setting, segmented: Segmented, batch: int
) -> list[Record]:
    """Likelihood of each continuation behind its passage."""
    prompt, generator = QAPrompt(compressor.llm.tokenizer), ScoringGenerator(compressor.llm)
    bodies = Bodies(compressor, setting, segmented)
    head = TextSpan((*prompt.parts(REQUEST)[0], *prompt.marker(1, "")))
    records = []
    for begin in range(0, len(found), batch):
        part = found[begin : begin + batch]
        bodies.prepare(piece.passage for piece in part)
        shown: list[list[Span]] = [[] if setting.mode == "none" else [bodies.span(piece.passage, 0)] for piece in part]
        plans = [PromptPlan((head, *spans)) for spans in shown]
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


def measure(compressor: Compressor, found: Sequence[Piece], rates: Sequence[float], batch: int) -> list[dict[str, Any]]:
    """All settings over the same passages."""
    text, none, segmented = Setting("text"), Setting("none"), Segmented(compressor)
    settings = [text, *(Setting.of(mode, rate) for rate in rates for mode in ("concepts", "pruned")), none]
    records = {}
    for setting in settings:
        records[setting] = score(compressor, found, setting, segmented, batch)
        progress(f"  {setting}: {sum(r.nll for r in records[setting]) / len(found):.3f} nats a token")
    made = [(setting, statistics(records[setting], records[text], records[none])) for setting in settings]
    return [_row(setting, values) for setting, values in made]


def _row(setting: Setting, found: Statistics) -> dict[str, Any]:
    nll, ends = found.values["nll"], found.intervals["nll"]
    if nll is None or ends is None:
        raise RuntimeError("records without likelihoods")
    return {
        "mode": setting.mode,
        "rate": setting.rate,
        "nll": nll,
        "perplexity": math.exp(nll),
        "perplexity_interval": [math.exp(end) for end in ends],
        "recovered": found.values["recovered"],
        "recovered_interval": found.intervals["recovered"],
        "to_text": found.paired["nll"],
        "positions": found.values["positions"],
        "achieved_rate": found.values["achieved_rate"],
    }


def main() -> None:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--data-dir", type=Path, required=True, help="holds eval/*.jsonl.gz and text/*.jsonl.gz")
    options.add_argument("--domains", nargs="+", choices=list(DOMAINS), default=list(DOMAINS))
    options.add_argument("--limit", type=int, default=60, help="passages of each kind")
    options.add_argument("--context", type=int, default=160, help="source tokens of a passage")
    options.add_argument("--length", type=int, default=40, help="tokens of its continuation")
    options.add_argument("--rates", type=float, nargs="+", default=[2.0, 4.0])
    options.add_argument("--batch-size", type=int, default=12)
    args = options.parse_args()
    compressor = load_compressor_for(args.llm)
    same = {
        "llm": compressor.llm.source,
        "fingerprint": compressor.fingerprint,
        "limit": args.limit,
        "context": args.context,
        "length": args.length,
        "rates": args.rates,
    }
    done = _done(args.json, same)
    for name in args.domains:
        if name not in done:
            domain = DOMAINS[name]
            path = args.data_dir / domain.file
            found = pieces(compressor, path, args.limit, args.context, args.length, held_out=domain.trained_on)
            progress(f"{name}: {len(found)} passages")
            rows = measure(compressor, found, args.rates, args.batch_size)
            done[name] = {"title": domain.title, "trained_on": domain.trained_on, "n": len(found), "rows": rows}
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
