"""How likely each sentence of the retrieved passages matters to a question, by what a signal says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """

    base: float = 0.05
    sentence: float = 1.0
    beside: float = 0.2
    passage: float = 0.5
    rank: float = 0.3
    length: float = 1.0


@dataclass(frozen=True)
class Relevance:
    """Of one sentence.

    Attributes:
        value: Above 0; only its size beside those of others means something.
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
    out: list[list[Relevance]] = []
    for node, found in zip(nodes, judged, strict=True):
        shares = found.sentences
        fixed = weights.base + weights.passage * found.passage + weights.rank / (1 + node.rank)
        row = []
        for i, sentence in enumerate(node.sentences):
            beside = max([0.0, *shares[max(0, i - 1) : i], *shares[i + 1 : i + 2]])
            value = fixed + weights.sentence * shares[i] + weights.beside * beside
            value *= len(sentence) ** weights.length
            row.append(Relevance(value, _why(found.whys[i], beside, node.rank)))
        out.append(row)
    return out


def _why(said: str, beside: float, rank: int) -> str:
    if said:
        return said
    return "beside a sentence with words of the question" if beside else f"of passage {rank + 1} by retrieval"
