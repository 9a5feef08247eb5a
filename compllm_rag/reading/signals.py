"""What tells how well passages and their sentences answer to a question: words, states, both, or what was learned.

A signal gives shares of the best, so that one can stand in for another in `relevance`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from compllm_rag.errors import ConfigurationError
from compllm_rag.reading.choice import Candidate, PassageStates, ReadSpec
from compllm_rag.reading.maxsim import cosines, max_sim, of_sentences
from compllm_rag.reading.sentences import sentence_bounds, word_matches

# Of reciprocal rank fusion: how little the first few ranks differ (Cormack, Clarke and Buettcher, SIGIR 2009).
_RANK_DAMPING = 60
# Beside probabilities, of a sentence with no word of the question and no concepts to go by: it comes last, not never.
_LEAST = 1e-3


@dataclass(frozen=True)
class Judged:
    """How well one passage answers to the question.

    Attributes:
        passage: As a whole, from 0 to 1, the best of all passages.
        sentences: Each of its sentences, from 0 to 1, the best of all passages' sentences.
        whys: What speaks for each sentence, in plain words; "" for nothing.
    """

    passage: float
    sentences: tuple[float, ...]
    whys: tuple[str, ...]


class Signal(Protocol):
    """Judges passages by a question."""

    @property
    def name(self) -> str:
        """How it is called in accounts."""
        ...

    @property
    def needs_states(self) -> bool:
        """Whether it compares states, which only deep concepts have."""
        ...

    def judge(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Judged]:
        """How well each passage answers.

        Args:
            query: What is asked.
            nodes: Passages, best first.
            spec: Gives states; `told` takes what accounts should tell.
        """
        ...


@dataclass(frozen=True)
class Words:
    """BM25 of sentences and of passages with their titles, over what was retrieved."""

    name: str = field(default="bm25", init=False)
    needs_states: bool = field(default=False, init=False)

    def judge(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Judged]:
        """See `Signal.judge`."""
        matches = word_matches(query, [sentence.text for node in nodes for sentence in node.sentences])
        whole = word_matches(query, [f"{node.title}\n{node.text}" for node in nodes])
        most = max((match.score for match in matches), default=0.0) or 1.0
        most_whole = max((match.score for match in whole), default=0.0) or 1.0
        out: list[Judged] = []
        at = 0
        for node, passage in zip(nodes, whole, strict=True):
            own = matches[at : at + len(node.sentences)]
            at += len(own)
            shares = tuple(match.score / most for match in own)
            whys = tuple(f"says {', '.join(match.words[:4])}" if match.words else "" for match in own)
            out.append(Judged(passage.score / most_whole, shares, whys))
        return out


def _looked_up(
    name: str, query: str, nodes: Sequence[Candidate], spec: ReadSpec
) -> tuple[torch.Tensor, list[PassageStates | str]]:
    """States (n_tokens, hidden_size) of the question and those of passages, or why there are none; told as `name`."""
    begun = time.perf_counter()
    asked = spec.states.of_question(query)
    took = time.perf_counter() - begun
    stored = [spec.states.of_passage(node) if len(asked) else "the question has no token" for node in nodes]
    spec.told["relevance"] = {
        "signal": name,
        "question_tokens": len(asked),
        "question_s": took,
        "by_words": {node.id: why for node, why in zip(nodes, stored, strict=True) if isinstance(why, str)},
    }
    return asked, stored


@dataclass(frozen=True)
class MaxSim:
    """Late interaction of the question's states with the stored ones (see `compllm_rag.reading.maxsim`).

    Passages of which no concepts are stored are judged by their words, and `told` says so: nothing is compressed to
    find out whether it should be read.
    """

    name: str = field(default="maxsim", init=False)
    needs_states: bool = field(default=True, init=False)

    def judge(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Judged]:
        """See `Signal.judge`."""
        return [_either(own, words) for own, words in zip(*self.both(query, nodes, spec), strict=True)]

    def both(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> tuple[list[Judged | None], list[Judged]]:
        """What states say of each passage, None where it has none, and what words say."""
        asked, stored = _looked_up(self.name, query, nodes, spec)
        with_states = [i for i, found in enumerate(stored) if not isinstance(found, str)]
        own = [found for found in stored if not isinstance(found, str)]
        judged: list[Judged | None] = [None] * len(nodes)
        if own:
            for i, made in zip(with_states, _by_states(asked, [nodes[i] for i in with_states], own), strict=True):
                judged[i] = made
        return judged, Words().judge(query, nodes, spec)


@dataclass(frozen=True)
class Fused:
    """Words and max-sim by reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009).

    Each sentence, and each passage, gets 1 / (60 + its rank) by either; where a passage has no states, its rank by
    words counts twice.
    """

    name: str = field(default="bm25+maxsim", init=False)
    needs_states: bool = field(default=True, init=False)

    def judge(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Judged]:
        """See `Signal.judge`."""
        states, words = MaxSim().both(query, nodes, spec)
        spec.told["relevance"]["signal"] = self.name
        either = [_either(own, said) for own, said in zip(states, words, strict=True)]
        passages = _fused([[judged.passage for judged in each] for each in (words, either)])
        sentences = _fused([[share for judged in each for share in judged.sentences] for each in (words, either)])
        out, at = list[Judged](), 0
        for said, own in zip(words, either, strict=True):
            shares = tuple(sentences[at : (at := at + len(said.sentences))])
            whys = tuple("; ".join(dict.fromkeys(filter(None, pair))) for pair in zip(said.whys, own.whys, strict=True))
            out.append(Judged(passages[len(out)], shares, whys))
        return out


@dataclass(frozen=True)
class Learned:
    """Late interaction as it was learned for the compressor (see `compllm_rag.compression.late_interaction`).

    A sentence's share is its probability to say the answer, beside that of the likeliest one. Passages of which no
    concepts are stored are judged by their words, as with `MaxSim`; there, no word of the question is not nothing.

    Args:
        temperature: Above 1 brings probabilities nearer to each other, so that more than the likeliest sentence counts.
    """

    temperature: float = 1.0
    name: str = field(default="learned", init=False)
    needs_states: bool = field(default=True, init=False)
    needs_learned: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigurationError("temperature makes no sense", got=self.temperature, expected="more than 0")

    def judge(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Judged]:
        """See `Signal.judge`.

        Raises:
            ConfigurationError: Nothing was learned for this compressor.
        """
        refuse_unlearned(spec.interaction)
        words = Words().judge(query, nodes, spec)
        asked, stored = _looked_up(self.name, query, nodes, spec)
        made = [(i, found) for i, found in enumerate(stored) if not isinstance(found, str)]
        out = [replace(one, sentences=tuple(max(share, _LEAST) for share in one.sentences)) for one in words]
        if not made or isinstance(spec.interaction, str):
            return out
        bounds = [sentence_bounds(found.places, nodes[i].sentences) for i, found in made]
        said = [share for i, _ in made for share in words[i].sentences]
        with torch.inference_mode():
            scores = spec.interaction(asked, [found.states for _, found in made], bounds, said)  # (n_sentences,)
        rows = list(torch.split(scores / self.temperature, [len(each) for each in bounds]))
        best = max((float(row.max()) for row in rows if len(row)), default=0.0)
        whole = [float(row.logsumexp(0)) if len(row) else -math.inf for row in rows]
        for (i, _), own, row, passage in zip(made, bounds, rows, whole, strict=True):
            shares = (row - best).exp().tolist()
            whys = tuple(
                f"{share:.2f} as likely to answer as the likeliest" if end > start else "no concept of it is kept"
                for share, (start, end) in zip(shares, own, strict=True)
            )
            out[i] = Judged(math.exp(passage - max(whole)) if shares else 0.0, tuple(shares), whys)
        return out


def refuse_unlearned(interaction: object) -> None:
    """Refuse to judge by what was never learned.

    Raises:
        ConfigurationError: It is a reason in place of a `LateInteraction`.
    """
    if isinstance(interaction, str):
        raise ConfigurationError(
            "relevance learned has nothing to go by",
            got=interaction,
            expected="a compressor of deep concepts for which `compllm-rag train relevance` ran",
            next_step="train it and ingest with that compressor, or take relevance bm25 or maxsim",
        )


SIGNALS: dict[str, Signal] = {signal.name: signal for signal in (Words(), MaxSim(), Fused(), Learned())}


def signal_named(given: object) -> Signal:
    """A signal by its name, or one as it is.

    Raises:
        ConfigurationError: There is no such signal, or it cannot judge.
    """
    if isinstance(given, str) and given in SIGNALS:
        return SIGNALS[given]
    if isinstance(given, str | type) or not callable(getattr(given, "judge", None)):
        raise ConfigurationError(
            "there is no such relevance",
            got=repr(given),
            expected=f"{', '.join(SIGNALS)}, or an object with `name`, `needs_states` and `judge`",
            next_step="pass one of them",
        )
    return given  # type: ignore[return-value]


def _by_states(asked: torch.Tensor, nodes: Sequence[Candidate], stored: Sequence[PassageStates]) -> list[Judged]:
    """What states (n_tokens, hidden_size) of the question say of passages that have some."""
    near = cosines(asked, [found.states for found in stored])  # (n_tokens, n_concepts) each
    whole = _shares([max_sim(each) for each in near])
    each_sentence = [
        score
        for node, found, own in zip(nodes, stored, near, strict=True)
        for score in of_sentences(own, found.places, node.sentences)
    ]
    shares, out, at = _shares(each_sentence), list[Judged](), 0
    for node, passage in zip(nodes, whole, strict=True):
        end = at + len(node.sentences)
        whys = tuple(
            "no concept of it is kept" if score is None else f"{share:.2f} near to the question"
            for score, share in zip(each_sentence[at:end], shares[at:end], strict=True)
        )
        out.append(Judged(passage, tuple(shares[at:end]), whys))
        at = end
    return out


def _either(states: Judged | None, words: Judged) -> Judged:
    return words if states is None else states


def _shares(scores: Sequence[float | None]) -> list[float]:
    """Scores from the least, 0, to the most, 1; 0 for none. Cosines have no natural zero."""
    there = [score for score in scores if score is not None]
    least, most = min(there, default=0.0), max(there, default=0.0)
    return [0.0 if score is None or most == least else (score - least) / (most - least) for score in scores]


def _fused(signals: Sequence[Sequence[float]]) -> list[float]:
    """Reciprocal ranks by each signal, added up, as shares; those that a signal holds alike share their mean rank."""
    added = [0.0] * len(signals[0])
    for scores in signals:
        for i, score in enumerate(scores):
            rank = 1 + sum(other > score for other in scores) + (sum(other == score for other in scores) - 1) / 2
            added[i] += 1 / (_RANK_DAMPING + rank)
    return _shares(added)
