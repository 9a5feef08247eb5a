"""How likely each sentence of the retrieved passages matters to a question, by what a signal says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compllm_rag.errors import ConfigurationError
from compllm_rag.reading.choice import Candidate
from compllm_rag.reading.signals import Judged


@dataclass(frozen=True)
class Weights:
    """What counts how much; every part lies between 0 and 1 before it is weighed.

    The defaults were chosen by how much of the sentences with the answer is read, on training questions of HotpotQA,
    MuSiQue and SQuAD, at a quarter and an eighth of text's prefill, by BM25; no LLM answered for that.

    Attributes:
        base: Of every sentence.
        sentence: What the signal says of the sentence (BM25, unless another is asked for), by the best one of all
            passages.
        beside: The same of the better of its two neighbours.
        passage: What it says of the passage, by the best passage; BM25 reads the title, too.
        rank: Falls with the retriever's rank r as 1 / (1 + r).
        length: What all of it is multiplied by is the sentence's tokens to this power: a long one says more.
        least: A sentence is worth nothing, and left out though there be room, where it is less likely to matter than
            this share of the likeliest one. What does not matter leads a small LLM astray, but where the signal errs
            the answer is left out (docs/guide/read_policy.md).
    """

    base: float = 0.05
    sentence: float = 1.0
    beside: float = 0.2
    passage: float = 0.5
    rank: float = 0.3
    length: float = 1.0
    least: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.least <= 1:
            raise ConfigurationError(
                "relevance cutoff (`least`) makes no sense", got=self.least, expected="a share, from 0 to 1"
            )


@dataclass(frozen=True)
class Relevance:
    """Of one sentence.

    Attributes:
        value: Only its size beside those of others means something; 0 where the sentence is not worth reading.
        why: In plain words.
    """

    value: float
    why: str


def relevance(nodes: Sequence[Candidate], judged: Sequence[Judged], weights: Weights) -> list[list[Relevance]]:
    """The relevance of every sentence of every passage.

    Args:
        nodes: Passages, best first.
        judged: How well each answers to the question, by a signal.
        weights: See `Weights`.
    """
    likely: list[list[float]] = []
    whys: list[list[str]] = []
    for node, found in zip(nodes, judged, strict=True):
        shares = found.sentences
        fixed = weights.base + weights.passage * found.passage + weights.rank / (1 + node.rank)
        besides = [max([0.0, *shares[max(0, i - 1) : i], *shares[i + 1 : i + 2]]) for i in range(len(shares))]
        likely.append(
            [fixed + weights.sentence * share + weights.beside * by for share, by in zip(shares, besides, strict=True)]
        )
        whys.append([_why(found.whys[i], beside, node.rank) for i, beside in enumerate(besides)])
    least = weights.least * max((value for row in likely for value in row), default=0.0)
    return [
        [
            Relevance(value * len(sentence) ** weights.length, why)
            if value >= least
            else Relevance(0.0, f"{why}; too far behind the likeliest")
            for sentence, value, why in zip(node.sentences, row, told, strict=True)
        ]
        for node, row, told in zip(nodes, likely, whys, strict=True)
    ]


def _why(said: str, beside: float, rank: int) -> str:
    if said:
        return said
    return "beside a sentence with words of the question" if beside else f"of passage {rank + 1} by retrieval"
