"""Passages and their concepts: a compressor and a store that work as one.

The library turns a passage's text into segments and record keys, compresses what the store does not hold, and reads
the concepts of a passage back. Passages are known by their text alone, so a node that was split again, renamed or
copied still finds its concepts.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import torch

from compllm_rag.compression.late_interaction import LateInteraction, interaction_of
from compllm_rag.compression.rate_policies.choosing import Choice, RateChooser
from compllm_rag.compression.rate_policies.losses import LossPredictor
from compllm_rag.compression.rate_policies.measures import TextMeasures
from compllm_rag.compression.rate_policies.shares import PredictedShares, shares_of
from compllm_rag.compression.rates import FixedRate, RatePolicy, is_number
from compllm_rag.compression.several_rates import compressed_once
from compllm_rag.compression.spec import ConceptCompressor, DeferredCompressor
from compllm_rag.concept_checks import check_scale, sample
from compllm_rag.config import MissingPolicy
from compllm_rag.errors import (
    ConfigurationError,
    FingerprintMismatchError,
    MissingConceptsError,
)
from compllm_rag.handles import ProcessBound
from compllm_rag.metrics import Metrics
from compllm_rag.passage_cuts import PassageCuts
from compllm_rag.passages import EnsureReport, Fetched, KeptChoices, Passage, Took, unpacked
from compllm_rag.store.base import ConceptStore
from compllm_rag.store.memo import ConceptMemo

__all__ = ["ConceptLibrary", "EnsureReport", "Fetched", "KeptChoices", "Passage", "Took", "sample", "unpacked"]

_RATES = 16  # at which passages are remembered beside those that are held
# Concepts made between two writes: bounds memory, and what an interruption can lose.
_WRITE_EVERY = 20_480


class ConceptLibrary(ProcessBound):
    """Compressor, store, rate and namespace in one hand.

    Args:
        compressor: Makes concepts; a deferred one is loaded on the first miss.
        store: Keeps them.
        rate: Source tokens per concept, a policy of your own, or a chooser that has all to say.
        namespace: Tenant; part of every key.
        metrics: Counts what is done; None makes one.
        also_rates: Further rates at which every passage is kept side by side; who asks for none gets `rate`.
        kept: Knows what was chosen for passages before, so that they are found again; None always chooses anew.

    Raises:
        FingerprintMismatchError: The store keeps concepts of another width.
        RateOutOfReachError: See `FixedRate`.
        ConfigurationError: A rate is named twice, or `also_rates` stand beside a chooser.
    """

    _opened_by = "make one there, over a compressor and a store of that process"

    def __init__(
        self,
        compressor: ConceptCompressor | DeferredCompressor,
        store: ConceptStore,
        *,
        rate: float | RatePolicy | RateChooser = 2.0,
        namespace: str = "default",
        metrics: Metrics | None = None,
        also_rates: Sequence[float] = (),
        kept: KeptChoices | None = None,
    ) -> None:
        self.spec, self.llm, self.halves = compressor.spec, compressor.llm, compressor.halves
        if store.hidden_size != self.spec.width:
            raise FingerprintMismatchError(
                "store keeps concepts of another LLM",
                got=f"width {store.hidden_size}",
                expected=f"width {self.spec.width}",
                next_step="use the LLM it was made for, or another storage",
            )
        self._compressor, self.store, self.namespace = compressor, store, namespace
        self.metrics = metrics or Metrics()
        self.metrics.traffic = store.traffic
        longest = self.spec.config.longest_unit
        policy = FixedRate(rate, longest) if isinstance(rate, int | float) else rate
        further = [FixedRate(other, longest) for other in also_rates]
        if further and isinstance(policy, RateChooser):
            raise ConfigurationError(
                "a chooser has its further rates itself", got=f"also_rates {also_rates}", next_step="give it these"
            )
        self.chooser = policy if isinstance(policy, RateChooser) else RateChooser(policy, further)
        self.cuts = PassageCuts(self.spec, self.chooser, kept, namespace)
        self.took = Took()
        self._lock, self._memo = threading.Lock(), ConceptMemo()
        self._at: OrderedDict[float, ConceptLibrary] = OrderedDict()  # the same passages at other rates
        self._shares: tuple[LossPredictor | None, PredictedShares | str] | None = None

    @property
    def policy(self) -> RatePolicy:
        """Decides K of what is read unless another rate is asked for."""
        return self.chooser.policy

    @property
    def shares(self) -> PredictedShares | str:
        """What concepts are predicted to keep of what text gives, or why nothing is predicted; no weights are loaded.

        Raises:
            UnsupportedFormatError: See `LossPredictor.load`.
        """
        predictor = self._compressor.losses
        with self._lock:
            if self._shares is None or self._shares[0] is not predictor:
                measures = TextMeasures(lambda: self.compressor, self.llm)
                self._shares = predictor, shares_of(predictor, self.spec.fingerprint, measures)
            return self._shares[1]

    @property
    def interaction(self) -> LateInteraction | str:
        """Which sentence answers a question, as learned for these concepts, or why nothing was; no weights are loaded.

        Raises:
            UnsupportedFormatError: See `LateInteraction.load`.
        """
        return interaction_of(self._compressor.interaction, self.spec.fingerprint, self.spec.hidden_size)

    @property
    def compressor(self) -> ConceptCompressor:
        """Makes concepts; loaded now if it was not needed before.

        Raises:
            FingerprintMismatchError, UnsupportedFormatError: See `DeferredCompressor.get`.
        """
        return self._compressor.get() if isinstance(self._compressor, DeferredCompressor) else self._compressor

    def passage(self, text: str, *, rate: float | None = None) -> Passage:
        """Cut a passage up; see `PassageCuts.passage`."""
        return self.cuts.passage(text, rate=rate)

    def rates_held(self, text: str) -> tuple[float, ...]:
        """The rates at which a passage can be fetched; see `PassageCuts.rates_held`."""
        return self.cuts.rates_held(text)

    def passage_as(self, text: str, choice: Choice) -> Passage:
        """What a passage would be had this been chosen for it; of all rates the default of queries."""
        return self.cuts.passage_as(text, choice)

    @property
    def rate(self) -> float | None:
        """Source tokens per concept of what is read unless another rate is asked for; None where a policy decides."""
        return self.policy.rate if isinstance(self.policy, FixedRate) else None

    def at_rate(self, rate: float | None) -> ConceptLibrary:
        """The same passages at another rate, held or not: over the same store, so that what is kept there is found.

        What is missing there is made as `fetch` is told, and stays in memory; nothing at this rate is held for it.
        What the guard left as text stays text.

        Args:
            rate: Source tokens per concept; None, or the library's own, gives the library itself.

        Raises:
            ConfigurationError, RateOutOfReachError: It is no number; see `FixedRate`.
        """
        if rate is None:
            return self
        if not is_number(rate):
            raise ConfigurationError(
                "passages are read at a rate that is a number",
                got=repr(rate),
                expected="source tokens per concept",
                next_step="leave it out to read each passage as it was ingested",
            )
        rate = float(rate)
        if rate == self.rate:
            return self
        with self._lock:
            if rate not in self._at:
                parts = self._compressor, self.store
                made = ConceptLibrary(*parts, rate=rate, namespace=self.namespace, metrics=self.metrics)
                if self.chooser.guard is not None:
                    made.cuts = PassageCuts(self.spec, made.chooser, None, self.namespace, self.cuts)
                made._memo = self._memo
                self._at[rate] = made
                while len(self._at) > _RATES:  # whoever asks for ever new rates finds no more memory taken
                    self._at.popitem(last=False)
            self._at.move_to_end(rate)
            return self._at[rate]

    def at_hand(self, text: str) -> list[bool]:
        """For each segment of a passage, whether its concepts are stored, or were made for a question of before."""
        keys = self.passage(text).keys
        stored = self.store.contains(keys)
        made = self._memo.find([key for key, there in zip(keys, stored, strict=True) if not there])
        return [there or key in made for key, there in zip(keys, stored, strict=True)]

    def forget_choices(self) -> None:
        """Look up again what is chosen for each passage, after it was changed where it is kept."""
        self.cuts.forget()
        with self._lock:
            others = list(self._at.values())
        for other in others:
            other.cuts.forget()

    def ensure(self, texts: Iterable[str]) -> EnsureReport:
        """Have concepts of every passage: compress what is missing, write it in ingest order.

        Memory stays bounded however many texts there are. What is written survives once `store.flush()` returns.
        """
        begun = time.perf_counter()
        total = compressed = tokens = concepts = 0
        for group in _groups(map(self.cuts.held, texts)):
            read = [held[0] for held in group]
            segments, made = sum(len(p.keys) for p in read), self._ensure_group(group)
            total, compressed = total + segments, compressed + made
            tokens += sum(len(p.ids) for p in read)
            concepts += sum(sum(p.n_concepts) for p in read)
            self.metrics.ensured(segments, made, (p.achieved_rate for p in read if p.keys))
        return EnsureReport(total, compressed, total - compressed, tokens, concepts, time.perf_counter() - begun)

    def _ensure_group(self, passages: Sequence[tuple[Passage, ...]]) -> int:
        """Compress what is missing of passages, each at all rates held; tells how many units that took."""
        wanted: dict[str, tuple[tuple[int, ...], int]] = {}
        for held in passages:
            for p in held:
                if p.reason is not None:
                    continue
                for key, segment, k in zip(p.keys, p.segments, p.n_concepts, strict=True):
                    wanted.setdefault(key, (segment, k))
        keys = list(wanted)
        missing = [key for key, there in zip(keys, self.store.contains(keys), strict=True) if not there]
        items = [wanted[key] for key in missing]
        if missing:
            begun = time.perf_counter()
            made = self._compress([s for s, _ in items], [k for _, k in items])
            self._note_time(passages, {segment for segment, _ in items}, time.perf_counter() - begun)
            check_scale(torch.cat(made), self.spec)
            self.store.put(zip(missing, made, strict=True))
            sample(self.compressor, self.store, missing, [s for s, _ in items], made, self.metrics)
        return len({segment for segment, _ in items})

    def _note_time(self, passages: Sequence[tuple[Passage, ...]], made: set[tuple[int, ...]], seconds: float) -> None:
        """Note what each passage took to compress: its share, by tokens, of the batch it was in."""
        each = seconds / sum(map(len, made))
        for read, *_ in passages:
            tokens = sum(len(segment) for segment in read.segments if segment in made)
            if tokens and read.keys:
                self.took.note(read.digest, each * tokens)

    def _compress(self, segments: Sequence[tuple[int, ...]], n_concepts: Sequence[int]) -> list[torch.Tensor]:
        begun = time.perf_counter()
        made = compressed_once(self.compressor, segments, n_concepts)
        self.metrics.compressed(len(segments), time.perf_counter() - begun, sum(map(len, segments)))
        return made

    def fetch(self, text: str, *, missing: MissingPolicy = "recompress", rate: float | None = None) -> Fetched:
        """Concepts of one passage.

        Args:
            text: The passage, as it was ingested.
            missing: What to do about segments that are not stored: compress them now (they stay in memory for the next
                question, and are not written: `ensure` is for that), read the passage as text, or raise.
            rate: One of `rates_held(text)`; None takes the first of them.

        Raises:
            RateNotHeldError: The passage is not kept at this rate.
            MissingConceptsError: Concepts are missing and `missing` is "error".
            CorruptRecordError: Stored concepts fail their checksum, or stand where their text has no token.
            InvalidConceptsError: Concepts, stored or made now, are far outside the scale of the LLM's embeddings.
        """
        passage = self.passage(text, rate=rate)
        if passage.reason is not None:
            return Fetched(None, 0, 0, 0.0, n_tokens=len(passage.ids), reason=passage.reason)
        if not passage.keys:
            places = torch.empty(0, dtype=torch.long) if self.spec.config.deep else None
            return Fetched(torch.empty(0, self.spec.hidden_size), 0, 0, 0.0, places)
        joined = self.store.get_joined(passage.keys)
        if joined is not None:
            self.metrics.fetched(len(passage.keys), 0)
            return self._fetched(passage, joined, len(passage.keys), 0, 0.0)
        found = self._at_hand(passage)
        misses = sum(concepts is None for concepts in found)
        self.metrics.fetched(len(found) - misses, misses)
        if not misses:
            return self._fetched(passage, torch.cat([c for c in found if c is not None]), len(found), 0, 0.0)
        if missing == "text":
            return Fetched(None, len(found) - misses, misses, 0.0)
        if missing == "error":
            raise MissingConceptsError(
                "concepts are not in the store",
                got=f"{misses} of {len(found)} segments missing in {text[:60]!r}",
                expected="a passage ingested by this compressor at this rate",
                next_step="ingest it, or allow `recompress` or `text`",
            )
        if missing != "recompress":
            raise ConfigurationError(
                "unknown policy for missing concepts", got=missing, expected="recompress, text or error"
            )
        begun = time.perf_counter()
        made = self._complete(passage, found)
        return self._fetched(passage, made, len(found) - misses, misses, time.perf_counter() - begun)

    def _fetched(self, passage: Passage, rows: torch.Tensor, hits: int, misses: int, compress_s: float) -> Fetched:
        """Check records (n_concepts, width) of a passage and take them apart."""
        check_scale(rows, self.spec)
        if not self.spec.config.deep:
            return Fetched(rows, hits, misses, compress_s)
        states, places = unpacked(rows, passage.segments, passage.n_concepts)
        ids = tuple(passage.ids[place] for place in places.tolist())
        return Fetched(states, hits, misses, compress_s, places, len(passage.ids), ids=ids)

    def _at_hand(self, passage: Passage) -> list[torch.Tensor | None]:
        """Concepts of each segment: from the store, or made for a question of before; else None."""
        found = self.store.get(passage.keys)
        known = self._memo.find([key for key, concepts in zip(passage.keys, found, strict=True) if concepts is None])
        return [known.get(k) if concepts is None else concepts for k, concepts in zip(passage.keys, found, strict=True)]

    def _complete(self, passage: Passage, found: list[torch.Tensor | None]) -> torch.Tensor:
        """Make what is missing, for this answer and in memory for the next.

        Never into the store: what a postprocessor, a citation or a sub-question wrote is no chunk, nothing would ever
        refer to it or delete it, and a question must not wait for whoever writes.
        """
        absent = {passage.keys[i]: i for i, concepts in enumerate(found) if concepts is None}
        made = dict(
            zip(
                absent,
                self._compress(
                    [passage.segments[i] for i in absent.values()], [passage.n_concepts[i] for i in absent.values()]
                ),
                strict=True,
            )
        )
        check_scale(torch.cat(list(made.values())), self.spec)
        # Through the storage's precision, so that the answer is what it would be had the concepts been stored.
        rounded = {key: self.store.encoding.rounded(concepts) for key, concepts in made.items()}
        self._memo.keep(rounded.items())
        parts = [
            rounded[key] if concepts is None else concepts for key, concepts in zip(passage.keys, found, strict=True)
        ]
        return torch.cat(parts)


def _groups(passages: Iterable[tuple[Passage, ...]]) -> Iterator[list[tuple[Passage, ...]]]:
    group: list[tuple[Passage, ...]] = []
    size = 0
    for held in passages:
        group.append(held)
        size += sum(sum(passage.n_concepts) for passage in held)
        if size >= _WRITE_EVERY:
            yield group
            group, size = [], 0
    if group:
        yield group
