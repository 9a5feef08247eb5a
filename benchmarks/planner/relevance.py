"""Which relevance finds the sentence that says the answer?

Questions of held-out rows of the TRAINING data, whose answer stands word by word in a passage they rest on: relevance
is a setting, and evaluation sets are not there to choose settings by. Each comes with its passages and the nearest
others of the pool, four in all. The sentences of these are ordered by the rank of their passage, by BM25, by max-sim
(late interaction of the question's states in front of the entry layer with the stored ones), by both with reciprocal
rank fusion, and by what was learned for the compressor, if anything was. Told is how often one that says the answer is
the first, or among the first two (of sentences that a signal holds alike, by chance), and how often the budgeted read
policy reads one when it may spend a quarter, or an eighth, of what the passages take as text. Further rows change one
thing about max-sim each. Intervals are over groups of questions that share passages. No answer is generated; the LLM's
lower half runs over passages and questions.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.common import any_compressor_of, dtype_of, parsed, parser, progress, written
from benchmarks.planner.sought import sought
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.config import DEFAULT_EMBEDDER
from compllm_rag.errors import ConfigurationError
from compllm_rag.library import ConceptLibrary
from compllm_rag.models.plaintext import encode_plain
from compllm_rag.prompt import QAPrompt
from compllm_rag.reading.budget import ReadBudget
from compllm_rag.reading.budgeted import BudgetedReadPolicy
from compllm_rag.reading.choice import Candidate, Reading, ReadPolicy, ReadSpec
from compllm_rag.reading.maxsim import cosines, of_sentences
from compllm_rag.reading.passages import PassageReading, Retrieved
from compllm_rag.reading.signals import SIGNALS, Judged, MaxSim
from compllm_rag.store.encodings import deep_encoding
from compllm_rag.store.memory import MemoryStore
from compllm_rag.training.gold_sentences import Sought
from compllm_rag.training.material import Material

Row = dict[str, Any]
_RESAMPLES = 1000
# Shares of what the passages take as text.
COSTS = (0.25, 0.125)
COLUMNS = ("recall@1", "recall@2", *(f"read at {cost:g}" for cost in COSTS))


@dataclass
class Judging:
    """A read policy that notes what signals say, and reads nothing."""

    signals: dict[str, Any]
    shares: dict[str, list[list[float]]] = field(default_factory=dict)
    name: str = "judging"
    needs_states: bool = True

    def choose(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Reading]:
        """See `ReadPolicy.choose`."""
        for name, signal in self.signals.items():
            self.shares[name] = [list(judged.sentences) for judged in signal.judge(query, nodes, spec)]
        return [Reading.whole(node, "left out") for node in nodes]


@dataclass(frozen=True)
class Changed:
    """Max-sim with one thing about it changed.

    Args:
        asked: States of a question (n_tokens, hidden_size); None takes those of `MaxSim`.
        near: Cosines of these to states of passages; see `compllm_rag.reading.maxsim.cosines`.
    """

    near: Callable[[torch.Tensor, Sequence[torch.Tensor]], list[torch.Tensor]]
    asked: Callable[[str], torch.Tensor] | None = None

    def judge(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Judged]:
        """See `Signal.judge`; sentences alone."""
        states = spec.states.of_question(query) if self.asked is None else self.asked(query)
        stored = [found for found in map(spec.states.of_passage, nodes) if not isinstance(found, str)]
        out = []
        for node, found, near in zip(nodes, stored, self.near(states, [f.states for f in stored]), strict=True):
            scores = of_sentences(near, found.places, node.sentences)
            out.append(Judged(0.0, tuple(-1.0 if score is None else score for score in scores), ()))
        return out


def main(argv: Sequence[str] | None = None) -> Row:
    """Run it."""
    shared = "llm data-dir reader compressor entry-layer dtype embedder rate limit"
    options = parser("relevance", __doc__, shared, limit=200, rate=1.0, codec="deep")
    options.add_argument("--passages", type=int, default=4, help="of a question")
    args = parsed(options, argv)
    if args.data_dir is None:
        options.error("--data-dir is needed")
    compressor = any_compressor_of(args)
    if not isinstance(compressor, DeepCompressor):
        raise ConfigurationError(
            "max-sim compares states", got="concepts at the input embeddings", expected="deep ones"
        )
    segmenter = compressor.spec.segmenter
    groups = Material(*Material.files_of(args.data_dir), segmenter).held_out
    asked = sought(groups, segmenter, _embedder(args), limit=args.limit, n_passages=args.passages)
    library = ConceptLibrary(compressor, MemoryStore(compressor.spec.width), rate=args.rate)
    texts = list(dict.fromkeys(passage.text for one in asked for passage in one.passages))
    for at in range(0, len(texts), 16):
        library.ensure(texts[at : at + 16])
        progress(f"{min(len(texts), at + 16)} of {len(texts)} passages compressed")
    coarse = in_four_bits(library, texts)
    found = [judged(one, library, coarse, compressor) for one in asked]
    hits = {name: np.array([each[name] for each in found]) for name in found[0]}  # (n_questions, 2 or 4) each
    groups_of = np.array([one.group for one in asked])
    rows = {name: _row(values, hits["bm25"], groups_of) for name, values in hits.items()}
    return written(
        args,
        {
            "llm": compressor.llm.source,
            "fingerprint": compressor.fingerprint,
            "dtype": dtype_of(compressor),
            "entry_layer": compressor.config.entry_layer,
            "rate": args.rate,
            "n": len(asked),
            "groups": len(set(groups_of.tolist())),
            "passages": args.passages,
            "sentences": sum(one.n_sentences for one in asked) / len(asked),
            "gold": sum(len(one.gold) for one in asked) / len(asked),
            "rows": rows,
        },
    )


def in_four_bits(library: ConceptLibrary, texts: Sequence[str]) -> ConceptLibrary:
    """The same passages as a storage of int4 keeps them."""
    store = MemoryStore(library.spec.width, encoding=deep_encoding("int4"))
    keys = [key for text in texts for key in library.passage(text).keys]
    store.put((key, rows) for key, rows in zip(keys, library.store.get(keys), strict=True) if rows is not None)
    return ConceptLibrary(library.compressor, store, rate=library.policy)


def judged(
    one: Sought, library: ConceptLibrary, coarse: ConceptLibrary, compressor: DeepCompressor
) -> dict[str, list[float]]:
    """Of each signal, the chance that it finds the answer: first, among the first two, read at each of `COSTS`."""
    changed = {
        "max-sim, question through the LoRA that writes": Changed(cosines, partial(_written, compressor)),
        "max-sim, mean removed alone": Changed(_centred),
        "max-sim, states as they are": Changed(_raw),
    }
    signals = signals_of(compressor)
    asking = Judging({**signals, **changed})
    retrieved = _retrieved(one, library)
    PassageReading(library, asking, ReadBudget()).read(one.question, retrieved, 0)
    scores = asking.shares
    again = Judging({"max-sim of int4 states": MaxSim()})
    PassageReading(coarse, again, ReadBudget()).read(one.question, retrieved, 0)
    scores |= again.shares
    out = {
        "rank of the passage": [[-float(rank)] * len(row) for rank, row in enumerate(one.sentences)],
        **scores,
    }
    found = {name: [hit(row, one.gold, k) for k in (1, 2)] for name, row in out.items()}
    for name in signals:
        found[name] += [_read(one, library, retrieved, name, cost) for cost in COSTS]
    return found


def signals_of(compressor: DeepCompressor) -> dict[str, Any]:
    """Those that have something to go by."""
    return {name: signal for name, signal in SIGNALS.items() if name != "learned" or compressor.interaction is not None}


def hit(scores: Sequence[Sequence[float]], gold: frozenset[tuple[int, int]], k: int) -> float:
    """The chance that one of the first k sentences says the answer, those of one score in any order.

    Args:
        scores: Of each sentence, by passages.
        gold: (passage, sentence) of those that say it.
        k: How many are looked at.
    """
    each = [(score, (p, s) in gold) for p, row in enumerate(scores) for s, score in enumerate(row)]
    missed, left = 1.0, k
    for score in sorted({score for score, _ in each}, reverse=True):
        if left <= 0:
            break
        alike = [says for other, says in each if other == score]
        drawn, says = min(left, len(alike)), sum(alike)
        missed *= math.comb(len(alike) - says, drawn) / math.comb(len(alike), drawn)
        left -= drawn
    return 1.0 - missed


def _read(one: Sought, library: ConceptLibrary, retrieved: list[Retrieved], signal: str, cost: float) -> float:
    """1 if the budgeted policy reads a sentence that says the answer within a share of text's prefill, else 0."""
    policy: ReadPolicy = BudgetedReadPolicy(relevance=signal)
    whole = sum(len(library.passage(passage.text).ids) + passage.around for passage in retrieved)
    decided = PassageReading(library, policy, ReadBudget(prefill=max(1.0, cost * whole))).read(
        one.question, retrieved, 0
    )
    for p, s in one.gold:
        sentence = one.sentences[p][s]
        for part in decided.passages[p].reading.parts:
            if part.used != "left out" and part.start <= sentence.start and sentence.end <= part.end:
                return 1.0
    return 0.0


