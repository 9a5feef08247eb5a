"""Ways to spend the same prefill on the same retrieved passages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import DEFAULT_RATES, Narrowing
from compllm_rag.evaluation.bodies import Bodies, PassageBodies, Segmented, Setting
from compllm_rag.evaluation.read_policies import QuestionBodies
from compllm_rag.reading.budgeted import BudgetedReadPolicy
from compllm_rag.reading.choice import Candidate, Part, Reading, ReadSpec
from compllm_rag.reading.sentences import word_matches

Make = Callable[[ConceptCompressor, Segmented, float, Narrowing | None], PassageBodies]


@dataclass(frozen=True)
class InOrder:
    """Reads sentences as text in an order until the budget is spent; each at its place in its passage.

    Args:
        by_words: The order is that of BM25 beside the question; else that of retrieval and reading.
    """

    by_words: bool
    name: str = field(default="in order", init=False)

    def choose(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Reading]:
        """See `ReadPolicy.choose`; what does not fit any more is passed over."""
        each = [(n, s) for n, node in enumerate(nodes) for s in range(len(node.sentences))]
        if self.by_words:
            matches = word_matches(query, [nodes[n].sentences[s].text for n, s in each])
            best = sorted(range(len(each)), key=lambda i: -matches[i].score)
            each = [each[i] for i in best]
        read: set[tuple[int, int]] = set()
        tokens = 0
        for n, s in each:
            begun = any(other == n for other, _ in read)
            more = len(nodes[n].sentences[s]) + (0 if begun else nodes[n].around)
            if spec.meter.fits(tokens + more, 0):
                read.add((n, s))
                tokens += more
        return [
            Reading(tuple(_part(node, s, (n, s) in read) for s in range(len(node.sentences))))
            for n, node in enumerate(nodes)
        ]


def _part(node: Candidate, s: int, read: bool) -> Part:
    sentence = node.sentences[s]
    return Part(sentence.start, sentence.end, "text" if read else "left out")


def _planner(
    compressor: ConceptCompressor, segmented: Segmented, rate: float, narrowing: Narrowing | None, *, several: bool
) -> PassageBodies:
    own = DEFAULT_RATES["deep" if compressor.config.deep else "input"]
    kept = (own, rate) if several else (own,)
    return QuestionBodies(compressor, rate=rate, policy=BudgetedReadPolicy(), kept=kept, narrowing=narrowing)


def _sentences(
    compressor: ConceptCompressor, segmented: Segmented, rate: float, narrowing: Narrowing | None, *, by_words: bool
) -> PassageBodies:
    return QuestionBodies(compressor, rate=rate, policy=InOrder(by_words), mode="text", narrowing=narrowing)


def _alike(
    compressor: ConceptCompressor, segmented: Segmented, rate: float, narrowing: Narrowing | None, *, mode: str
) -> PassageBodies:
    return Bodies(compressor, Setting.of(mode, rate), segmented)


# The planner from a storage at one rate and at two, then its rivals.
PLANNERS = ("planner", "planner, two rates")
CONTENDERS: dict[str, Make] = {
    "planner": partial(_planner, several=False),
    "planner, two rates": partial(_planner, several=True),
    "BM25 sentences": partial(_sentences, by_words=True),
    "concepts": partial(_alike, mode="concepts"),
    "fewer text": partial(_sentences, by_words=False),
    "random": partial(_alike, mode="random"),
}
# That the planner has to beat; chance is there to be seen.
RIVALS = ("BM25 sentences", "concepts", "fewer text")
