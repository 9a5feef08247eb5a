"""Ways to spend the same prefill on the same retrieved passages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import DEFAULT_RATES, Narrowing
from compllm_rag.evaluation.bodies import Bodies, PassageBodies, Segmented, Setting
from compllm_rag.evaluation.read_policies import QuestionBodies
from compllm_rag.reading.budgeted import BudgetedReadPolicy, weights_for
from compllm_rag.reading.choice import Candidate, Part, Reading, ReadSpec
from compllm_rag.reading.sentences import word_matches

# Of `planner, likeliest alone`: chosen on held-out training questions (docs/guide/read_policy.md).
LEAST = 0.8
# The same of probabilities that were learned: chosen on 200 held-out rows (ibid.).
LEAST_LEARNED = 0.2
Make = Callable[[ConceptCompressor, Segmented, float, Narrowing | None], PassageBodies]


@dataclass(frozen=True)
class InOrder:
    """Reads sentences as text in an order until the budget is spent; each at its place in its passage.

    Args:
        by_words: The order is that of BM25 beside the question; else that of retrieval and reading.
        cut: The first sentence that does not fit is cut off where the budget ends, and nothing behind it is read; else
            sentences that do not fit are passed over.
    """

    by_words: bool
    cut: bool = False
    name: str = field(default="in order", init=False)

    def choose(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Reading]:
        """See `ReadPolicy.choose`."""
        each = [(n, s) for n, node in enumerate(nodes) for s in range(len(node.sentences))]
        if self.by_words:
            matches = word_matches(query, [nodes[n].sentences[s].text for n, s in each])
            best = sorted(range(len(each)), key=lambda i: -matches[i].score)
            each = [each[i] for i in best]
        read: dict[tuple[int, int], int] = {}  # of each sentence that is read: how many of its tokens
        tokens = 0
        for n, s in each:
            around = 0 if any(other == n for other, _ in read) else nodes[n].around
            whole = len(nodes[n].sentences[s])
            fits = [k for k in range(whole, 0, -1 if self.cut else -whole) if spec.meter.fits(tokens + around + k, 0)]
            if fits:
                read[n, s] = fits[0]
                tokens += around + fits[0]
            if self.cut and fits[:1] != [whole]:
                break
        return [
            Reading(tuple(part for s in range(len(node.sentences)) for part in _parts(node, s, read.get((n, s), 0))))
            for n, node in enumerate(nodes)
        ]


def _parts(node: Candidate, s: int, read: int) -> list[Part]:
    """The first `read` tokens of a sentence as text, the others left out."""
    sentence, ends = node.sentences[s], node.sentences[s].start + read
    parts = [Part(sentence.start, ends, "text"), Part(ends, sentence.end, "left out")]
    return [part for part in parts if part.end > part.start]


def _planner(
    compressor: ConceptCompressor,
    segmented: Segmented,
    rate: float,
    narrowing: Narrowing | None,
    *,
    several: bool = False,
    least: float = 0.0,
    relevance: str = "bm25",
    text: bool = True,
) -> PassageBodies:
    own = DEFAULT_RATES["deep" if compressor.config.deep else "input"]
    kept = (own, rate) if several else (own,)
    policy = BudgetedReadPolicy(weights=weights_for(relevance, least), relevance=relevance, text=text)
    return QuestionBodies(compressor, rate=rate, policy=policy, kept=kept, narrowing=narrowing)


def _sentences(
    compressor: ConceptCompressor, segmented: Segmented, rate: float, narrowing: Narrowing | None, *, by_words: bool
) -> PassageBodies:
    return QuestionBodies(compressor, rate=rate, policy=InOrder(by_words), mode="text", narrowing=narrowing)


def _alike(
    compressor: ConceptCompressor, segmented: Segmented, rate: float, narrowing: Narrowing | None, *, mode: str
) -> PassageBodies:
    return Bodies(compressor, Setting.of(mode, rate), segmented)


LEARNED = "planner, likeliest alone, learned"
# The planner from a storage at one rate and at two, and two that leave their budget unspent where little matters; then
# its rivals. By what was learned sentences are text where there is room for it, as ever, or concepts alone.
PLANNERS = ("planner", "planner, two rates", "planner, likeliest alone", LEARNED, f"{LEARNED}, concepts alone")
CONTENDERS: dict[str, Make] = {
    "planner": _planner,
    "planner, two rates": partial(_planner, several=True),
    "planner, likeliest alone": partial(_planner, least=LEAST),
    LEARNED: partial(_planner, least=LEAST_LEARNED, relevance="learned"),
    f"{LEARNED}, concepts alone": partial(_planner, least=LEAST_LEARNED, relevance="learned", text=False),
    "BM25 sentences": partial(_sentences, by_words=True),
    "concepts": partial(_alike, mode="concepts"),
    "fewer text": partial(_sentences, by_words=False),
    "random": partial(_alike, mode="random"),
}
# That the planner has to beat; chance is there to be seen.
RIVALS = ("BM25 sentences", "concepts", "fewer text")
