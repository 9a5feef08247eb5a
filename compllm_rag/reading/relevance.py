"""How likely each sentence of the retrieved passages matters to a question; without any LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compllm_rag.reading.choice import Candidate
from compllm_rag.reading.sentences import word_matches


@dataclass(frozen=True)
class Weights:
    """What counts how much; every part lies between 0 and 1 before it is weighed.

    The defaults were chosen by how much of the sentences with the answer is read, on training questions of HotpotQA,
    MuSiQue and SQuAD, at a quarter and an eighth of text's prefill; no LLM answered for that.

    Attributes:
        base: Of every sentence.
        sentence: BM25 of the sentence, by the best one of all passages.
        beside: The same of the better of its two neighbours.
        passage: BM25 of the passage with its title, by the best passage.
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


def relevance(query: str, nodes: Sequence[Candidate], weights: Weights) -> list[list[Relevance]]:
    """The relevance of every sentence of every passage.

    Args:
        query: What is asked.
        nodes: Passages, best first.
        weights: See `Weights`.
    """
    matches = word_matches(query, [sentence.text for node in nodes for sentence in node.sentences])
    whole = word_matches(query, [f"{node.title}\n{node.text}" for node in nodes])
    most = max((match.score for match in matches), default=0.0) or 1.0
    most_whole = max((match.score for match in whole), default=0.0) or 1.0
    out: list[list[Relevance]] = []
    at = 0
    for node, passage in zip(nodes, whole, strict=True):
        own = matches[at : at + len(node.sentences)]
        at += len(own)
        shares = [match.score / most for match in own]
        fixed = weights.base + weights.passage * passage.score / most_whole + weights.rank / (1 + node.rank)
        row = []
        for i, match in enumerate(own):
            beside = max([0.0, *shares[max(0, i - 1) : i], *shares[i + 1 : i + 2]])
            value = fixed + weights.sentence * shares[i] + weights.beside * beside
            value *= len(node.sentences[i]) ** weights.length
            row.append(Relevance(value, _why(match.words, beside, node.rank)))
        out.append(row)
    return out


def _why(words: Sequence[str], beside: float, rank: int) -> str:
    if words:
        return f"says {', '.join(words[:4])}"
    return "beside a sentence with words of the question" if beside else f"of passage {rank + 1} by retrieval"