def _retrieved(one: Sought, library: ConceptLibrary) -> list[Retrieved]:
    template = QAPrompt(library.llm.tokenizer).template
    return [
        Retrieved(str(i), passage.text, passage.title, None, sum(map(len, template.passage(i + 1, passage.title, []))))
        for i, passage in enumerate(one.passages)
    ]


@torch.inference_mode()
def _written(compressor: DeepCompressor, query: str) -> torch.Tensor:
    """States (n_tokens, hidden_size) of a question that runs through the lower half as passages do."""
    ids = list(encode_plain(compressor.llm.tokenizer, query)["input_ids"])
    return compressor.states([ids])[0].float().cpu()


def _centred(question: torch.Tensor, passages: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Cosines (n_tokens, n_concepts) of each passage, the passages' mean removed and no dimension scaled."""
    mean = torch.cat(list(passages)).float().mean(0)  # (hidden_size,)
    return _raw(question.float() - mean, [states.float() - mean for states in passages])


def _raw(question: torch.Tensor, passages: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Cosines (n_tokens, n_concepts) of each passage between states as they are."""
    asked = F.normalize(question.float(), dim=-1)
    return [asked @ F.normalize(states.float(), dim=-1).T for states in passages]


def _row(values: np.ndarray, base: np.ndarray, groups: np.ndarray) -> Row:
    """Percent of questions, intervals over groups, and differences to BM25.

    Args:
        values: (n_questions, 2 or 4), see `judged`.
        base: The same of BM25.
        groups: Of each question, (n_questions,).
    """
    numbers, inverse = np.unique(groups, return_inverse=True)
    drawn = np.random.default_rng(0).integers(0, len(numbers), size=(_RESAMPLES, len(numbers)))
    weights = np.stack([np.bincount(row, minlength=len(numbers)) for row in drawn])[:, inverse]  # (resamples, n)
    out: Row = {}
    for i, name in enumerate(COLUMNS[: values.shape[1]]):
        mine, less = 100 * values[:, i], 100 * (values[:, i] - base[:, i])
        out[name] = float(mine.mean())
        out[f"{name} interval"] = _interval(weights, mine)
        out[f"{name} over BM25"] = {"difference": float(less.mean()), "interval": _interval(weights, less)}
    return out


def _interval(weights: np.ndarray, values: np.ndarray) -> list[float]:
    means = weights @ values / weights.sum(1)  # (resamples,)
    return [float(end) for end in np.percentile(means, [2.5, 97.5])]


def _embedder(args: Namespace) -> Any:
    from compllm_rag.llamaindex.embedding import load_embedder

    return load_embedder(args.embedder or DEFAULT_EMBEDDER)[0]
