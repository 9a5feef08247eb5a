"""The read policy that spends a budget where the question needs it, sentence by sentence.

Concepts of a passage's sentences can be read apart, since each stands for tokens of its own; they were made from the
whole passage all the same. So a budget buys sentences at the price of concepts, where choosing sentences as text
(BM25) buys fewer, and a higher rate of everything thins out those that matter as well.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from compllm_rag.errors import ConfigurationError
from compllm_rag.reading.budget import extent_of
from compllm_rag.reading.choice import Candidate, Part, Reading, ReadSpec, Used
from compllm_rag.reading.kept import DEEP, INPUT, checked_table, kept_at
from compllm_rag.reading.relevance import Weights, relevance
from compllm_rag.reading.signals import Signal, signal_named

_OTHERS = "; others are worth more"
_FAR = "all of it is too far behind the likeliest sentence"
_WORTH_LESS = "sentences of other passages were worth more within the budget"


@dataclass(frozen=True)
class _Option:
    """One way to read a sentence: positions as text and as concepts, and the share of what text gives."""

    used: Used
    rate: float | None
    tokens: int
    concepts: int
    kept: float
    share: float | None = None  # of concepts, as it is told


# What concepts count that are predicted to keep nothing: a prediction may be wrong, and they come last, not never.
_LEAST_KEPT = 1e-3
_NOTHING = _Option("left out", None, 0, 0, 0.0)


def weights_for(signal: str | Signal | None, least: float = 0.0) -> Weights:
    """Weights that go with a signal: `learned` gives probabilities, which nothing is added to.

    Args:
        signal: Or its name; None is `bm25`.
        least: See `Weights`.
    """
    learned = signal is not None and signal_named(signal).name == "learned"
    return Weights(base=0.0, beside=0.0, passage=0.0, rank=0.0, least=least) if learned else Weights(least=least)


@dataclass(frozen=True)
class BudgetedReadPolicy:
    """Reads what a budget allows, the likeliest to matter first.

    Every sentence of the retrieved passages has a value: how likely it matters (it, its neighbours and its passage
    beside the question by a signal, BM25 unless another is named, and its passage's rank) times the share of it that is
    kept: 1 as text; as concepts by what is predicted of their passage, where losses are fitted to the compressor
    (`compllm-rag train rates`), else by a table of rates. The budget is spent step by step on whatever adds most value
    for what it takes: a sentence more, or one at a lower rate, or as text. What is not reached is left out.

    Args:
        rates: Rates of concepts to choose from; None takes those at which the storage keeps the passage. Others are
            read where they are stored, and never made.
        text: Whether sentences may be read as text.
        kept: The share of what text gives that concepts keep, by rate; None takes what is predicted for each passage,
            or where nothing is, what was measured with the shipped compressors (`compllm_rag.reading.kept`).
        weights: What makes a sentence likely to matter; None takes those of the signal (`weights_for`).
        relevance: The signal: `bm25`, `maxsim` (late interaction of the question's states with the stored concepts, for
            one pass of the LLM's lower half over the question), `bm25+maxsim` (both, by their ranks), `learned` (late
            interaction as it was learned for the compressor, for the same pass), or one of your own
            (`compllm_rag.reading.signals.Signal`).

    Raises:
        ConfigurationError: A rate, the table or the signal makes no sense.
    """

    rates: Sequence[float] | None = None
    text: bool = True
    kept: Mapping[float, float] | None = None
    weights: Weights | None = None
    relevance: str | Signal = "bm25"
    name: str = field(default="budgeted", init=False)

    def __post_init__(self) -> None:
        if self.rates is not None and not all(rate >= 1 for rate in self.rates):
            raise ConfigurationError("rates make no sense", got=list(self.rates), expected="numbers of at least 1")
        if self.kept is not None:
            checked_table(self.kept)
        signal = signal_named(self.relevance)
        if self.weights is None:
            object.__setattr__(self, "weights", weights_for(signal))

    @property
    def needs_states(self) -> bool:
        """Whether it compares states in front of an entry layer, which only deep concepts have."""
        return signal_named(self.relevance).needs_states

    @property
    def needs_learned(self) -> bool:
        """Whether it judges by what was learned for the compressor."""
        return bool(getattr(signal_named(self.relevance), "needs_learned", False))

    def choose(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Reading]:
        """See `ReadPolicy.choose`.

        Raises:
            ReadBudgetError: Not even the smallest sentence fits.
            ConfigurationError: There is no budget, or nothing that may be read keeps anything.
        """
        if not spec.meter.budget.limits:
            raise ConfigurationError(
                "this read policy has nothing to spend",
                got="no budget",
                expected="position_budget, prefill_budget or ttft_budget_s",
                next_step="set one of them, or leave the read policy out",
            )
        signal = signal_named(self.relevance)
        spec.told["relevance"] = {"signal": signal.name}
        scores = relevance(nodes, signal.judge(query, nodes, spec), self.weights or weights_for(signal))
        spec.told["kept"] = {"by": "table" if self._by_table(spec) else "predicted losses", "why": self._why(spec)}
        options = [self._options(node, spec) for node in nodes]
        spent = _Spending(nodes, options, [[score.value for score in row] for row in scores], spec)
        chosen = spent.chosen()
        if any(node.n_tokens for node in nodes) and not any(option.kept for row in chosen for option in row):
            least = spent.least()
            raise self._nothing_worth() if least is None else spec.meter.too_small(*least)
        out = []
        for node, row, why in zip(nodes, chosen, scores, strict=True):
            triples = zip(node.sentences, row, why, strict=True)
            parts = tuple(
                Part(s.start, s.end, o.used, o.rate, w.why if o.kept or not w.value else f"{w.why}{_OTHERS}", o.share)
                for s, o, w in triples
            )
            reading = Reading(parts, "" if parts else "it has no text")
            if parts and reading.left_out:
                far = not any(w.value for w in why)
                reading = Reading(parts, _FAR if far else _WORTH_LESS)
            out.append(reading)
        return out

    def _options(self, node: Candidate, spec: ReadSpec) -> list[list[_Option]]:
        """Ways to read each sentence, those that nothing speaks for left out, the cheapest first."""
        rates = [rate for rate in (node.rates if self.rates is None else self.rates) if spec.at_hand(node, rate)]
        shares = {rate: self._share(node, rate, spec) for rate in rates}
        out = []
        for sentence in node.sentences:
            found = []
            for rate in rates:
                k = spec.n_concepts(node, sentence.start, sentence.end, rate)
                if k:
                    share, least = shares[rate], 0.0 if self._by_table(spec) else _LEAST_KEPT
                    found.append(_Option("concepts", rate, 0, k, max(share, least), share))
            if self.text or not rates:  # a passage whose concepts are missing is read as text or not at all
                found.append(_Option("text", None, len(sentence), 0, 1.0))
            out.append(found)
        return out

    def _by_table(self, spec: ReadSpec) -> bool:
        return self.kept is not None or isinstance(spec.shares, str)

    def _why(self, spec: ReadSpec) -> str:
        """Why shares come from where they come from."""
        if self.kept is not None:
            return "it was given"
        return spec.shares if isinstance(spec.shares, str) else "they are fitted to this compressor"

    def _share(self, node: Candidate, rate: float | None, spec: ReadSpec) -> float:
        """What concepts of a passage keep of what its text gives."""
        if self.kept is None and not isinstance(spec.shares, str):
            return spec.shares(node, rate)
        table = checked_table(self.kept or (DEEP if spec.concepts.config.deep else INPUT))
        return kept_at(self._achieved(node, rate, spec), table)

    def _nothing_worth(self) -> ConfigurationError:
        return ConfigurationError(
            "no passage can be read in a way that keeps anything of it",
            got="text=False" + ("" if self.kept is None else f" and kept={dict(self.kept)}"),
            expected="passages with concepts that keep more than nothing",
            next_step="allow text, or correct the table",
        )

    @staticmethod
    def _achieved(node: Candidate, rate: float | None, spec: ReadSpec) -> float:
        return max(1.0, node.n_tokens / max(1, spec.n_concepts(node, 0, node.n_tokens, rate)))


class _Spending:
    """Spends a budget step by step on what adds most value for what it takes.

    A step takes a sentence from how it is read so far to a better way. Whatever does not fit any more is passed over,
    so that smaller steps behind it use up what is left.
    """

    def __init__(
        self,
        nodes: Sequence[Candidate],
        options: Sequence[Sequence[Sequence[_Option]]],
        values: Sequence[Sequence[float]],
        spec: ReadSpec,
    ) -> None:
        self._nodes, self._options, self._values, self._meter = nodes, options, values, spec.meter
        self._now = [[_NOTHING for _ in row] for row in options]
        self._begun = [False for _ in nodes]
        self._tokens = self._concepts = 0
        self._extents = [0 for _ in nodes]
        # Per position, as a share of the budget: steps are compared by it, and measured exactly before they are taken.
        size = max(1, sum(node.n_tokens for node in nodes))
        self._weight = (spec.meter.share(size, 0) / size, spec.meter.share(0, size) / size)

    def chosen(self) -> list[list[_Option]]:
        """How each sentence is read in the end."""
        waiting: list[tuple[float, int, int, int]] = []
        for n in range(len(self._nodes)):
            for s in range(len(self._options[n])):
                self._push(waiting, n, s)
        while waiting:
            worth, n, s, o = heapq.heappop(waiting)
            option = self._options[n][s][o]
            if option.kept <= self._now[n][s].kept:
                continue
            now = self._worth(n, s, option)
            if -worth > now + 1e-12:  # its sentence is read by now, or it counted less to begin its passage
                heapq.heappush(waiting, (-now, n, s, o))
                continue
            tokens, concepts = self._after(n, s, option)
            extent = self._extent_after(n, s, option)
            if not self._meter.fits(tokens, concepts, sum(self._extents) - self._extents[n] + extent):
                continue
            self._now[n][s], self._tokens, self._concepts = option, tokens, concepts
            self._extents[n] = extent
            self._push(waiting, n, s)
            if not self._begun[n]:
                self._begun[n] = True
                for other in range(len(self._options[n])):
                    self._push(waiting, n, other)
        return self._now

    def least(self) -> tuple[int, int, int] | None:
        """The least that could be read: positions as text, as concepts, and of the window; None for nothing.

        What a budget would do for comes first; where that is more than one, what takes least of the window.
        """
        each = [
            (self._nodes[n].around + option.tokens, option.concepts, self._extent_after(n, s, option))
            for n, row in enumerate(self._options)
            for s, options in enumerate(row)
            for option in options
            if option.kept and self._values[n][s]
        ]
        within = [taken for taken in each if self._meter.fits(*taken[:2])]
        if within:
            return min(within, key=lambda taken: (taken[2], taken))
        return min(each, key=lambda taken: (self._meter.share(*taken[:2]), taken), default=None)

    def _push(self, waiting: list[tuple[float, int, int, int]], n: int, s: int) -> None:
        if not self._values[n][s]:  # too far behind others, see `Weights.least`
            return
        for o, option in enumerate(self._options[n][s]):
            if option.kept > self._now[n][s].kept:
                heapq.heappush(waiting, (-self._worth(n, s, option), n, s, o))

    def _worth(self, n: int, s: int, option: _Option) -> float:
        """Value that a step adds, for each share of the budget that it takes."""
        tokens, concepts = self._after(n, s, option)
        text, concept = self._weight
        takes = (tokens - self._tokens) * text + (concepts - self._concepts) * concept
        return self._values[n][s] * (option.kept - self._now[n][s].kept) / max(takes, 1e-9)

    def _extent_after(self, n: int, s: int, option: _Option) -> int:
        """Positions of the window that a passage takes once one of its sentences is read so."""
        if self._meter.window is None:
            return 0
        row = [*self._now[n][:s], option, *self._now[n][s + 1 :]]
        parts = [(o.used, len(x), o.concepts) for o, x in zip(row, self._nodes[n].sentences, strict=True)]
        return self._nodes[n].around + extent_of(parts, deep=self._meter.deep)

    def _after(self, n: int, s: int, option: _Option) -> tuple[int, int]:
        now = self._now[n][s]
        around = 0 if self._begun[n] else self._nodes[n].around
        return self._tokens + option.tokens - now.tokens + around, self._concepts + option.concepts - now.concepts
