"""Passages as a read policy wants them: candidates for it, and the spans that its readings come to."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from compllm_rag.compression.rate_policies.shares import PredictedShares
from compllm_rag.config import MissingChoice, MissingPolicy, Mode
from compllm_rag.errors import ConfigurationError
from compllm_rag.library import ConceptLibrary, Fetched, Passage
from compllm_rag.prompt import ConceptSpan, Span, TextSpan
from compllm_rag.reading.budget import ReadBudget
from compllm_rag.reading.choice import (
    Candidate,
    Part,
    PassageStates,
    Reading,
    ReadPolicy,
    ReadSpec,
    checked_readings,
)
from compllm_rag.reading.crossover import crossover
from compllm_rag.reading.sentences import sentence_cutter
from compllm_rag.reading.signals import refuse_unlearned
from compllm_rag.reading.states import StatesAtHand, refuse_without_states


@dataclass(frozen=True)
class Retrieved:
    """A retrieved passage, before anything is decided.

    Attributes:
        id: Of the node.
        text: The passage.
        title: May be empty.
        score: The retriever's; None where it gives none.
        around: Prompt positions of its number, title and metadata.
    """

    id: str
    text: str
    title: str = ""
    score: float | None = None
    around: int = 0


@dataclass
class ReadPassage:
    """What became of one passage.

    Attributes:
        reading: What the policy decided.
        spans: In reading order; none where it is left out.
        hits: Segments found in the store.
        misses: Segments not found.
        fetch_s: Seconds spent reading concepts from the store.
        compress_s: Seconds spent compressing what was missing.
        bypassed: Its concepts are missing, and text is sooner than making them.
    """

    reading: Reading
    spans: list[Span] = field(default_factory=list)
    hits: int = 0
    misses: int = 0
    fetch_s: float = 0.0
    compress_s: float = 0.0
    bypassed: bool = False


@dataclass(frozen=True)
class Decision:
    """What a policy decided for one question.

    Attributes:
        passages: One entry per passage, in their order.
        taken: What they take of the budget, by the names of its limits.
        told: What else the policy wants told, plain values.
    """

    passages: list[ReadPassage]
    taken: dict[str, float]
    told: dict[str, Any]


class PassageReading:
    """Has a policy decide, and gives the spans for it.

    Args:
        library: Knows every passage's segments and concepts.
        policy: Decides.
        budget: Within these limits.
        mode: What the fixed choice reads.
        missing: What to do about concepts at the fixed rate that are not stored; those at other rates are never made.
            With a time as budget, `recompress` is `auto`: nothing is compressed in line that text is sooner than.
        rate: Source tokens per concept of the fixed choice; None takes the library's own.

    Raises:
        ConfigurationError: The policy compares states, and concepts of the library are none, or it judges by what was
            learned, and nothing was.
    """

    def __init__(
        self,
        library: ConceptLibrary,
        policy: ReadPolicy,
        budget: ReadBudget,
        *,
        mode: Mode = "concepts",
        missing: MissingChoice = "recompress",
        rate: float | None = None,
    ) -> None:
        self.library, self.policy, self.budget, self.mode, self.rate = library, policy, budget, mode, rate
        if getattr(policy, "needs_states", False):
            refuse_without_states(library)
        if getattr(policy, "needs_learned", False):
            refuse_unlearned(library.interaction)
        timed = budget.ttft_s is not None and missing == "recompress"
        self.missing: MissingChoice = "auto" if timed else missing
        self._sentences = sentence_cutter(library.spec.segmenter)

    def read(
        self,
        query: str,
        passages: Sequence[Retrieved],
        prompt_tokens: int,
        queued: Collection[str] = (),
        budget: ReadBudget | None = None,
        window: int | None = None,
    ) -> Decision:
        """Decide what passages are read as.

        Args:
            query: What is asked.
            passages: Best first.
            prompt_tokens: The prompt's own, without any passage.
            queued: Ids of those whose concepts are in the making; they are read as text.
            budget: For this question; None takes the one given before.
            window: Positions of the LLM's window that passages may take; None where somebody else sees to that.

        Raises:
            ReadBudgetError: Nothing fits the budget.
            ConfigurationError: The policy chose what cannot be read, or more than the budget.
            MissingConceptsError: See `ConceptLibrary.fetch`.
        """
        return _OneQuestion(self, queued, budget or self.budget).read(query, passages, prompt_tokens, window)

    def candidate(self, rank: int, passage: Retrieved) -> Candidate:
        """A passage as policies see it."""
        n_tokens = len(self.library.passage(passage.text).ids)
        sentences = self._sentences(passage.text)
        further = self.library.rates_held(passage.text)[1:] if self.rate is None else ()
        own = self.library.rate if self.rate is None else self.rate
        return Candidate(
            passage.id,
            passage.text,
            passage.title,
            rank,
            passage.score,
            n_tokens,
            passage.around,
            sentences,
            (own, *further),
        )


class _OneQuestion:
    """What is looked up for one question: concepts are fetched once, whoever asks for them."""

    def __init__(self, reading: PassageReading, queued: Collection[str], budget: ReadBudget) -> None:
        self._budget = budget
        self._of, self._library, self._queued = reading, reading.library, queued
        self._own = reading.library.rate if reading.rate is None else reading.rate
        self._own_library = reading.library.at_rate(self._own)
        self._fetched: dict[tuple[str, float | None], Fetched] = {}
        self._seconds: dict[str, float] = {}  # of fetching, by the passage's text
        self._told = set[tuple[str, float | None]]()  # what was fetched and is in the account of a passage
        self._as_text: dict[str, str] = {}  # why concepts of a passage cannot be read, by its id
        self._bypassed: set[str] = set()
        self._in_line: dict[str, float] = {}  # seconds of compressing what is missing, by the passage's text

    def read(
        self, query: str, passages: Sequence[Retrieved], prompt_tokens: int, window: int | None = None
    ) -> Decision:
        candidates = [self._of.candidate(rank, passage) for rank, passage in enumerate(passages)]
        for candidate in candidates:
            self._look_up(candidate)
        in_line_s = sum(self._in_line.values())
        meter = self._budget.meter(self._library.spec, prompt_tokens, beside_s=in_line_s, window=window)
        states = StatesAtHand(self._library, self._stored, meter.spend_beside)
        predicted = self._library.shares
        spec = ReadSpec(
            self._library.spec,
            self._of.mode,
            self._own,
            meter,
            self._at_hand,
            self._n_concepts,
            states,
            predicted if isinstance(predicted, str) else partial(self._share, predicted),
            self._library.interaction,
        )
        policy = self._of.policy
        readings = checked_readings(policy, candidates, policy.choose(query, candidates, spec))
        out = [self._read(number, *pair) for number, pair in enumerate(zip(candidates, readings, strict=True))]
        read = [(candidate, made) for candidate, made in zip(candidates, out, strict=True) if not made.reading.left_out]
        spans = [span for _, made in read for span in made.spans]
        concepts = sum(len(span) for span in spans if isinstance(span, ConceptSpan))
        tokens = sum(map(len, spans)) - concepts + sum(candidate.around for candidate, _ in read)
        taken = meter.taken(tokens, concepts)
        if not meter.fits(tokens, concepts):
            raise ConfigurationError(
                f"read policy {policy.name} chose more than the budget",
                got=", ".join(f"{name} {took:.4g}" for name, took in taken.items()),
                expected=", ".join(f"at most {most:g}" for most in meter.budget.limits.values()),
                next_step="ask `spec.meter.fits` before choosing",
            )
        return Decision(out, taken, spec.told)

    def _look_up(self, candidate: Candidate) -> None:
        """Find out whether concepts at the fixed rate can be read."""
        missing = self._of.missing
        if self._of.mode == "text" or not candidate.n_tokens:
            self._as_text[candidate.id] = ""
        elif reason := self._own_library.passage(candidate.text).reason:
            self._as_text[candidate.id] = f"kept as text by the {reason}"
        elif candidate.id in self._queued:
            self._as_text[candidate.id] = "its concepts are in the making"
        elif missing == "text" and not all(self._own_library.at_hand(candidate.text)):
            self._as_text[candidate.id] = "its concepts are not stored"
        elif missing == "auto":
            found = crossover(self._own_library, candidate.text, self._budget.costs, self._budget.narrowing)
            if found is not None and found.reads_text:
                self._as_text[candidate.id] = found.why
                self._bypassed.add(candidate.id)
            elif found is not None and candidate.text not in self._in_line:
                self._in_line[candidate.text] = found.compress_s

    def _at_hand(self, candidate: Candidate, rate: float | None) -> bool:
        if rate is None or rate == self._own:
            return candidate.id not in self._as_text
        library = self._library.at_rate(rate)
        possible = self._of.mode == "concepts" and candidate.n_tokens > 0
        return possible and library.passage(candidate.text).reason is None and all(library.at_hand(candidate.text))

    def _n_concepts(self, candidate: Candidate, start: int, end: int, rate: float | None) -> int:
        rate = self._own if rate is None else rate
        passage = self._library.at_rate(rate).passage(candidate.text)
        n = sum(passage.n_concepts)
        if (start, end) == (0, candidate.n_tokens):
            return n
        if not self._library.spec.config.deep:
            first, last = _segments_of(passage, start, end, candidate.id)
            return sum(passage.n_concepts[first:last])
        if n == candidate.n_tokens:
            return end - start  # every token has one
        return int(_within(self._fetch(candidate, rate), start, end).sum())

    def _share(self, predicted: PredictedShares, candidate: Candidate, rate: float | None) -> float:
        """What concepts of a passage keep, unit by unit as they are stored."""
        passage = self._library.at_rate(self._own if rate is None else rate).passage(candidate.text)
        return predicted.of(passage.segments, passage.n_concepts) if passage.n_concepts else 0.0

    def _stored(self, candidate: Candidate) -> PassageStates | str:
        """States of a passage as far as they are stored, or were made for a question of before."""
        if candidate.id in self._queued:
            return "its concepts are in the making"
        reason = self._own_library.passage(candidate.text).reason
        if reason is not None:
            return f"kept as text by the {reason}"
        for rate in candidate.rates:
            if candidate.n_tokens and all(self._library.at_rate(rate).at_hand(candidate.text)):
                fetched = self._fetch(candidate, self._own if rate is None else rate)
                if fetched.concepts is not None and fetched.places is not None:
                    return PassageStates(fetched.concepts, fetched.places)
        return "its concepts are not stored" if candidate.n_tokens else "it has no text"

    def _fetch(self, candidate: Candidate, rate: float | None) -> Fetched:
        known = candidate.text, rate
        if known not in self._fetched:
            makes = rate == self._own and self._of.missing in ("recompress", "auto")
            missing: MissingPolicy = "recompress" if makes else "error"
            begun = time.perf_counter()
            made = self._fetched[known] = self._library.at_rate(rate).fetch(candidate.text, missing=missing)
            took = time.perf_counter() - begun - made.compress_s
            self._seconds[candidate.text] = self._seconds.get(candidate.text, 0.0) + took
        return self._fetched[known]

    def _read(self, number: int, candidate: Candidate, reading: Reading) -> ReadPassage:
        said = self._as_text.get(candidate.id, "")
        if said and not reading.why and not reading.left_out:
            reading = Reading(reading.parts, said)
        spans = [span for run in _runs(reading.parts) for span in self._spans(number, candidate, run)]
        met = [known for known in self._fetched if known[0] == candidate.text]
        # What passages of one text share was fetched once, and is the first one's.
        used = [self._fetched[known] for known in met if known not in self._told]
        self._told.update(met)
        hits, misses = sum(made.hits for made in used), sum(made.misses for made in used)
        if said and not met:
            there = self._own_library.at_hand(candidate.text)
            hits, misses = sum(there), len(there) - sum(there)
        fetch_s = self._seconds.pop(candidate.text, 0.0)
        compress_s, bypassed = sum(made.compress_s for made in used), candidate.id in self._bypassed
        return ReadPassage(reading, spans, hits, misses, fetch_s, compress_s, bypassed and bool(spans))

    def _spans(self, number: int, candidate: Candidate, run: Sequence[Part]) -> list[Span]:
        """Spans of a run of parts: text, or concepts with what is left out among and beside them."""
        if run[0].used == "text":
            ids = self._library.passage(candidate.text).ids[run[0].start : run[-1].end]
            return [TextSpan(ids, number)]
        start, end = run[0].start, run[-1].end
        rows, places = [], []
        for part in run:
            if part.used == "left out":
                continue
            rate = self._own if part.rate is None else part.rate
            fetched = self._fetch(candidate, rate)
            if fetched.concepts is None:  # what a guard left as text; other concepts `missing` brings
                raise ConfigurationError(
                    "a read policy chose concepts that are not there",
                    got=f"passage {candidate.id}, which is kept as text",
                    expected="text, or nothing of it",
                    next_step="ask `at_hand` of the passage before",
                )
            if fetched.places is None:
                rows.append(fetched.concepts[self._rows_of(candidate, part, rate)])
                continue
            within = _within(fetched, part.start, part.end)  # (n_concepts,)
            rows.append(fetched.concepts[within])
            places.append(fetched.places[within] - start)
        if not rows or not sum(map(len, rows)):
            return []
        if not places:
            return [ConceptSpan(torch.cat(rows), number)]
        within, tokens = torch.cat(places), self._library.passage(candidate.text).ids[start:end]
        ids = tuple(tokens[place] for place in within.tolist())
        return [ConceptSpan(torch.cat(rows), number, within, end - start, ids)]

    def _rows_of(self, candidate: Candidate, part: Part, rate: float | None) -> slice:
        """Rows of the concepts of whole segments."""
        passage = self._library.at_rate(rate).passage(candidate.text)
        first, last = _segments_of(passage, part.start, part.end, candidate.id)
        return slice(sum(passage.n_concepts[:first]), sum(passage.n_concepts[:last]))


def _runs(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts in groups that one span stands for.

    What is left out among deep concepts stays a gap between them, as it is between the tokens that a higher rate keeps.
    """
    runs: list[list[Part]] = []
    for part in parts:
        if runs and (runs[-1][0].used == "text") == (part.used == "text"):
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _within(fetched: Fetched, start: int, end: int) -> torch.Tensor:
    """Which deep concepts (n_concepts,) stand for tokens from `start` to `end`."""
    places = torch.empty(0, dtype=torch.long) if fetched.places is None else fetched.places
    return (places >= start) & (places < end)


def _segments_of(passage: Passage, start: int, end: int, name: str) -> tuple[int, int]:
    """First segment of a run of tokens, and the one behind its last.

    Raises:
        ConfigurationError: It begins or ends within a segment, whose concepts cannot be told apart.
    """
    bounds = [0, *accumulate(map(len, passage.segments))]
    if start not in bounds or end not in bounds:
        raise ConfigurationError(
            "a read policy cut through a segment",
            got=f"tokens {start} to {end} of {name}",
            expected="runs of whole sentences: concepts of a segment belong together",
            next_step="take the bounds of `Candidate.sentences`",
        )
    return bounds.index(start), bounds.index(end)
