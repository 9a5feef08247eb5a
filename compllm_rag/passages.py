"""Passages cut up, and their concepts: what a `ConceptLibrary` takes and gives."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from compllm_rag.compression.rate_policies.choosing import Choice
from compllm_rag.errors import CorruptRecordError, MissingConceptsError
from compllm_rag.prompt import ConceptSpan

_REMEMBERED = 4096


@dataclass(frozen=True)
class Passage:
    """A passage cut up: token ids, and for each segment its K and its key in the store.

    Attributes:
        ids: Of its text.
        segments: Of each unit of compression; joined they are `ids`.
        n_concepts: K of each unit.
        keys: Key of each unit's record.
        rate: By which it is asked for, see `ConceptLibrary.passage`.
        others: Of what is read unless another rate is asked for: the keys of its records at the other rates held.
        choice: How the text is kept; None of a passage that no text is known of.
        digest: SHA-256 of the text, "" where it is not known.
    """

    ids: tuple[int, ...]
    segments: tuple[tuple[int, ...], ...]
    n_concepts: tuple[int, ...]
    keys: tuple[str, ...]
    rate: float = 0.0
    others: tuple[str, ...] = ()
    choice: Choice | None = None
    digest: str = ""

    @property
    def reason(self) -> str | None:
        """Why it stays text, such as `guard`; None where it has concepts."""
        return None if self.choice is None else self.choice.reason

    @property
    def expected(self) -> float | None:
        """What the guard measured of it; None without a guard, or where that was not kept."""
        return None if self.choice is None else self.choice.expected

    @property
    def all_keys(self) -> tuple[str, ...]:
        """Keys of all its records."""
        return self.keys + self.others

    @property
    def achieved_rate(self) -> float:
        """Source tokens per concept; of a passage that has any."""
        return len(self.ids) / sum(self.n_concepts)


@dataclass(frozen=True)
class EnsureReport:
    """What it took to have concepts of a set of passages."""

    segments: int
    compressed: int
    reused: int
    source_tokens: int
    concepts: int
    seconds: float


@dataclass(frozen=True)
class Fetched:
    """Concepts of one passage.

    Attributes:
        concepts: (n_concepts, hidden_size), None when the passage should be read as text.
        hits: Segments found in the store, or made for a question of before and still in memory.
        misses: Segments not found.
        compress_s: Seconds spent compressing what was missing.
        places: Of deep concepts: the token of the passage that each stands for, (n_concepts,), increasing.
        n_tokens: Tokens of the passage.
        reason: Why the passage stays text, where that was decided when it was ingested.
        ids: Of deep concepts: the id of the token that each stands for.
    """

    concepts: torch.Tensor | None
    hits: int
    misses: int
    compress_s: float
    places: torch.Tensor | None = None
    n_tokens: int = 0
    reason: str | None = None
    ids: tuple[int, ...] = ()

    def span(self, passage: int) -> ConceptSpan:
        """The concepts as a span of a prompt.

        Args:
            passage: Index of the passage in the prompt.

        Raises:
            MissingConceptsError: There are none: the passage is to be read as text.
        """
        if self.concepts is None:
            raise MissingConceptsError(
                "there are no concepts to read", expected="a passage that has some", next_step="read it as text"
            )
        return ConceptSpan(self.concepts, passage, self.places, self.n_tokens, self.ids)


class Took:
    """Seconds that passages took to compress, until whoever keeps account asks for them; the last few thousand."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, digest: str, seconds: float) -> None:
        """Note what a passage took."""
        with self._lock:
            self._seconds[digest] = seconds
            while len(self._seconds) > _REMEMBERED:
                self._seconds.popitem(last=False)

    def take(self, digest: str) -> float | None:
        """What a passage took, told once; None where it is not known."""
        with self._lock:
            return self._seconds.pop(digest, None)

    def take_all(self) -> dict[str, float]:
        """What all others took, told once."""
        with self._lock:
            taken = dict(self._seconds)
            self._seconds.clear()
            return taken


class KeptChoices(Protocol):
    """Knows what was chosen for texts that were ingested."""

    def of(self, digest: str) -> Choice | None:
        """The choice for the text of this SHA-256; None where there is none."""
        ...


def unpacked(
    rows: torch.Tensor, units: Sequence[Sequence[int]], n_concepts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Records of deep concepts, one behind the other, as states and places.

    Args:
        rows: (n_concepts of all units, hidden_size + 1), see `DeepCompressor.compress`.
        units: Token ids of each unit.
        n_concepts: K of each unit.

    Returns:
        States (n_concepts, hidden_size), and the token of the whole text that each stands for, (n_concepts,).

    Raises:
        CorruptRecordError: A place lies outside its unit, they do not increase, or they are not K.
    """
    lengths, counts = torch.tensor([len(unit) for unit in units]), torch.tensor(list(n_concepts))  # (n_units,)
    unit = torch.repeat_interleave(torch.arange(len(counts)), counts)  # (n_concepts,), which one it belongs to
    fits = len(rows) == len(unit)
    if fits:
        within = rows[:, -1].long()  # (n_concepts,)
        places = (lengths.cumsum(0) - lengths)[unit] + within  # (n_concepts,)
        outside = (within != rows[:, -1]) | (within < 0) | (within >= lengths[unit])  # (n_concepts,)
        fits = not bool(outside.any() or (places.diff() <= 0).any())
    if not fits:
        raise CorruptRecordError(
            "concepts stand at places that their text does not have",
            got=f"places {rows[:, -1].min():g} to {rows[:, -1].max():g} of {len(rows)} concepts",
            expected=f"{len(unit)} places in order, in units of {lengths.tolist()} tokens",
            next_step="delete the document, compact the storage, and ingest the document again",
        )
    return rows[:, :-1], places
