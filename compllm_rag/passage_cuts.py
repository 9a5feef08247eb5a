"""How a passage is cut: its units, at which rates it is kept, and under which keys.

Passages are known by their text alone, so a node that was split again, renamed or copied still finds its concepts.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from dataclasses import replace

from compllm_rag.compression.rate_policies.choosing import Choice, RateChooser
from compllm_rag.compression.spec import ConceptSpec
from compllm_rag.errors import RateNotHeldError
from compllm_rag.fingerprint import record_key
from compllm_rag.passages import KeptChoices, Passage
from compllm_rag.unicode_text import whole

_REMEMBERED = 4096


class PassageCuts:
    """Cuts passages up, and remembers the last few thousand.

    Args:
        spec: Of the concepts.
        chooser: Decides K, or that a passage stays text.
        kept: Knows what was chosen for passages before; None always chooses anew.
        namespace: Tenant; part of every key.
        guarded_by: Decides which passages stay text, whatever rate is chosen here; None leaves that to `chooser`.
    """

    def __init__(
        self,
        spec: ConceptSpec,
        chooser: RateChooser,
        kept: KeptChoices | None,
        namespace: str,
        guarded_by: PassageCuts | None = None,
    ) -> None:
        self._spec, self._chooser, self._kept, self._namespace = spec, chooser, kept, namespace
        self._guarded_by = guarded_by
        self._known: OrderedDict[str, tuple[Passage, ...]] = OrderedDict()  # at each rate held, the default first
        self._lock = threading.Lock()

    def passage(self, text: str, *, rate: float | None = None) -> Passage:
        """Cut a passage up; the last few thousand are remembered. Half characters count as U+FFFD.

        Args:
            text: The passage.
            rate: One of `rates_held(text)`; None takes the first of them.

        Raises:
            RateNotHeldError: The passage is not kept at this rate.
        """
        held = self.held(text)
        if rate is None:
            return held[0]
        for passage in held:
            if passage.reason is None and math.isclose(passage.rate, rate, rel_tol=1e-9):
                return passage
        reason = held[0].reason
        raise RateNotHeldError(
            "the passage is not kept at this rate",
            got=f"{rate:g}",
            expected=" or ".join(f"{p.rate:g}" for p in held) if reason is None else f"text, as the {reason} decided",
            next_step="ask for a rate of `rates_held`, or ingest at this one as well",
        )

    def rates_held(self, text: str) -> tuple[float, ...]:
        """The rates at which a passage can be fetched, the default of queries first; none where it stays text.

        They are the rates that were asked for at ingestion (1 and 2, say), by which `passage` and `fetch` find the
        passage; where a policy decides, the first is what it achieved for this passage. What a rate costs is told by
        `passage(text, rate=...).n_concepts`. All of them are kept for every passage of a storage; a text that was
        never ingested can be compressed at each of them.
        """
        return tuple(passage.rate for passage in self.held(text) if passage.reason is None)

    def held(self, text: str) -> tuple[Passage, ...]:
        """The passage at each rate at which it is kept, the default first."""
        text = whole(text)
        with self._lock:
            if text in self._known:
                self._known.move_to_end(text)
                return self._known[text]
        guarded = () if self._guarded_by is None else self._guarded_by.held(text)
        made = guarded if guarded and guarded[0].reason is not None else self._cut(text)
        with self._lock:
            self._known[text] = made
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return made

    def passage_as(self, text: str, choice: Choice) -> Passage:
        """What a passage would be had this been chosen for it; of all rates the default of queries."""
        return self._cut(whole(text), choice)[0]

    def _cut(self, text: str, choice: Choice | None = None) -> tuple[Passage, ...]:
        segments = tuple(tuple(segment) for segment in self._spec.units(text))
        ids = tuple(token for segment in segments for token in segment)
        digest, fingerprint = hashlib.sha256(text.encode()).hexdigest(), self._spec.fingerprint
        if choice is None:
            choice = None if self._kept is None or self._chooser.plain else self._kept.of(digest)
        if choice is None or not choice.fits(segments):
            choice = self._chooser.choose(segments)
        if choice.reason is not None:
            return (Passage(ids, segments, (), (), 1.0, (), choice, digest),)
        made = list[Passage]()
        for rate, ks in zip(choice.rates, choice.n_concepts, strict=True):
            keys = tuple(record_key(self._namespace, fingerprint, k, s) for k, s in zip(ks, segments, strict=True))
            made.append(Passage(ids, segments, ks, keys, rate, (), choice, digest))
        others = tuple(key for passage in made[1:] for key in passage.keys)
        return (replace(made[0], others=others), *made[1:])

    def forget(self) -> None:
        """Look up again what is chosen for each passage."""
        with self._lock:
            self._known.clear()
